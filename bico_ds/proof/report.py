"""report.json and report.md: the machine, the aims, and what each part found."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bico_ds.common.files import write_atomically
from bico_ds.config.resources import CHECKOUT
from bico_ds.proof.aims import Judgement, judge_aims
from bico_ds.proof.parts import PARTS, Part
from bico_ds.proof.results import Result

_REHEARSAL = "REHEARSAL"
_SITE_PACKAGES = re.compile(r"(?:/[^\s/\"']+)+/(?:site|dist)-packages/")
_PLACE = re.compile(r"(?<![\w/.-])((?:[\w-]+/)+[\w.-]+\.py):\d")
_TEMPORARY = re.compile(r"/tmp/[^\s\"':,]+")


def write(results: Sequence[Result], machine: dict[str, Any], out: Path) -> None:
    """Write both reports into `out`."""
    by_part = {result.part: result for result in results}
    aims = judge_aims(by_part, rehearsal=machine["rehearsal"])
    content = {
        "title": title(machine),
        "rehearsal": machine["rehearsal"],
        "machine": machine,
        "aims": [asdict(aim) for aim in aims],
        "parts": [asdict(result) for result in results],
    }
    write_atomically(out / "report.json", json.dumps(content, indent=1) + "\n")
    write_atomically(out / "report.md", markdown(by_part, machine, aims, out))


def title(machine: dict[str, Any]) -> str:
    """What the report is about."""
    if machine["rehearsal"]:
        return f"{_REHEARSAL} of the GPU proof, on a CPU"
    return f"GPU proof on {machine['gpu']}"


def markdown(
    results: dict[str, Result], machine: dict[str, Any], aims: Sequence[Judgement], out: Path = Path()
) -> str:
    """The report for people, to be written into `out`; in the form that the pages in docs/benchmarks/ have."""
    rehearsal = machine["rehearsal"]
    lines = [
        f"# {title(machine)}",
        "",
        "```bash",
        f"python tools/gpu_proof.py{' --rehearse' * rehearsal}",
        "```",
        "",
        *_introduction(results, rehearsal),
        "",
        *_table(["machine", ""], _machine_rows(machine)),
        "",
        f"## Aims{_label(rehearsal)}",
        "",
        *_table(
            ["aim", "limit", "figure", ""], [[aim.aim, aim.limit, aim.figure, aim.verdict] for aim in aims]
        ),
    ]
    for part in PARTS.values():
        lines += ["", *_section(part, results.get(part.name), rehearsal)]
    # The tools were given this name of `out`.
    text = "\n".join(lines).replace(f"{_text(out.resolve())}/", "")
    return without_machine_paths(text) + "\n"


def _introduction(results: dict[str, Result], rehearsal: bool) -> Iterator[str]:
    dates = sorted(result.date for result in results.values())
    measured = f"Measured {dates[0]} to {dates[-1]}. " if dates else "Nothing was measured yet. "
    if rehearsal:
        yield (
            f"**{_REHEARSAL}: no GPU was measured.** All parts ran on a CPU at a tiny size, to show that they run. "
            "No figure on this page says anything about a GPU."
        )
    else:
        yield (
            f"{measured}The same command goes on where it stopped. What a step moves, counted without a GPU, is in "
            "`docs/benchmarks/traffic.md`."
        )


def _machine_rows(machine: dict[str, Any]) -> Iterator[list[Any]]:
    labels = {
        "gpu": "GPU",
        "memory_gb": "GPU memory, GB",
        "compute_capability": "compute capability",
        "driver": "driver",
        "cuda": "CUDA of torch",
        "cpu": "CPU",
        "compiler": "C++ compiler",
        "nvcc": "nvcc",
        "python": "Python",
        "commit": "commit",
    }
    for key, label in labels.items():
        value = machine[key]
        yield [label, "none" if value is None else value]
    yield from ([name, version] for name, version in machine["versions"].items())


def _section(part: Part, result: Result | None, rehearsal: bool) -> Iterator[str]:
    yield f"## {part.name}{_label(rehearsal)}"
    yield ""
    yield f"{part.question} `tools/bench/{part.tool}`"
    yield ""
    if result is None:
        yield "Not run yet."
        return
    problem = f": {_text(result.problem)}" if result.problem else ""
    yield f"**{result.status}**{problem} ({result.seconds:.0f} s, {result.date})"
    found = result.findings
    if found.wrong:
        yield ""
        yield from (f"- wrong: {_text(line)}" for line in found.wrong)
    if found.rows:
        yield ""
        yield from _table(
            [f"compared{_label(rehearsal)}", "ours", "other", "unit", "times as fast"],
            [[row[key] for key in ("name", "ours", "other", "unit", "ratio")] for row in found.rows],
        )
    for table in found.tables:
        yield ""
        yield f"{_text(table['title'])}{_label(rehearsal)}"
        yield ""
        yield from _table(table["columns"], table["rows"])
    if found.notes:
        yield ""
        yield from (f"- {_text(line)}" for line in found.notes)
    if result.output:
        yield from ["", "The last lines of its output:", "", *(f"    {line}" for line in result.output)]


def _label(rehearsal: bool) -> str:
    return f" ({_REHEARSAL} on a CPU)" if rehearsal else ""


def _table(columns: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(map(_cell, columns)) + " |"
    yield "|---" * len(columns) + "|"
    yield from ("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else _text(value).replace("|", "\\|")


def _text(value: Any) -> str:
    """Plain text as Markdown: names of kernels hold `<`, `*` and line ends."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("*", "\\*")


def without_machine_paths(text: str) -> str:
    """The text with places in installed packages, the checkout and temporary folders named without this machine's paths."""
    text = _SITE_PACKAGES.sub("…/", text)
    if CHECKOUT is not None:
        text = text.replace(f"{CHECKOUT}/", "")
    home = os.environ.get("HOME", "/").rstrip("/")
    if home:
        text = text.replace(f"{home}/", "~/")
    return _PLACE.sub(_outside, _TEMPORARY.sub("(a temporary folder)", text))


def _outside(place: re.Match[str]) -> str:
    """A place in an installed package, which a bench may name without its folder, is told from one of this checkout."""
    ours = CHECKOUT is not None and (CHECKOUT / place.group(1)).is_file()
    return place.group() if ours else f"…/{place.group()}"
