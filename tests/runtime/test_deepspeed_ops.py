"""The operations that a recipe needs; the lock of a killed compilation does not stop the next start."""

from __future__ import annotations

import logging
import os
import random
import re
import stat
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


@pytest.mark.parametrize("bad", ["/dev/null", "/dev/null/below", "/proc/none"])
def test_a_folder_that_cannot_be_written_is_replaced_by_the_spare_one_and_that_is_said(
    bad, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv(deepspeed_ops.FOLDER, bad)
    spare = tmp_path / "native_ops"
    with caplog.at_level(logging.INFO, "bico_ds"):
        assert deepspeed_ops.choose_folder(spare) == spare
    assert os.environ[deepspeed_ops.FOLDER] == str(spare) and not spare.exists()
    (said,) = caplog.messages
    assert said.startswith(f"TORCH_EXTENSIONS_DIR: cannot write into '{bad}'") and str(spare) in said
    deepspeed_ops.open_spare_folder(spare, alone=True)
    assert stat.S_IMODE(spare.stat().st_mode) == 0o700


def test_a_home_that_cannot_be_written_takes_the_spare_folder_too(tmp_path, monkeypatch):
    monkeypatch.delenv(deepspeed_ops.FOLDER, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    assert deepspeed_ops.choose_folder(tmp_path / "spare") == tmp_path / "spare"


def test_what_anybody_can_write_is_used_only_where_the_user_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "torch_extensions" / "py" / "shm"
    folder.mkdir(parents=True)
    monkeypatch.delenv(deepspeed_ops.FOLDER, raising=False)
    assert deepspeed_ops.choose_folder(tmp_path / "spare") is None
    folder.chmod(0o777)
    assert deepspeed_ops.choose_folder(tmp_path / "spare") == tmp_path / "spare"
    monkeypatch.setenv(deepspeed_ops.FOLDER, str(tmp_path / "torch_extensions"))
    assert deepspeed_ops.choose_folder(tmp_path / "spare") is None


def test_what_others_could_put_into_the_spare_folder_is_removed(tmp_path):
    (tmp_path / "planted").mkdir(parents=True)
    (tmp_path / "planted.so").touch()
    tmp_path.chmod(0o777)
    deepspeed_ops.open_spare_folder(tmp_path, alone=True)
    assert not list(tmp_path.iterdir()) and stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_a_relative_folder_is_the_same_one_wherever_the_compiler_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(deepspeed_ops.FOLDER, "operations")
    assert deepspeed_ops.choose_folder(tmp_path / "spare") is None
    assert os.environ[deepspeed_ops.FOLDER] == str(tmp_path / "operations")


def test_the_batch_script_names_a_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv(deepspeed_ops.FOLDER, "/dev/null/below")
    with pytest.raises(UserError, match="TORCH_EXTENSIONS_DIR: cannot write into '/dev/null/below'"):
        deepspeed_ops.build(load_recipe("tiny_base"))
