#!/usr/bin/env python
"""`bico-ds status` of this checkout: bico_ds/commands/slurm/status.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from bico_ds.commands.slurm.status import main

    main.start()
