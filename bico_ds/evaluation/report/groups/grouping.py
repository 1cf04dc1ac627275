"""Which runs are repetitions of one another: those whose recipes differ in the seed, and in names, alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.printable import on_one_line
from bico_ds.common.secrets import without_secrets
from bico_ds.common.yaml_files import dotted, read_mapping
from bico_ds.config.layers import leaves
from bico_ds.evaluation.report.runs import ComparedRun
from bico_ds.runtime.run_folder import RunFolder

SEED = "seed"
_NAMES = ("name", "description", "output_dir")  # of a run: they change nothing of what it does
_MOST_IN_LABEL = 3
_MOST_SHOWN = 40
_NOT_THERE = "–"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A run and its recipe: each value as text, by the key that `--set` takes; empty where it is not known."""

    run: ComparedRun
    path: Path
    recipe: Mapping[str, str]

    @property
    def seed(self) -> str:
        return self.recipe.get(SEED, "")

    def value(self, key: str) -> str:
        return self.recipe.get(key, _NOT_THERE)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that repeat one another, in the order in which they were named."""

    label: str
    members: tuple[Member, ...]


def members_of(runs: Sequence[ComparedRun], paths: Sequence[Path]) -> list[Member]:
    """Each run with the recipe that its folder has; one of a result file, or that cannot be read, is not known."""
    return [
        Member(run=run, path=path, recipe=_recipe_in(path)) for run, path in zip(runs, paths, strict=True)
    ]


def _recipe_in(path: Path) -> dict[str, str]:
    file = RunFolder(path).recipe_file
    if not file.is_file():
        return {}
    try:
        values = read_mapping(file, "no recipe").values
    except UserError:
        return {}
    return {leaf.path: _written(leaf.value) for leaf in leaves(without_secrets(values))}


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def grouped(members: Sequence[Member], by: Sequence[str] = ()) -> list[Group]:
    """Runs of the same recipe but for seed and names, or with the same values of the keys `by`.

    Raises `UserError` for a key that no recipe has, and for a run whose recipe is not known where keys are given.
    """
    keys = [_known_key(key, members) for key in by]
    groups: dict[Any, list[Member]] = {}
    for member in members:
        groups.setdefault(_identity(member, keys), []).append(member)
    labels = _labels([*groups.values()], keys)
    return [Group(label=label, members=tuple(of)) for label, of in zip(labels, groups.values(), strict=True)]


def alone(members: Sequence[Member]) -> list[Group]:
    """Each run as a group of its own."""
    return [Group(label=member.run.label, members=(member,)) for member in members]


def _identity(member: Member, keys: Sequence[str]) -> Any:
    if keys:
        return tuple(map(member.value, keys))
    if not member.recipe:
        return member.path
    return frozenset((key, value) for key, value in member.recipe.items() if key not in (SEED, *_NAMES))


def _known_key(key: str, members: Sequence[Member]) -> str:
    """The key as recipes have it: entries of lists may be named by their index, too."""
    unknown = next((member.run.label for member in members if not member.recipe), None)
    if unknown is not None:
        raise UserError(
            f"--by {key}: {unknown} has no recipe.yaml that can be read, so its value is not known"
        )
    known = {name: name for member in members for name in member.recipe}
    word = re.sub(r"\[([^\[\]]+)\]", r".\1", key)
    if key in known:
        return key
    for member in members:
        known = _paths_by_index(member.path) | known
    if word in known:
        return known[word]
    below = [name for name in known if name.startswith(f"{word}.")]
    if below:
        raise UserError(f"--by {key}: is a section; name one of its keys: {', '.join(below[:8])}")
    raise UserError(f"--by {key}: no recipe of these runs has this key{did_you_mean(key, known)}")


def _paths_by_index(path: Path) -> dict[str, str]:
    tree = read_mapping(RunFolder(path).recipe_file, "no recipe").values
    return {dotted(leaf.key): leaf.path for leaf in leaves(tree)}


def differing_keys(members: Sequence[Member]) -> list[str]:
    """The keys, but for seed and names, whose values are not the same in all recipes that are known."""
    known = [member for member in members if member.recipe]
    keys = dict.fromkeys(key for member in known for key in member.recipe)
    return [
        key for key in keys if key not in (SEED, *_NAMES) and len({member.value(key) for member in known}) > 1
    ]


def _labels(groups: Sequence[Sequence[Member]], by: Sequence[str]) -> list[str]:
    """What groups are called: by their recipe's name where that tells them apart, else by the few keys that do."""
    names = [_common_name(group) for group in groups]
    differing = list(by) or differing_keys([member for group in groups for member in group])
    if not by and len(set(names)) == len(groups) and all(names):
        return names
    if 0 < len(differing) <= max(len(by), _MOST_IN_LABEL):
        short = _shortened(differing)
        labels = [
            ", ".join(
                f"{short[key]}={on_one_line(group[0].value(key), most=_MOST_SHOWN)}" for key in differing
            )
            if group[0].recipe
            else group[0].run.label
            for group in groups
        ]
        if len(set(labels)) == len(labels):
            return labels
    return [
        group[0].run.label + (f" and {len(group) - 1} more" if len(group) > 1 else "") for group in groups
    ]


def _common_name(group: Sequence[Member]) -> str:
    """The name of the recipe of all runs of a group, or the label of its only run; empty where they have several."""
    names = {member.recipe.get("name", member.run.label) for member in group}
    return names.pop() if len(names) == 1 else ""


def _shortened(keys: Sequence[str]) -> dict[str, str]:
    """Keys without what stands before their last word, where that word alone tells them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def group_remarks(groups: Sequence[Group]) -> Iterator[str]:
    """What makes the runs of a group other than repetitions of one another with other seeds."""
    for group in groups:
        runs = [member.run for member in group.members]
        seeds = [member.seed for member in group.members if member.seed]
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            yield (
                f"{group.label}: several runs have the seed {', '.join(twice)}: the spread is less than that of seeds"
            )
        steps = {run.step: run.label for run in reversed(runs) if run.step is not None}
        if len(steps) > 1:
            last = ", ".join(f"{step} ({steps[step]})" for step in sorted(steps))
            yield f"{group.label}: not all runs were evaluated last at the same step: {last}"
        if differing := differing_keys(group.members):
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            yield f"{group.label}: its runs differ in more than seeds: {', '.join(differing[:5])}{more}"
