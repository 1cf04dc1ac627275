"""The export at the end of a run, by all ranks together."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from bico_ds.checkpoint import manifest
from bico_ds.common.errors import RunError
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.model.architecture import id_list
from bico_ds.model.weights.export_model import export_model
from bico_ds.training.export.write_card import card_of
from bico_ds.training.trainer import Trainer


def export_run(trainer: Trainer, tokenizer: ExportedTokenizer) -> list[str]:
    """Write the run's export, and return what to say of it. Collective, once the last step's checkpoint is written."""
    run, model = trainer.run, trainer.engine.module
    notes: list[str] = []

    def write_card(folder: Path) -> None:
        record = manifest.content_of(run.folder.checkpoints / manifest.name_of(trainer.step))
        card = card_of(record, run.recipe, run.folder)
        card.write(folder)
        notes.extend(f"note: {note}" for note in card.notes)

    try:
        export_model(
            model,
            tokenizer,
            run.folder.export,
            dtype=run.recipe.model.dtype,
            write_card=write_card,
            overwrite=True,
        )
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the model was not exported to '{run.folder.export}': {error}. Step {trainer.step:,} is saved: the same "
            f"command exports it once that is put right, as bico-ds export {run.folder.path} FOLDER does"
        ) from error
    stops = id_list(model.causal_lm.generation_config.eos_token_id)
    return [f"exported to {run.folder.export}: {tokenizer.describe(stops)}", *notes]
