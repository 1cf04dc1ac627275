#!/usr/bin/env python
"""`bico-ds cures` of this checkout: bico_ds/commands/cures.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from bico_ds.commands.cures import main

    main.start()
