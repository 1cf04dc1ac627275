"""Runs side by side: the table of the reversal tasks, and the picture of how they were learnt.

    python tools/compare.py runs/tiny_ntp runs/tiny_bico

A RUN is a run folder of launch/train.py, or a result file of tools/evaluate.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bico_ds.config.errors import UserError
from bico_ds.evaluation.comparison import Arm, load_arms
from bico_ds.evaluation.plots import plot_curves
from bico_ds.evaluation.tables import result_markdown, result_table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/comparison"), help="folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        arms = load_arms(options.runs)
        write_comparison(arms, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_comparison(arms: list[Arm], folder: Path) -> None:
    """Print the table, and write comparison.md, .json and, where there are curves, .png."""
    console = Console()
    results = {arm.label: arm.final for arm in arms}
    console.print(result_table(results))
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "comparison.md", folder / "comparison.json"]
    written[0].write_text(result_markdown(results), encoding="utf-8")
    values = {
        arm.label: {"final": arm.final.to_json(rows=False)["tasks"], "curves": arm.curves} for arm in arms
    }
    written[1].write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if any(arm.curves for arm in arms):
        written.append(folder / "comparison.png")
        plot_curves(arms, written[-1])
    console.print("written: " + ", ".join(str(path) for path in written))


if __name__ == "__main__":
    sys.exit(main())
