"""The export at the end of a run, by all ranks together."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from bico_ds.checkpoint import manifest
from bico_ds.common.errors import RunError
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.model.architecture import id_list
from bico_ds.model.weights.export_adapter import export_adapter, stops_unlike_base
from bico_ds.model.weights.export_model import export_model
from bico_ds.training.export.best import export_best
from bico_ds.training.export.write_card import card_of
from bico_ds.training.run import Run
from bico_ds.training.trainer import Trainer


def export_run(trainer: Trainer, tokenizer: ExportedTokenizer) -> list[str]:
    """Write the run's export, and return what to say of it. Collective, once the last step's checkpoint is written.

    Where the run keeps its best checkpoint, that is exported. Raises `RunError`, on all ranks, where it fails.
    """
    run, best = trainer.run, trainer.checkpointer.best.best
    notes: list[str] = []
    if best is not None and best.step != trainer.step:
        write_card = partial(_write_card, run, best.step, notes)
        progress = trainer.watchdog.note_progress
        generation = export_best(run, best, tokenizer, write_card=write_card, on_progress=progress)
        what = f"the best checkpoint ({best}), not the last step, {trainer.step:,}, to {run.folder.export}"
    else:
        _export_live(trainer, tokenizer, notes)
        generation = trainer.engine.module.causal_lm.generation_config
        what = f"to {run.folder.export}"
    told = f"exported {what}: {tokenizer.describe(id_list(generation.eos_token_id))}"
    if run.recipe.exports_adapters:
        spec = run.recipe.model
        told += (
            f"; adapters, to be loaded over '{spec.path}' (merged: bico-ds export {run.folder.path} FOLDER)"
        )
        if note := stops_unlike_base(spec, trainer.engine.module.config, generation):
            notes.append(f"note: {note}")
    return [told, *notes]


def _export_live(trainer: Trainer, tokenizer: ExportedTokenizer, notes: list[str]) -> None:
    run, model, spec = trainer.run, trainer.engine.module, trainer.run.recipe.model
    write_card, folder = partial(_write_card, run, trainer.step, notes), run.folder.export
    try:
        if run.recipe.exports_adapters:
            export_adapter(model, spec, tokenizer, folder, spec.dtype, write_card=write_card, overwrite=True)
        else:
            export_model(model, tokenizer, folder, spec.dtype, write_card=write_card, overwrite=True)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the model was not exported to '{run.folder.export}': {error}. Step {trainer.step:,} is saved: the same "
            f"command exports it once that is put right, as bico-ds export {run.folder.path} FOLDER does"
        ) from error


def _write_card(run: Run, step: int, notes: list[str], folder: Path) -> None:
    """On rank 0: the card of the checkpoint of that step; `notes` gets what to say of it."""
    record = manifest.content_of(run.folder.checkpoints / manifest.name_of(step))
    card = card_of(record, run.recipe, run.folder)
    card.write(folder, kind="adapter" if run.recipe.exports_adapters else "model")
    notes.extend(f"note: {note}" for note in card.notes)
