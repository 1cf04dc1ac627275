"""Runs side by side: the table of the reversal tasks, and the picture of how they were learnt.

    python tools/compare.py runs/tiny_ntp runs/tiny_bico
    python tools/compare.py runs/evaluation/tiny_ntp.json runs/evaluation/tiny_bico.json

A RUN is a run folder of launch/train.py, or a result file of tools/evaluate.py. Every later one minus the first
is shown too, paired by prompt, where both were asked the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bico_ds.common.errors import UserError
from bico_ds.config.arguments import local_path
from bico_ds.evaluation.report.compare import compare_runs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=local_path)
    parser.add_argument(
        "--output", type=local_path, default=Path("runs/comparison"), help="folder (default: %(default)s)"
    )
    options = parser.parse_args()
    try:
        compare_runs(options.runs, output=options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
