"""What a sample stream depends on, kept in every checkpoint.

A resume with anything else is refused with the reason, unless `data.allow_change` is set. For checkpoints older than
`identity()` see `legacy_identity.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import DataSpec
from bico_ds.objectives.base import Objective
from bico_ds.objectives.schedule import ObjectiveSchedule


def identity(
    data: DataSpec,
    fingerprints: Sequence[str],
    schedule: ObjectiveSchedule,
    *,
    sources_of: Sequence[Sequence[int]],
    seed: int,
    global_batch_bins: int,
    teachers: Mapping[int, str],
    draws: Sequence[int],
    share_by: str,
    replies: Mapping[int, str | None],
) -> dict[str, Any]:
    """Return all that the global sample stream is a function of, by recipe key; JSON-able.

    `sources_of`: the numbers of each objective's sources; `teachers`: the fingerprints of stored distributions, by source;
    `draws`: the number of each objective's draws; `share_by`: what the schedule's probabilities are shares of;
    `replies`: names of where the replies are, of the sources of objectives that read it.
    What checkpoints of before do not know is in it where it is not the default alone. The number of ranks, of micro-batches
    and of workers is not in it: the stream does not depend on them.
    """
    keys: dict[str, Any] = {"seed": seed, "training.global_batch_bins": global_batch_bins}
    if share_by != "steps":
        keys["share_by"] = share_by
    for name in ("capacity", "overlong", "max_documents_per_bin", "repack_every_epoch"):
        keys[f"data.{name}"] = getattr(data, name)
    for index, (source, fingerprint) in enumerate(zip(data.sources, fingerprints, strict=True)):
        keys[f"data.sources[{index}] contents"] = fingerprint
        keys[f"data.sources[{index}].weight"] = source.weight
        keys[f"data.sources[{index}].epochs"] = source.epochs
        if source.token_share is not None:
            keys[f"data.sources[{index}].token_share"] = source.token_share
        if index in replies:
            keys[f"data.sources[{index}] replies"] = replies[index]
        if index in teachers:
            keys[f"retention.teacher of data.sources[{index}]"] = teachers[index]
    for index, (objective, probability) in enumerate(
        zip(schedule.objectives, schedule.probabilities, strict=True)
    ):
        keys[f"objectives[{index}]"] = of_objective(objective)
        keys[f"objectives[{index}].probability"] = probability
        if len(sources_of[index]) < len(data.sources):
            keys[f"objectives[{index}].sources"] = list(sources_of[index])
        if draws[index]:
            keys[f"objectives[{index}].draws"] = draws[index]
    return keys


def of_objective(objective: Objective) -> Any:
    """Return an objective's identity as a checkpoint gives it back. Raises `UserError` where JSON cannot hold it."""
    own = objective.identity()
    if not isinstance(own, dict):
        raise UserError(
            f"objective '{objective.name}': its identity() must be a mapping of names to values, found {own!r:.80}"
        )
    try:
        return json.loads(json.dumps(own), parse_constant=_constant)
    except (TypeError, ValueError) as error:
        raise UserError(f"objective '{objective.name}': its identity() is not JSON: {error}") from error


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN equals nothing, not even itself")
    return float(name)


def fingerprint(keys: Mapping[str, Any]) -> str:
    """Return a hash of an identity: equal for equal ones."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:32]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each value that differs, by dotted key."""
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    missing = "(not given)"
    return [
        f"{key}: {old.get(key, missing)!s} in the checkpoint, {new.get(key, missing)!s} now"
        for key in sorted({*old, *new})
        if old.get(key, missing) != new.get(key, missing)
    ]


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def refuse(lines: Sequence[str]) -> None:
    """Raise the `UserError` of a resume on a changed data set or recipe."""
    raise UserError(
        "the data set or recipe is not the one this checkpoint was trained on, so the samples would not "
        "continue where they stopped:\n  " + "\n  ".join(lines) + "\n"
        "Restore the old values, or go on with the new ones: --allow-data-change of bico-ds train "
        "(data.allow_change: true in the recipe)"
    )
