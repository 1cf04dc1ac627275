"""Checkpoints: DeepSpeed's own, made complete by a manifest and an atomic rename.

checkpoints/
  step-000100/                          DeepSpeed's files, and manifest.json; universal/, where a resume converted it
  latest                                the name of the newest one
  best                                  the name of the one that `checkpoint.keep_best` keeps
  .step-000200.XXXXXXXXXXXX.incomplete/ being written, or left by a crash
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.checkpoint import manifest, record
from bico_ds.checkpoint.best import BestCheckpoint, BestKeeper
from bico_ds.checkpoint.disk import PatientWriter, bytes_needed, lack_of_room
from bico_ds.checkpoint.state_checksums import optimizer_steps, state_checksums
from bico_ds.common.errors import RunError
from bico_ds.common.files import (
    publish_folder,
    remove_incomplete,
    temporary_sibling,
    write_atomically,
)
from bico_ds.config.sections.checkpoint import CheckpointSpec
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.runtime.distributed import Ranks, all_gather_objects, broadcast_object
from bico_ds.runtime.run_folder import RunFolder


class CheckpointError(RunError):
    """A checkpoint could not be written; the ones before it are complete."""


@dataclass(frozen=True)
class Saved:
    """The seconds that training stood still on this rank, and why no checkpoint was written (None: one was)."""

    seconds: float
    failure: str | None


class Checkpointer:
    """Writes checkpoints of one engine and deletes old ones; all ranks together.

    `header` goes into every manifest: the state's layout, the recipe, the fingerprint of the base. `best`: which one is
    never deleted; None: no recipe asks for that.
    """

    def __init__(
        self,
        spec: CheckpointSpec,
        folder: RunFolder,
        ranks: Ranks,
        *,
        exclude_frozen: bool,
        header: dict[str, Any],
        best: BestKeeper | None = None,
    ) -> None:
        self._spec, self._folder, self._ranks = spec, folder, ranks
        self.best = best or BestKeeper(None, folder, ranks)
        self._exclude_frozen, self._header = exclude_frozen, header

    def is_due(self, step: int) -> bool:
        every = self._spec.every_steps
        return every is not None and step % every == 0

    def save(self, engine: Engine, step: int, state: dict[str, Any], *, required: bool = False) -> Saved:
        """Write the checkpoint of `step`. Of `state`, which is JSON-able, rank 0's is kept; a resume gets it back.

        Raises `CheckpointError` on all ranks where it cannot be written and is `required`, or
        `checkpoint.on_write_error` is `stop`; `FencedError` on rank 0 alone, where another run has taken the folder over.
        """
        started = time.perf_counter()
        final = self._folder.checkpoints / manifest.name_of(step)
        partial = final.with_name(broadcast_object(temporary_sibling(final).name))  # rank 0's
        failure = broadcast_object(self._make_room(engine, partial) if self._ranks.is_first else None)
        if failure is None:
            failure = self._write(engine, partial, step, state)
        if failure is not None:
            if self._ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            if required or self._spec.on_write_error == "stop":
                raise CheckpointError(f"checkpoint of step {step} not written: {failure}")
        return Saved(time.perf_counter() - started, failure)

    def keep_best(self, best: BestCheckpoint) -> str | None:
        """Keep this step's checkpoint as the best one, in the place of the one before. Collective; as `BestKeeper.keep`."""
        failure = self.best.keep(best)
        if self._ranks.is_first:
            self._prune()
        return failure

    def _make_room(self, engine: Engine, partial: Path) -> str | None:
        """Rank 0: a new folder, with room enough; incomplete ones of earlier runs are removed. Returns what prevents it."""
        root = partial.parent
        try:
            self._folder.lock.check()
            root.mkdir(parents=True, exist_ok=True)
            remove_incomplete(root)
            for left in root.glob(".partial-*"):  # by version 0.1.0
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
            return lack_of_room(root, bytes_needed(engine))
        except OSError as error:
            return f"{root}: {error.strerror}"

    def _write(self, engine: Engine, partial: Path, step: int, state: dict[str, Any]) -> str | None:
        """DeepSpeed's files, then the manifest, then the rename. Returns the first failure of any rank."""
        checksums = state_checksums(engine)
        engine.checkpoint_engine = writer = PatientWriter(engine._config)
        # DeepSpeed copies a script beside its files, outside its writer: one more write that could fail on one rank.
        engine._copy_recovery_script = lambda folder: None
        engine.save_checkpoint(
            str(partial.parent),
            tag=partial.name,
            save_latest=False,
            exclude_frozen_parameters=self._exclude_frozen,
        )
        table, failure = _file_table(partial, writer)
        tables, failures = zip(*all_gather_objects((table, failure)), strict=True)
        failure = next((failure for failure in failures if failure is not None), None)
        if failure is not None or not self._ranks.is_first:
            return broadcast_object(failure)
        content = {
            **self._header,
            "step": step,
            "run_id": self._folder.lock.run_id,
            "state": state,
            "checksums": checksums,
            "optimizer_steps": optimizer_steps(engine),
            "files": {name: entry for table in tables for name, entry in table.items()},
        }
        return broadcast_object(self._commit(partial, step, content))

    def _commit(self, partial: Path, step: int, content: dict[str, Any]) -> str | None:
        """Rank 0: make it a checkpoint. Returns why not."""
        final = partial.with_name(manifest.name_of(step))
        try:
            manifest.write_manifest(partial, content)
            # Nothing slow comes between this check and the rename: the ranks have flushed their files (`file_table`).
            self._folder.lock.check()
            if final.is_symlink() or not final.is_dir():
                self._set_foreign_aside(final)
            # A damaged one of the same step, which the resume passed over.
            shutil.rmtree(final, ignore_errors=True)
            publish_folder(partial, final)
            record.write(self._folder, final, step)
            latest = partial.with_name("latest")
            if latest.is_dir():
                self._set_foreign_aside(latest)
            write_atomically(latest, final.name + "\n")
        except OSError as error:
            return f"{error.filename or partial}: {error.strerror}"
        self._prune()
        return None

    def _set_foreign_aside(self, path: Path) -> None:
        """What somebody has put where a checkpoint, or the name of the newest one, belongs: it stops no run, and is kept."""
        if os.path.lexists(path):
            path.rename(self._folder.new_aside() / path.name)

    def _prune(self) -> None:
        """Rank 0: delete those that nothing keeps any more."""
        every, best = self._spec.keep_every_steps, self.best.kept_steps
        for path in manifest.sealed_in(self._folder.checkpoints)[: -self._spec.keep_last]:
            step = manifest.step_of(path)
            if (every is None or step % every) and step not in best:
                shutil.rmtree(path, ignore_errors=True)


def _file_table(partial: Path, writer: PatientWriter) -> tuple[manifest.FileTable, str | None]:
    """The files that this rank has written, or why they are not on disk."""
    if writer.failure is not None:
        return {}, writer.failure
    try:
        return manifest.file_table(partial, writer.written), None
    except OSError as error:
        return {}, f"{partial}: {error.strerror}"
