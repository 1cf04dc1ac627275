"""The section of how to run it again: commands, versions, commit."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bico_ds.common.printable import on_one_line
from bico_ds.common.secrets import left_out_keys, words_without_secrets
from bico_ds.common.yaml_files import dotted
from bico_ds.evaluation.report.page.html import Html, code, element, joined, section
from bico_ds.evaluation.report.page.source import ReportedRun

_MOST_WORD = 500
_MOST_STARTS = 5


def repeat(runs: Sequence[ReportedRun]) -> Html:
    """The commands that make the runs and this report again."""
    report = shlex.join(["bico-ds", "report", *(_word(_argument(run.path)) for run in runs)])
    return section(
        "repeat",
        "Run it again",
        *(_commands(run) for run in runs),
        element("h3", "This report"),
        code([report]),
    )


def _commands(run: ReportedRun) -> Html:
    parts: list[Any] = [element("h3", run.label)]
    if run.folder is None:
        said = f"A result file of the model {on_one_line(run.model, most=_MOST_WORD)}; it does not say by which command."
        return joined([*parts, element("p", said, class_="soft")])
    if run.recipe:
        parts += [element("p", "Its recipe alone repeats it, in a new folder:"), code([_again(run)])]
        if missing := [dotted(key) for key in left_out_keys(run.recipe)]:
            parts.append(element("p", f"Secrets to be given again: {', '.join(missing)}.", class_="soft"))
    recorded = [words for start in run.starts[-_MOST_STARTS:] if (words := _recorded(start))]
    if recorded:
        parts += [element("p", "As it was started, once on each rank:"), code(dict.fromkeys(recorded))]
    if run.starts:
        parts.append(_versions(run.starts[-1]))
    return joined(parts)


def _again(run: ReportedRun) -> str:
    hosts = run.starts[-1].get("hosts") if run.starts else None
    ranks = len(hosts) if isinstance(hosts, list) and hosts else 1
    is_one_host = not isinstance(hosts, list) or len(set(map(str, hosts))) <= 1
    launcher = ["deepspeed", *(("--num_accelerators", str(ranks)) if is_one_host else ())]
    place = run.path.resolve() if run.path.name in ("", "..") else run.path
    new = place.with_name(f"{run.path.resolve().name}-again")
    recipe = run.path / "recipe.yaml"
    words = [*launcher, "launch/train.py", "--recipe", _argument(recipe), "--output-dir", _argument(new)]
    device = _device(run)
    return ("DS_ACCELERATOR=cpu " if device.startswith("a CPU") else "") + shlex.join(map(_word, words))


def _argument(path: Path) -> str:
    """A path as no command takes for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _device(run: ReportedRun) -> str:
    plan = run.starts[-1].get("plan") if run.starts else None
    device = plan.get("device") if isinstance(plan, dict) else None
    return device if isinstance(device, str) else ""


def _recorded(start: dict[str, Any]) -> str:
    """The command line of a start, for a shell, without the word that DeepSpeed's launcher adds."""
    command = start.get("command")
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        return ""
    words = [word for word in words_without_secrets(command) if not word.startswith("--local_rank=")]
    return shlex.join(map(_word, words))


def _word(word: str) -> str:
    return on_one_line(word, most=_MOST_WORD)


def _versions(start: dict[str, Any]) -> Html:
    return element(
        "dl", *(part for name, value in _facts(start) for part in (element("dt", name), element("dd", value)))
    )


def _facts(start: dict[str, Any]) -> Iterator[tuple[str, str]]:
    versions = start.get("versions")
    known = {"python": start.get("python"), **(versions if isinstance(versions, dict) else {})}
    listed = ", ".join(f"{name} {version}" for name, version in known.items() if isinstance(version, str))
    for name, value in (("versions", listed), ("commit", start.get("commit")), ("host", start.get("host"))):
        if isinstance(value, str) and value:
            yield name, on_one_line(value, most=_MOST_WORD)
