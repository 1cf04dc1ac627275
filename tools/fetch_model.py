#!/usr/bin/env python
"""`fetch_model` from a checkout: the command is bico_ds/commands/fetch_model.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bico_ds.commands.fetch_model import main

if __name__ == "__main__":
    sys.exit(main())
