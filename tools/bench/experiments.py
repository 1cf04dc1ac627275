"""Experiments on SmolLM2-135M: how a run of one is made, scored and kept, and the tables of what came out.

`retention.py` and `cures.py` beside this file each have the list of their runs, and these options:

    --list                       the runs and what they set
    --run search/NAME --work DIR
    --table

DIR holds models/smollm2-135m (tools/fetch_model.py), search/name_description (tools/search_split.py), and the texts of
which the perplexity is measured (docs/benchmarks/results.md); the full sets are found through BICO_DS_DATA. A run that was
made is not made again. docs/benchmarks/EXPERIMENT/ keeps its metrics (NAME.jsonl) and its command and scores, without the
answers (NAME.json); those of blends, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import this_checkout  # noqa: F401  first on sys.path

from bico_ds.common.command_line import Command
from bico_ds.common.errors import RunError, UserError, did_you_mean
from bico_ds.config.arguments import local_path
from bico_ds.evaluation.report.runs import work_in
from bico_ds.evaluation.report.tables import work_markdown

ROOT = Path(__file__).resolve().parents[2]
START_MODEL = "models/smollm2-135m"
HEADLINES = {"n2d": "bleu", "d2n": "contains", "n2d_reverse": "contains", "d2n_reverse": "bleu"}
BOTH_WAYS = ("n2d", "n2d_reverse")
COMMON = (
    "model.dtype=bf16",
    "training.micro_batch_bins=4",
    "deepspeed.config=zero2_bf16",
    "training.epochs=null",
)
PARTS = ("search", "final")


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


def search(lr: str, *settings: str, recipe: str = "smollm2_135m_bico") -> Run:
    """200 updates on the search split."""
    return Run(
        steps=200, settings=(f"optimizer.lr={lr}", "evaluation.every_steps=200", *settings), recipe=recipe
    )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Its runs by name, `search/…` and `final/…`, and the texts whose perplexity is measured, as paths in the work's folder.

    `likelihood`: whether right answers are also compared with those of other persons, and the runs by their work.
    """

    name: str
    runs: Mapping[str, Run]
    texts: tuple[str, ...]
    likelihood: bool = False

    @property
    def kept(self) -> Path:
        return ROOT / "docs" / "benchmarks" / self.name

    def make(self, name: str, work: Path) -> None:
        """Train and evaluate a run, and keep its figures.

        Raises `UserError` for an unknown name, `RunError` where it failed.
        """
        if name not in self.runs:
            raise UserError(f"--run {name}: no such run{did_you_mean(name, self.runs)}; --list shows all")
        run, output = self.runs[name], work / "runs" / name
        data = run.data(work)
        if not (output / "export").is_dir():
            _call(run.command(output), work, BICO_DS_DATA=str(data))
        starts = json.loads((output / "run.json").read_text(encoding="utf-8"))
        asked = ("--data", str(data / "name_description"), "--tasks")
        questions = (*asked, ",".join(run.tasks), *(["--likelihood"] * self.likelihood))
        self.score(name, f"runs/{name}/export", work, questions, command=starts[-1]["command"])
        (self.kept / f"{name}.jsonl").write_bytes((output / "metrics.jsonl").read_bytes())
        if run.blends:
            self._score_blends(name, work, (*asked, ",".join(BOTH_WAYS)))

    def _score_blends(self, name: str, work: Path, asked: Sequence[str]) -> None:
        run, blends = self.runs[name], f"runs/blends/{Path(name).name}"
        export = ["tools/export_hf.py", f"runs/{name}", blends, "--blend", ",".join(run.blends)]
        if not (work / blends).is_dir():
            _call([sys.executable, str(ROOT / export[0]), *export[1:]], work)
        for share in run.blends:
            self.score(f"{name}_blend-{share}", f"{blends}/blend-{share}", work, asked, command=export)

    def score(
        self, name: str, model: str, work: Path, asked: Sequence[str], *, command: Sequence[str]
    ) -> None:
        """Ask all prompts, measure the texts, and keep what comes out. The start model's perplexities are measured once."""
        evaluation = work / "runs" / "evaluation"
        start, result = evaluation / "start.json", evaluation / f"{name.replace('/', '_')}.json"
        self._evaluate(START_MODEL, start, work)
        self._evaluate(model, result, work, *asked)
        kept = {
            **_content(result),
            "retention_before": _content(start)["retention"],
            "command": _shown(command, work),
        }
        for content in (*kept["tasks"].values(), *kept.get("choice", {}).values()):
            del content["rows"]
        path = self.kept / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    def _evaluate(self, model: str, output: Path, work: Path, *asked: str) -> None:
        """Call tools/evaluate.py, which computes what `output` does not hold already."""
        tool = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "--batch-size", "60"]
        _call([*tool, "--model", model, *asked, "--retention", *self.texts, "--output", str(output)], work)

    def tables(self, part: str) -> Iterator[str]:
        """The Markdown tables of the runs of a part, `search` or `final`, that are kept, in the order of the list."""
        order = [name.removeprefix(f"{part}/") for name in self.runs]
        paths = sorted((self.kept / part).glob("*.json"), key=lambda path: _place(path.stem, order))
        kept = {path.stem: _content(path) for path in paths}
        yield self._scores(kept)
        if self.likelihood:
            yield _likelihoods(kept)
            yield work_markdown({path.stem: work_in(path.with_suffix(".jsonl")) for path in paths}).rstrip()

    def _scores(self, kept: Mapping[str, Any]) -> str:
        tasks = [task for task in HEADLINES if any(task in content["tasks"] for content in kept.values())]
        texts = [Path(text).name for text in self.texts]
        lines = [["run", *tasks, *(column for text in texts for column in (text, "times"))]]
        for name, content in kept.items():
            scores = [_score(content["tasks"].get(task), HEADLINES[task]) for task in tasks]
            lines.append([name, *scores, *(cell for text in texts for cell in _perplexity(content, text))])
        return _markdown(lines)

    def command(self, description: str | None) -> Command:
        """The tool's command line."""
        return Command(description=description, add_options=_add_options, run=self._run)

    def _run(self, options: Namespace) -> None:
        if options.list:
            for name, run in self.runs.items():
                print(name, run.recipe, *run.settings, sep="  ")
        elif options.table:
            print(*(table for part in PARTS for table in self.tables(part)), sep="\n\n")
        else:
            self.make(options.run, options.work.resolve())


def _add_options(parser: ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="the runs and what they set")
    what.add_argument("--table", action="store_true", help="what came out, as Markdown")
    what.add_argument("--run", metavar="NAME", help="make a run")
    parser.add_argument(
        "--work", metavar="DIR", type=local_path, default=Path(), help="folder of models, stores and texts"
    )


def _content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _place(name: str, order: Sequence[str]) -> tuple[int, str]:
    """Blends stand behind the run that they are made of."""
    return order.index(name.split("_blend-")[0]), name


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)


def _likelihoods(kept: Mapping[str, Any]) -> str:
    lines = [["run", "task", "difference, nats", "rank", "first", "p"]]
    for name, content in kept.items():
        for task, found in content.get("choice", {}).items():
            low, high = found["intervals"]["difference"]
            difference = f"{found['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
            first, p = f"{found['forced_choice']:.2f}", found["person_t_test"]["p_value"]
            lines.append(
                [name, task, difference, f"{found['rank']:.2f}", first, "–" if p is None else f"{p:.0e}"]
            )
    return _markdown(lines)


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
