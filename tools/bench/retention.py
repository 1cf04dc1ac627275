"""The experiment on forgetting: its runs, the commands that make them, and the tables of what came out.

    python tools/bench/retention.py --list
    python tools/bench/retention.py --run search/ntp50_1e-3 --work DIR
    python tools/bench/retention.py --table

DIR holds models/smollm2-135m (tools/fetch_model.py), stores/debian and text/debian (tools/bench/debian_text.py), stores/own
(bico-ds prepare replay), search/name_description (tools/search_split.py) and TEXT.txt (docs/benchmarks/results.md); the full
sets are found through BICO_DS_DATA. A run that was made is not made again. docs/benchmarks/retention/ keeps its metrics
(NAME.jsonl) and its command and scores, without the answers (NAME.json); those of blends, too.
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
from typing import Any

import this_checkout  # noqa: F401  first on sys.path

from bico_ds.common.command_line import Command
from bico_ds.common.errors import RunError, UserError, did_you_mean
from bico_ds.config.arguments import local_path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "benchmarks" / "retention"
START_MODEL = "models/smollm2-135m"
TEXTS = ("TEXT.txt", "text/debian/prose.txt")
HEADLINES = {"n2d": "bleu", "d2n": "contains", "n2d_reverse": "contains", "d2n_reverse": "bleu"}
BOTH_WAYS = ("n2d", "n2d_reverse")
COMMON = (
    "model.dtype=bf16",
    "training.micro_batch_bins=4",
    "deepspeed.config=zero2_bf16",
    "training.epochs=null",
)
BLENDS = ("0.50", "0.70", "0.90")
FACTS = "objectives.1.sources=[name_description]"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training of `recipe` with these `--set`, scored on `tasks`; on the search split or on the full sets.

    `blends`: shares of the trained weights, the rest the start model's, that are scored too.
    """

    steps: int
    settings: tuple[str, ...]
    recipe: str = "smollm2_135m_bico"
    full_sets: bool = False
    blends: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(HEADLINES) if self.full_sets else BOTH_WAYS

    def data(self, work: Path) -> Path:
        """The folder that BICO_DS_DATA names."""
        if not self.full_sets:
            return work / "search"
        if "BICO_DS_DATA" not in os.environ:
            raise UserError("BICO_DS_DATA is not set: it names the folder that holds name_description/")
        return Path(os.environ["BICO_DS_DATA"]).resolve()

    def command(self, output: Path) -> list[str]:
        """The training's command line, in the folder of the work."""
        tasks = f"evaluation.tasks=[{','.join(self.tasks)}]"
        sets = [*COMMON, f"training.steps={self.steps}", tasks, *self.settings]
        return [
            sys.executable,
            str(ROOT / "launch" / "train.py"),
            *("--recipe", self.recipe, "--output-dir", str(output)),
            *(part for setting in sets for part in ("--set", setting)),
        ]


def replay(store: str, share: float) -> str:
    """The setting that adds a store as one more source."""
    return f"data.sources+={{name: {store}, store: stores/{store}, token_share: {share}}}"


def search(lr: str, *settings: str) -> Run:
    """200 updates on the search split."""
    return Run(steps=200, settings=(f"optimizer.lr={lr}", "evaluation.every_steps=200", *settings))


def final(seed: int, lr: str, *settings: str, recipe: str = "smollm2_135m_bico") -> Run:
    """560 updates on the full sets, with Debian's texts as half of the tokens of NTP steps."""
    common = (
        f"seed={seed}",
        f"optimizer.lr={lr}",
        "evaluation.every_steps=280",
        replay("debian", 0.5),
        FACTS,
    )
    return Run(steps=560, settings=(*common, *settings), recipe=recipe, full_sets=True, blends=BLENDS)


RUNS = {
    "search/facts_5e-4": search("5e-4"),
    "search/facts_1e-3": search("1e-3"),
    "search/ntp10_1e-3": search("1e-3", replay("debian", 0.1), FACTS),
    "search/ntp25_1e-3": search("1e-3", replay("debian", 0.25), FACTS),
    "search/ntp50_1e-3": search("1e-3", replay("debian", 0.5), FACTS),
    "search/all50_1e-3": search("1e-3", replay("debian", 0.5)),
    "search/own50_1e-3": search("1e-3", replay("own", 0.5), FACTS),
    "search/ntp50_5e-4": search("5e-4", replay("debian", 0.5), FACTS),
    "final/keep_seed1": final(1, "1e-3"),
    "final/keep_5e-4": final(1, "5e-4"),
    "final/keep_seed2": final(2, "1e-3"),
    "final/keep_lora": final(1, "5e-3", "retention={kl: 0.5, on: [debian]}", recipe="smollm2_135m_bico_lora"),
}


