#!/usr/bin/env python
"""`bico-ds tensorboard` of this checkout: bico_ds/commands/show/tensorboard.py.

As tensorboard.py this file would hide the package of that name from every script beside it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from bico_ds.commands.show.tensorboard import main

    main.start()
