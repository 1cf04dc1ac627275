"""The export of the best checkpoint at the end of a run whose last step is not its best one."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from transformers import GenerationConfig

from bico_ds.checkpoint import manifest
from bico_ds.checkpoint.best import BestCheckpoint
from bico_ds.common.errors import RunError, UserError
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.model.weights.export_adapter import export_adapter_checkpoint
from bico_ds.model.weights.export_checkpoint import export_checkpoint
from bico_ds.runtime.distributed import broadcast_object
from bico_ds.training.run import Run

_SECONDS_BETWEEN_SIGNS = 1.0


def export_best(
    run: Run,
    best: BestCheckpoint,
    tokenizer: ExportedTokenizer,
    *,
    write_card: Callable[[Path], None],
    on_progress: Callable[[], None],
) -> GenerationConfig:
    """Write the run's export from its best checkpoint, whatever the engine holds; returns its generation config. Collective.

    Rank 0 verifies and reads the checkpoint, one shard in memory at a time, by a thread: meanwhile the ranks hear of each
    other, so that no time limit of a collective runs, and call `on_progress`. `write_card`: as of `export_model`. Raises
    `RunError` on all ranks where it fails.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="export") as thread:
        work = thread.submit(_export, run, best, tokenizer, write_card) if run.ranks.is_first else None
        while broadcast_object(work is not None and not work.done()):
            on_progress()
            time.sleep(_SECONDS_BETWEEN_SIGNS)
        failure, settings = broadcast_object(work.result() if work is not None else None)
    if failure is not None:
        raise RunError(
            f"the best checkpoint ({best}) was not exported to '{run.folder.export}': {failure}. All steps are done and "
            "saved: the same command exports it once that is put right, and "
            f"bico-ds export {run.folder.path} FOLDER --step last writes the last step"
        )
    return GenerationConfig.from_dict(settings)


def _export(
    run: Run, best: BestCheckpoint, tokenizer: ExportedTokenizer, write_card: Callable[[Path], None]
) -> tuple[str | None, dict[str, object]]:
    """On rank 0: why it could not be done, or the generation config that was written."""
    spec = run.recipe.model
    try:
        found = manifest.verify(best.path(run.folder))
        write: Callable[..., GenerationConfig] = partial(
            export_checkpoint, write_card=lambda blend, folder: write_card(folder)
        )
        if run.recipe.exports_adapters:
            write = partial(export_adapter_checkpoint, write_card=write_card)
        written = write(
            found.path,
            spec,
            tokenizer,
            run.folder.export,
            spec.dtype,
            generation=GenerationConfig.from_dict(found.content["export"]["generation_config"]),
            base=found.content["base"],
            overwrite=True,
        )
    except (OSError, SafetensorError, UserError) as error:
        return str(error), {}
    return None, written.to_dict()
