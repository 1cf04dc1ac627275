"""Resuming from a checkpoint: which one, in which form, and the proof that it was really loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.checkpoint import manifest, record, universal
from bico_ds.checkpoint.manifest import FoundCheckpoint
from bico_ds.checkpoint.state_checksums import differences, optimizer_steps, state_checksums
from bico_ds.common.errors import RunError, UserError
from bico_ds.common.files import write_atomically
from bico_ds.config.load import recorded_recipe, recorded_values
from bico_ds.config.schema import Recipe
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.model.weights.checksums import base_fingerprint
from bico_ds.optim.schedule import follow_recipe
from bico_ds.optim.state import separate_step_counters
from bico_ds.runtime.output.process_output import TOLD
from bico_ds.runtime.run_folder import STEP, RunFolder, split_metrics

_logger = logging.getLogger(__name__)

# What DeepSpeed's own checkpoint depends on; where a value differs, the universal form is loaded.
StateLayout = dict[str, Any]

# A checkpoint of another model cannot be loaded at all.
_SAME_MODEL = ("model.config", "model.lora")


class NotRestoredError(RunError):
    """A load reported success and left the engine in another state than the checkpoint's."""


@dataclass(frozen=True)
class Resumption:
    """The checkpoint to resume from, and the folder to load: its own, or its universal form."""

    found: FoundCheckpoint
    is_universal: bool

    step = property(lambda self: self.found.step)
    folder = property(
        lambda self: universal.folder_of(self.found.path) if self.is_universal else self.found.path
    )


def state_layout(recipe: Recipe, ds_config: dict[str, Any], world_size: int) -> StateLayout:
    """How the ranks divide the state among them."""
    zero = ds_config["zero_optimization"]
    return {
        "ranks": world_size,
        "zero_stage": zero.get("stage", 0),
        "dtype": recipe.model.dtype,
        "offload_optimizer": zero.get("offload_optimizer", {}).get("device", "none"),
        "offload_param": zero.get("offload_param", {}).get("device", "none"),
        "sub_group_size": zero.get("sub_group_size"),
    }


def choose(folder: RunFolder, option: str, recipe: Recipe, layout: StateLayout) -> Resumption | None:
    """Rank 0, before the process group starts: find, verify, and convert where the layout differs.

    `option` is `auto`, `none`, or the path of a checkpoint or of a run folder. None: start from the beginning.
    Raises `UserError` where checkpoints are there and none is complete, where the run had one and they are gone, where
    `option` names none, where it belongs to another model, and where it would have to be converted and cannot be.
    """
    if option == "none":
        return None
    found = record.newest_complete(folder, _print_line) if option == "auto" else _at(Path(option))
    if found is None:
        if folder.metrics_file.is_file():
            _print_line(f"'{folder.path}' has no checkpoint yet: training starts from step 0")
        return None
    _check_recipe(found, recipe)
    different = {key: (was, layout[key]) for key, was in found.layout.items() if was != layout[key]}
    which = "as asked" if found.path == Path(option) else "the newest complete checkpoint"
    _print_line(f"resuming from {found.path}: step {found.step}, {which}, {_written(found)}")
    if different:
        _print_line(
            "other layout: " + ", ".join(f"{key} {was} -> {now}" for key, (was, now) in different.items())
        )
        universal.convert(found, layout, _print_line)
    return Resumption(found, bool(different))


def begins_anew(folder: RunFolder, option: str) -> bool:
    """Whether `set_aside` will move away all that is in `folder`, whatever `choose` finds by `option`."""
    if option in ("auto", "none"):
        return option == "none"
    named = Path(option)
    return not (named.resolve() == folder.path.resolve() or record.is_own(named, folder))


def set_aside(folder: RunFolder, option: str, chosen: Resumption | None) -> None:
    """Move what is in `folder`, and does not belong to what `choose` chose by `option`, into its replaced-N/.

    Lines of metrics.jsonl are copied there: who writes that file cuts it.
    """
    is_foreign = chosen is not None and not record.is_own(chosen.found.path, folder)
    if option == "none" or is_foreign:
        folder.set_aside()
    else:
        _set_later_aside(folder, chosen.step if chosen is not None else -1)


