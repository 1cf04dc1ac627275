"""What a dry run says is missing on this machine: each thing once, with its key and what to do."""

from __future__ import annotations

import pytest
import torch
from torch.utils import cpp_extension

from bico_ds.cluster.preflight import missing as module
from bico_ds.cluster.preflight.missing import what_is_missing
from bico_ds.config.load import load_recipe


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_recipe_that_can_start_here_lacks_nothing():
    assert what_is_missing(load_recipe("tiny_base")) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.path=runs/tiny_base/export"], "a run exports it at its end: train that one first"),
        (["model.path=models/llama"], "model.path (models/llama): not there; fetch it there, or give a hub name"),
        (["model.tokenizer=models/llama"], "model.tokenizer (models/llama): not there; fetch it"),
        (["model.path=owner/none"], "model.path (owner/none): not in this machine's cache of the hub; a start downloads it"),
        (["data.sources=[{store: stores/x}]"], "data.sources.0.store (stores/x): not there; correct the path"),
        (["data.sources=[{files: [x.jsonl]}]"], "data.sources.0.files (x.jsonl): input 'x.jsonl' does not exist; correct"),
        (["evaluation={folder: questions, tasks: [n2d]}"], "evaluation.folder (questions): not there; correct the path"),
        (["model.path=${NO_SUCH}/x"], "model.path: '${NO_SUCH}/x': the environment variable NO_SUCH is not set"),
        (["distributed.gpu=h100-80g"], "GPU (distributed.gpu: h100-80g): torch"),
    ],
)  # fmt: skip
def test_each_thing_is_named_with_its_key_and_what_to_do(overrides, expected, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    (line,) = what_is_missing(load_recipe("tiny_base", overrides))
    assert expected in line


def test_all_variables_are_named_at_once_and_secrets_are_not_shown(monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    recipe = load_recipe("tiny_base", ["output_dir=$NO_SUCH/run", "data.sources=[{store: '${NO_SUCH}/x'}]"])
    lines = what_is_missing(recipe)
    assert len(lines) == 2
    for path in ("${NO_SUCH}/x", "$NO_SUCH/run"):
        assert any(f"'{path}': the environment variable NO_SUCH is not set" in line for line in lines)
    secret = "https://me:abc123@host/x"
    lines = what_is_missing(load_recipe("tiny_base", [f"data.sources=[{{store: '{secret}'}}]"]))
    assert len(lines) == 1 and "abc123" not in lines[0]


def test_a_missing_compiler_and_cuda_toolkit_are_told_where_something_is_to_be_compiled(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (line,) = what_is_missing(load_recipe("tiny_base"))
    assert line.startswith("C++ compiler: 'no-such-compiler' is not found, and the first run compiles ")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for home, expected in (
        (None, "no CUDA toolkit is found"),
        (str(tmp_path), f"'{tmp_path}/bin/nvcc' is not there"),
    ):
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
        (line,) = what_is_missing(load_recipe("tiny_base"))
        assert line.startswith(f"CUDA_HOME: {expected}, and the first run compiles ")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    assert what_is_missing(load_recipe("tiny_base")) == []


def test_fewer_gpus_than_ranks_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(module, "_compilers", lambda recipe: iter(()))
    recipe = load_recipe("tiny_base", ["distributed.gpu=h100-80g", "distributed.world_size=16"])
    (line,) = what_is_missing(recipe)
    assert line.startswith("GPUs (distributed.world_size: 16): 4 on this machine; ")
    assert (
        what_is_missing(load_recipe("tiny_base", ["distributed.gpu=h100-80g", "distributed.world_size=4"]))
        == []
    )
