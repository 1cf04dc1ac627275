"""The experiment on forgetting: its runs, the commands that make them, and the table of what came out.

    python tools/bench/retention.py --list
    python tools/bench/retention.py --run search/ntp50_1e-3 --work DIR
    python tools/bench/retention.py --table

DIR holds models/smollm2-135m (tools/fetch_model.py), stores/debian and text/debian (tools/bench/debian_text.py), stores/own
(bico-ds prepare replay), search/name_description (tools/search_split.py) and TEXT.txt (docs/benchmarks/results.md); the full
sets are found through BICO_DS_DATA. A run that was made is not made again. Its metrics, the scores without the answers, and
the command are kept in docs/benchmarks/retention/NAME/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import this_checkout  # noqa: F401  first on sys.path

from bico_ds.common.command_line import Command
from bico_ds.common.errors import RunError, UserError, did_you_mean
from bico_ds.config.arguments import local_path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "benchmarks" / "retention"
COMMON = (
    "model.dtype=bf16",
    "training.micro_batch_bins=4",
    "deepspeed.config=zero2_bf16",
    "training.epochs=null",
)
FACTS = "objectives.1.sources=[name_description]"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training of `recipe` with these `--set`, on the search split or on the full sets."""

    steps: int
    settings: tuple[str, ...]
    recipe: str = "smollm2_135m_bico"
    full_sets: bool = False

    def command(self, output: Path) -> list[str]:
        """The training's command line, in the folder of the work."""
        sets = [*COMMON, f"training.steps={self.steps}", *self.settings]
        if not self.full_sets:
            sets += ["evaluation.tasks=[n2d,n2d_reverse]"]
        return [
            sys.executable,
            str(ROOT / "launch" / "train.py"),
            *("--recipe", self.recipe, "--output-dir", str(output)),
            *(part for setting in sets for part in ("--set", setting)),
        ]


def replay(store: str, share: float) -> str:
    """The setting that adds a store as one more source."""
    return f"data.sources+={{name: replay, store: stores/{store}, token_share: {share}}}"


def search(lr: str, *settings: str) -> Run:
    """200 updates on the search split."""
    return Run(steps=200, settings=(f"optimizer.lr={lr}", "evaluation.every_steps=200", *settings))


def full(seed: int, *settings: str, recipe: str = "smollm2_135m_bico", lr: str = "1e-3") -> Run:
    """560 updates on the full sets."""
    return Run(
        steps=560,
        settings=(f"seed={seed}", f"optimizer.lr={lr}", "evaluation.every_steps=280", *settings),
        recipe=recipe,
        full_sets=True,
    )


RUNS = {
    "search/facts_5e-4": search("5e-4"),
    "search/facts_1e-3": search("1e-3"),
    "search/ntp10_1e-3": search("1e-3", replay("debian", 0.1), FACTS),
    "search/ntp25_1e-3": search("1e-3", replay("debian", 0.25), FACTS),
    "search/ntp50_1e-3": search("1e-3", replay("debian", 0.5), FACTS),
    "search/all50_1e-3": search("1e-3", replay("debian", 0.5)),
    "search/own50_1e-3": search("1e-3", replay("own", 0.5), FACTS),
    "search/ntp50_5e-4": search("5e-4", replay("debian", 0.5), FACTS),
    "full/keep_seed1": full(1, replay("debian", 0.5), FACTS),
    "full/keep_seed2": full(2, replay("debian", 0.5), FACTS),
    "full/keep_lora": full(
        1,
        replay("debian", 0.5),
        FACTS,
        "retention={kl: 0.5, on: [replay]}",
        recipe="smollm2_135m_bico_lora",
        lr="5e-3",
    ),
}


def make_run(name: str, work: Path) -> None:
    """Train and evaluate a run, and keep its figures. Raises `UserError` for an unknown name, `RunError` where it failed."""
    if name not in RUNS:
        raise UserError(f"--run {name}: no such run{did_you_mean(name, RUNS)}; --list shows all")
    run, output = RUNS[name], work / "runs" / name
    data = Path(os.environ["BICO_DS_DATA"]) if run.full_sets else work / "search"
    environment = {**os.environ, "BICO_DS_DATA": str(data)}
    if not (output / "export").is_dir():
        _call(run.command(output), work, environment)
    evaluate(name, output / "export", work, data, full_sets=run.full_sets)
    (KEPT / name / "metrics.jsonl").write_bytes((output / "metrics.jsonl").read_bytes())
    (KEPT / name / "command.txt").write_text(_shown(run.command(output), work), encoding="utf-8")


def evaluate(name: str, model: Path, work: Path, data: Path, *, full_sets: bool) -> None:
    """Ask all prompts and measure both texts, and keep the scores under `name`."""
    result = work / "runs" / "evaluation" / f"{name.replace('/', '_')}.json"
    command = [
        sys.executable,
        str(ROOT / "tools" / "evaluate.py"),
        *("--model", str(model), "--data", str(data / "name_description")),
        *("--tasks", "n2d,d2n,n2d_reverse,d2n_reverse" if full_sets else "n2d,n2d_reverse"),
        *("--retention", "TEXT.txt", "text/debian/prose.txt", "--base", "models/smollm2-135m"),
        *("--batch-size", "60", "--output", str(result)),
    ]
    _call(command, work, {**os.environ})
    kept = json.loads(result.read_text(encoding="utf-8"))
    for task in kept["tasks"].values():
        del task["prompts"]
    folder = KEPT / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def table() -> str:
    """The Markdown table of all runs that are kept."""
    lines = [
        "| run | n2d | n2d_reverse | TEXT | times the base's | prose | times |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(KEPT.glob("*/*/evaluation.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [_score(content, "n2d", "bleu"), _score(content, "n2d_reverse", "contains")]
        for text in ("TEXT.txt", "prose.txt"):
            after = content["retention"][text]["perplexity"]
            before = content["retention_before"][text]["perplexity"]
            cells += [f"{after:.1f}", f"{after / before:.2f}"]
        lines.append(f"| {path.parent.relative_to(KEPT)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _score(content: dict, task: str, metric: str) -> str:
    found = content["tasks"][task]
    low, high = found["intervals"][metric]
    return f"{found['metrics'][metric]:.3f} [{low:.3f}, {high:.3f}]"


def _call(command: Sequence[str], work: Path, environment: dict[str, str]) -> None:
    if subprocess.run(command, cwd=work, env=environment, check=False).returncode:
        raise RunError(f"failed: {' '.join(command)}")


def _shown(command: Sequence[str], work: Path) -> str:
    parts = [part.replace(f"{ROOT}/", "").replace(f"{work}/", "") for part in command[1:]]
    return "python " + " ".join(f"'{part}'" if set(part) & set("[]{} ") else part for part in parts) + "\n"


def run(options: Namespace) -> None:
    if options.list:
        for name, chosen in RUNS.items():
            print(name, *chosen.settings, sep="  ")
    elif options.table:
        print(table())
    else:
        make_run(options.run, options.work.resolve())


def add_options(parser: ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="the runs and what they set")
    what.add_argument("--table", action="store_true", help="what came out, as Markdown")
    what.add_argument("--run", metavar="NAME", help="make a run")
    parser.add_argument(
        "--work", metavar="DIR", type=local_path, default=Path(), help="folder of models, stores and texts"
    )


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
