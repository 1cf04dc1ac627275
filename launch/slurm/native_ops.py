#!/usr/bin/env python
"""`native_ops` from a checkout: the command is bico_ds/commands/slurm/native_ops.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bico_ds.commands.slurm.native_ops import main

if __name__ == "__main__":
    sys.exit(main())
