#!/usr/bin/env python
"""`train` from a checkout: the command is bico_ds/commands/train.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bico_ds.commands.train import main
from bico_ds.common.process_end import end_process

if __name__ == "__main__":
    end_process(main())
