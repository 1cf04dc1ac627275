#!/usr/bin/env python
"""`status` from a checkout: the command is bico_ds/commands/slurm/status.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bico_ds.commands.slurm.status import main

if __name__ == "__main__":
    sys.exit(main())
