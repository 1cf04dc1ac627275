#!/usr/bin/env python
"""`bico-ds prepare` of this checkout: bico_ds/commands/prepare/command.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from bico_ds.commands.prepare.command import main

    main.start()
