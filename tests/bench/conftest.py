"""A bench imports its neighbours by their bare names, as the script that it is."""

import sys

from tests import ROOT

sys.path.append(str(ROOT / "tools" / "bench"))
