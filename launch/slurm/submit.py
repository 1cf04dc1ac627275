#!/usr/bin/env python
"""`bico-ds submit` of this checkout: bico_ds/commands/slurm/submit.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from bico_ds.commands.slurm.submit import main

    main.start()
