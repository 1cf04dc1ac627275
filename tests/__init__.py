"""The tests: a folder for each room of the package; `distributed/` and `cluster/two_nodes/` start real processes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the checkout
# A run folder and its store, written by version 0.1.0.
EARLIER_RUN = ROOT / "tests" / "fixtures" / "run_of_0_1_0"
DOUBLING = ROOT / "tests" / "objectives" / "doubling.py"  # an objective from outside of the package
