"""The operations that a recipe needs; the lock of a killed compilation does not stop the next start."""

from __future__ import annotations

import logging
import os
import random
import re
import time

import pytest
from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder
from torch.utils.cpp_extension import _get_cuda_arch_flags
from torch.utils.file_baton import FileBaton

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.runtime import deepspeed_ops
from bico_ds.runtime.deepspeed_ops import ARCHITECTURES, readable_architectures


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


def read_by_deepspeed(monkeypatch, architectures: str) -> str:
    """The list that torch gets from DeepSpeed's builder, of one that the process has."""
    monkeypatch.setenv(ARCHITECTURES, architectures)
    builder = FusedAdamBuilder()
    builder.jit_mode = True
    builder.compute_capability_args()
    return os.environ[ARCHITECTURES]


def numbers(flags: list[str]) -> set[str]:
    """The architectures of nvcc's flags, without their letters."""
    return {re.sub(r"(?<=\d)a", "", flag) for flag in flags}


def plain(architectures: str) -> set[str]:
    return {entry.removesuffix("+PTX") for entry in architectures.split(";")}


@pytest.mark.parametrize(
    "asked", ["9.0a", "9.0 10.0a", "8.0;9.0a;10.0a+PTX", "8.0;Hopper", "Ampere Hopper", "Blackwell;9.0a"]
)
def test_deepspeed_reads_what_is_written_anew_and_torch_reads_the_same(asked, monkeypatch, caplog):
    with pytest.raises(ValueError, match="invalid literal for int"):
        read_by_deepspeed(monkeypatch, asked)
    monkeypatch.setenv(ARCHITECTURES, asked)
    meant = numbers(_get_cuda_arch_flags())
    with caplog.at_level(logging.INFO, "bico_ds"):
        for _ in range(2):
            deepspeed_ops.write_readable_architectures()
    (said,) = caplog.messages
    written = os.environ[ARCHITECTURES]
    assert said == f"{ARCHITECTURES}: {written}, as DeepSpeed cannot read '{asked}'"
    assert set(_get_cuda_arch_flags()) == meant
    read = read_by_deepspeed(monkeypatch, written)
    assert plain(read) == plain(written)


@pytest.mark.parametrize(
    "asked", ["", "9.0", "8.0 9.0+PTX", "8.0;10.0", "Atlantis", "9.0a;Atlantis", "9.0;;"]
)
def test_a_list_that_deepspeed_reads_or_torch_does_not_know_stays_as_it_is(asked, monkeypatch):
    monkeypatch.setenv(ARCHITECTURES, "7.5")
    assert readable_architectures(asked) == asked
    assert os.environ[ARCHITECTURES] == "7.5"


def test_an_architecture_that_no_one_knows_is_a_line_and_no_traceback(tmp_path, monkeypatch):
    class Builder:
        NAME = "fused_adam"

        def load(self, verbose):
            int(f"{random.randrange(9)}a")

    monkeypatch.setattr(deepspeed_ops.deepspeed.ops, "__compatible_ops__", {"fused_adam": True})
    monkeypatch.setattr(deepspeed_ops.get_accelerator(), "create_op_builder", lambda name: Builder())
    with pytest.raises(
        UserError, match="DeepSpeed's FusedAdamBuilder does not compile here: invalid literal"
    ):
        deepspeed_ops._build_one("FusedAdamBuilder")