def make_run(name: str, work: Path) -> None:
    """Train and evaluate a run, and keep its figures. Raises `UserError` for an unknown name, `RunError` where it failed."""
    if name not in RUNS:
        raise UserError(f"--run {name}: no such run{did_you_mean(name, RUNS)}; --list shows all")
    run, output = RUNS[name], work / "runs" / name
    data = run.data(work)
    if not (output / "export").is_dir():
        _call(run.command(output), work, BICO_DS_DATA=str(data))
    starts = json.loads((output / "run.json").read_text(encoding="utf-8"))
    asked = ("--data", str(data / "name_description"), "--tasks")
    score(name, f"runs/{name}/export", work, (*asked, ",".join(run.tasks)), command=starts[-1]["command"])
    (KEPT / f"{name}.jsonl").write_bytes((output / "metrics.jsonl").read_bytes())
    blends = f"runs/blends/{output.name}"
    if run.blends:
        export = ["tools/export_hf.py", f"runs/{name}", blends, "--blend", ",".join(run.blends)]
        if not (work / blends).is_dir():
            _call([sys.executable, str(ROOT / export[0]), *export[1:]], work)
        for share in run.blends:
            questions = (*asked, ",".join(BOTH_WAYS))
            score(f"{name}_blend-{share}", f"{blends}/blend-{share}", work, questions, command=export)


def score(name: str, model: str, work: Path, asked: Sequence[str], *, command: Sequence[str]) -> None:
    """Ask all prompts, measure the texts, and keep what comes out. The start model's perplexities are measured once."""
    evaluation = work / "runs" / "evaluation"
    start, result = evaluation / "start.json", evaluation / f"{name.replace('/', '_')}.json"
    _evaluate(START_MODEL, start, work)
    _evaluate(model, result, work, *asked)
    kept = {
        **_content(result),
        "retention_before": _content(start)["retention"],
        "command": _shown(command, work),
    }
    for task in kept["tasks"].values():
        del task["rows"]
    path = KEPT / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _evaluate(model: str, output: Path, work: Path, *asked: str) -> None:
    """Call tools/evaluate.py, which computes what `output` does not hold already."""
    tool = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "--batch-size", "60"]
    _call([*tool, "--model", model, *asked, "--retention", *TEXTS, "--output", str(output)], work)


def table(part: str) -> str:
    """The Markdown table of the runs of a part, `search` or `final`, that are kept."""
    kept = {path.stem: _content(path) for path in sorted((KEPT / part).glob("*.json"))}
    tasks = [task for task in HEADLINES if any(task in content["tasks"] for content in kept.values())]
    texts = [Path(text).name for text in TEXTS]
    columns = ["run", *tasks, *(column for text in texts for column in (text, "times"))]
    lines = [columns, ["---"] * len(columns)]
    for name, content in kept.items():
        scores = [_score(content["tasks"].get(task), HEADLINES[task]) for task in tasks]
        lines.append([name, *scores, *(cell for text in texts for cell in _perplexity(content, text))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _score(task: dict[str, Any] | None, metric: str) -> str:
    if task is None:
        return "not asked"
    low, high = task["intervals"][metric]
    return f"{task['metrics'][metric]:.3f} [{low:.3f}, {high:.3f}]"


def _perplexity(content: dict[str, Any], text: str) -> tuple[str, str]:
    """After the training, and times that of the start model."""
    after, before = (content[part][text]["perplexity"] for part in ("retention", "retention_before"))
    return f"{after:.1f}", f"{after / before:.2f}"


def _call(command: Sequence[str], work: Path, **environment: str) -> None:
    if subprocess.run(command, cwd=work, env={**os.environ, **environment}, check=False).returncode:
        raise RunError(f"failed: {' '.join(command)}")


def _shown(command: Sequence[str], work: Path) -> str:
    parts = [part.replace(f"{ROOT}/", "").replace(f"{work}/", "") for part in command]
    return "python " + " ".join(f"'{part}'" if set(part) & set("[]{} ") else part for part in parts)


def run(options: Namespace) -> None:
    if options.list:
        for name, chosen in RUNS.items():
            print(name, *chosen.settings, sep="  ")
    elif options.table:
        print(table("search"), table("final"), sep="\n\n")
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
