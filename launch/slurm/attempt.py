#!/usr/bin/env python
"""For the batch script: bico_ds/commands/slurm/attempt.py of this checkout."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from bico_ds.commands.slurm.attempt import main

    main.start()
