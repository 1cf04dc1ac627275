"""Checkpoints: DeepSpeed's own, made whole by a manifest and an atomic rename.

    checkpoints/
      step-000100/      DeepSpeed's files, and manifest.json: sizes and checksums of all of them
      latest            the name of the newest whole one
      .partial-000200/  being written, or left by a crash

DeepSpeed unpickles its checkpoints: they are trusted input, and the manifest's checksums are verified before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bico_ds.config.errors import UserError
from bico_ds.config.schema import CheckpointSpec
from bico_ds.engine.distributed import Ranks, all_gather_objects
from bico_ds.engine.run_folder import RunFolder, write_atomically

MANIFEST = "manifest.json"
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint whose files are all there."""

    path: Path
    step: int
    world_size: int
    manifest: dict[str, Any]


class Checkpointer:
    """Writes checkpoints of one engine and deletes old ones."""

    def __init__(self, spec: CheckpointSpec, folder: RunFolder, ranks: Ranks, *, exclude_frozen: bool) -> None:
        self._spec, self._folder, self._ranks = spec, folder, ranks
        self._exclude_frozen = exclude_frozen

    def is_due(self, step: int) -> bool:
        every = self._spec.every_steps
        return every is not None and step % every == 0

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> float:
        """Write the checkpoint of `step`; all ranks together. Returns the seconds that training stood still.

        `state` is JSON-able and the same on all ranks; it comes back from `load`.
        """
        started = time.perf_counter()
        root = self._folder.checkpoints
        partial = root / f".partial-{step:06d}"
        if self._ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            root.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        engine.save_checkpoint(
            str(root), tag=partial.name, client_state={}, save_latest=False, exclude_frozen_parameters=self._exclude_frozen
        )
        dist.barrier()
        self._commit(partial, step, state)
        dist.barrier()
        return time.perf_counter() - started

    def _commit(self, partial: Path, step: int, state: dict[str, Any]) -> None:
        """Each rank checksums its share of the files; rank 0 writes the manifest and renames."""
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        mine = files[self._ranks.rank :: self._ranks.world_size]
        sums = {str(path.relative_to(partial)): [path.stat().st_size, checksum(path)] for path in mine}
        gathered = all_gather_objects(sums)
        if not self._ranks.is_first:
            return
        everything = {name: entry for part in gathered for name, entry in part.items()}
        manifest = {"step": step, "world_size": self._ranks.world_size, "state": state, "files": everything}
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self._folder.check_fence()
        final = self._folder.checkpoints / f"step-{step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        write_atomically(self._folder.checkpoints / "latest", final.name + "\n")
        self._prune()

    def _prune(self) -> None:
        found = sorted(self._folder.checkpoints.glob("step-*"))
        keep_every = self._spec.keep_every_steps
        for path in found[: -self._spec.keep_last]:
            if keep_every is None or int(path.name.removeprefix("step-")) % keep_every:
                shutil.rmtree(path)


def load(engine: Any, found: FoundCheckpoint) -> None:
    """Load weights, optimizer and schedule. Raises RuntimeError where DeepSpeed loads nothing."""
    path, _ = engine.load_checkpoint(str(found.path.parent), tag=found.path.name)
    if path is None:
        raise RuntimeError(f"DeepSpeed loaded nothing from {found.path}")


def find(root: Path, say: Any = print) -> FoundCheckpoint | None:
    """The newest whole checkpoint below `root`; damaged ones are named and passed over.

    None where there is none at all. Raises `UserError` where there are checkpoints but no whole one.
    """
    candidates = sorted(root.glob("step-*"), reverse=True) if root.is_dir() else []
    for path in candidates:
        try:
            return verify(path)
        except UserError as error:
            say(f"damaged checkpoint passed over: {error}")
    if candidates:
        raise UserError(f"{root}: no checkpoint there is whole; start anew with --resume none")
    return None


def verify(path: Path) -> FoundCheckpoint:
    """Compare a checkpoint with its manifest. Raises `UserError` naming the first file that differs."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise UserError(f"{path}: no {MANIFEST}; not a checkpoint of this program, or an incomplete one")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{manifest_path}: not valid JSON") from None
    for problem in _problems(path, manifest["files"]):
        raise UserError(problem)
    return FoundCheckpoint(path, manifest["step"], manifest["world_size"], manifest)


def _problems(path: Path, files: dict[str, tuple[int, str]]) -> Iterator[str]:
    for name, (size, expected) in files.items():
        file = path / name
        if not file.is_file():
            yield f"{file}: missing"
        elif file.stat().st_size != size:
            yield f"{file}: {file.stat().st_size} bytes, the manifest says {size}"
        elif checksum(file) != expected:
            yield f"{file}: the checksum differs from the manifest's"


def checksum(path: Path) -> str:
    """BLAKE2b of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
