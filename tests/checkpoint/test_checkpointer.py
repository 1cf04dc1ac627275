"""What decides whether a written folder becomes a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from bico_ds.checkpoint import manifest
from bico_ds.checkpoint.checkpointer import Checkpointer
from bico_ds.common.files import write_atomically
from bico_ds.config.sections.checkpoint import CheckpointSpec
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.lock import FencedError, read_lock
from bico_ds.runtime.run_folder import RunFolder


def test_a_run_that_loses_its_folder_while_files_are_flushed_commits_nothing(tmp_path, monkeypatch):
    """The flush of a large checkpoint takes long; what the new owner has written meanwhile stays."""
    folder = RunFolder(tmp_path)
    folder.open()
    kept = folder.checkpoints / "step-000002"
    kept.mkdir(parents=True)
    partial = folder.checkpoints / ".step-000002.0123456789ab.incomplete"
    partial.mkdir()

    write_manifest = manifest.write_manifest

    def lose_the_lock(path, content):
        write_manifest(path, content)
        lock = read_lock(folder.lock.path)
        write_atomically(folder.lock.path, json.dumps(asdict(replace(lock, run_id="another"))))

    monkeypatch.setattr(manifest, "write_manifest", lose_the_lock)
    ranks = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    saves = Checkpointer(CheckpointSpec(), folder, ranks, exclude_frozen=False, header={})
    with pytest.raises(FencedError, match="run another"):
        saves._commit(partial, 2, {"files": {}})
    assert kept.is_dir()
    assert not (folder.checkpoints / "latest").exists()
    folder.close()