def restore(engine: Engine, resumption: Resumption, recipe: Recipe) -> None:
    """Load weights, optimizer and schedule, and prove the first two by the manifest's checksums; all ranks together.

    The recipe's optimizer and schedule hold from here on, where they were changed.

    Raises `NotRestoredError` where anything differs from what was saved, `UserError` where the adapters have another base.
    """
    content = resumption.found.content
    path, _ = engine.load_checkpoint(
        str(resumption.folder.parent),
        tag=resumption.folder.name,
        # A frozen base is not in it; the checksums are stricter anyway.
        load_module_strict=not _has_frozen_base(engine),
    )
    if path is None:
        raise NotRestoredError(f"DeepSpeed loaded nothing from {resumption.folder}")
    if resumption.is_universal:
        separate_step_counters(engine.optimizer.optimizer)
    wrong = differences(state_checksums(engine), content["checksums"])
    if optimizer_steps(engine) != content["optimizer_steps"]:
        wrong.append(f"the step count ({optimizer_steps(engine)}, saved {content['optimizer_steps']})")
    if wrong:
        shown = "\n  ".join(wrong[:8]) + (f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise NotRestoredError(
            f"{resumption.folder} was loaded, and these are not as they were saved:\n  {shown}"
        )
    _check_base(engine, content["base"])
    was, now = _as_of_today(resumption.found), recorded_values(recipe)
    if any(was.get(section) != now[section] for section in ("optimizer", "schedule", "training")):
        follow_recipe(engine.optimizer.optimizer, engine.lr_scheduler, recipe.optimizer)


def manifest_header(
    engine: Engine, recipe: Recipe, layout: StateLayout, resumption: Resumption | None
) -> dict[str, Any]:
    """What is the same in all manifests of this run. Collective.

    `base`: the fingerprint of the weights that the run started from; None for random weights that are trained, and in
    what goes on from a checkpoint of all weights by an earlier version, which records none.
    """
    base: str | None
    if _has_frozen_base(engine):
        base = base_fingerprint(engine.module)
    else:  # what `model.path` names after a resume need not be what the run started from
        base = engine.module.base if resumption is None else resumption.found.content["base"]
    return {"layout": layout, "recipe": recorded_values(recipe), "base": base}


def _has_frozen_base(engine: Engine) -> bool:
    return any(not parameter.requires_grad for parameter in engine.module.parameters())


def _check_base(engine: Engine, saved: str | None) -> None:
    """A LoRA checkpoint holds the adapters only; the frozen base was loaded anew, from model.path."""
    if _has_frozen_base(engine) and saved is not None and base_fingerprint(engine.module) != saved:
        raise UserError(
            "model.path: the base there is not the one that this checkpoint's adapters were trained on"
        )


def _at(path: Path) -> FoundCheckpoint:
    if not path.is_dir():
        raise UserError(f"--resume {path}: no such folder")
    found = record.at(path, _print_line)
    if found is None:
        raise UserError(f"--resume {path}: no checkpoint there")
    return found


def _check_recipe(found: FoundCheckpoint, recipe: Recipe) -> None:
    changes = dict(_changes(_as_of_today(found), recorded_values(recipe), ""))
    foreign = [key for key in changes if key.startswith(_SAME_MODEL)]
    if foreign:
        was, now = changes[foreign[0]]
        raise UserError(
            f"{foreign[0]}: {found.path} was trained with {was}, the recipe has {now}; "
            "start anew with --resume none, or choose another folder with --output-dir"
        )
    for key, (was, now) in changes.items():
        _print_line(f"changed since the checkpoint: {key} {was} -> {now}")


def _as_of_today(found: FoundCheckpoint) -> dict[str, Any]:
    """The checkpoint's recipe, with the defaults of keys that its program did not know yet."""
    recorded = found.content["recipe"]
    try:
        return recorded_values(recorded_recipe(recorded, found.path / manifest.MANIFEST))
    except UserError:  # it has keys, or imports modules, that are gone
        return recorded


def _changes(old: Any, new: Any, key: str) -> list[tuple[str, tuple[Any, Any]]]:
    """The leaves in which two recipes differ, by dotted key."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [c for n in names for c in _changes(old.get(n), new.get(n), f"{key}.{n}" if key else n)]
    return [] if old == new else [(key, (old, new))]


def _set_later_aside(folder: RunFolder, step: int) -> None:
    """Checkpoints, evaluations and metrics after the step resumed from are damaged, or of steps that are done anew.

    None may be taken later for one of the steps to come, nor may whatever has the name of one. A start from the beginning
    (`step` is -1) does step 0 anew, too.
    """
    later = [path for of, path in STEP.in_folder(folder.checkpoints) if of > step]
    results = folder.evaluations_after(step)
    _, lines = split_metrics(folder.metrics_file, step)
    if not (later or results or lines):
        return
    aside = folder.new_aside()
    if results:
        (aside / folder.evaluation.name).mkdir()
    names = [path.name for path in later] + [f"{folder.evaluation.name}/{path.name}" for path in results]
    for path, name in zip(later + results, names, strict=True):
        path.rename(aside / name)
    if lines:
        write_atomically(aside / folder.metrics_file.name, "".join(lines))
        names.append(f"{len(lines)} line{'s' * (len(lines) > 1)} of {folder.metrics_file.name}")
    _print_line(f"set aside in {aside}: {', '.join(names)}")


def _written(found: FoundCheckpoint) -> str:
    return f"written by {found.layout['ranks']} rank{'s' * (found.layout['ranks'] > 1)}"


def _print_line(text: str) -> None:
    print(text, flush=True)
    _logger.info("%s", text, extra=TOLD)
