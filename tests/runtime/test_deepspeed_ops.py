"""The operations that a recipe needs; the lock of a killed compilation does not stop the next start."""

from __future__ import annotations

import os
import time

from torch.utils.file_baton import FileBaton

from bico_ds.config.load import load_recipe
from bico_ds.runtime import deepspeed_ops


def test_an_override_of_a_part_of_the_offload_leaves_its_device():
    path = "deepspeed.overrides.zero_optimization.offload_optimizer.nvme_path=/local"
    recipe = load_recipe("tiny_bico", ["deepspeed.config=zero3_offload_nvme", path])
    assert deepspeed_ops.needed(recipe, on_cuda=True) == ["CPUAdamBuilder", "AsyncIOBuilder"]


def test_an_abandoned_lock_is_removed_and_a_held_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
    abandoned, held = tmp_path / "dead" / "lock", tmp_path / "alive" / "lock"
    abandoned.touch()
    compiling = FileBaton(str(held))
    assert compiling.try_acquire()
    long_ago = time.time() - 3600
    for lock in (abandoned, held):
        os.utime(lock, (long_ago, long_ago))
    deepspeed_ops.release_abandoned_locks()
    assert not abandoned.exists()
    assert held.exists()
    compiling.release()
