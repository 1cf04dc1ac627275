"""A billion parameters in several shards, loaded by two ranks: none ever holds more than its half."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.architecture import meta_model, model_config
from bico_ds.model.build import build_model
from bico_ds.model.weights.export_model import write_settings
from bico_ds.model.weights.initialize import RandomWeights
from bico_ds.model.weights.shards import ShardWriter
from tests.distributed.model_ranks import ds_config, run_on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]

ARCHITECTURE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
SLACK = 200 * 10**6  # readers, the process group's buffers, Python objects
BFLOAT16 = 2  # bytes


def write_synthetic(folder: Path) -> None:
    config = model_config(ModelSpec(config=ARCHITECTURE))
    shapes = {name: parameter.shape for name, parameter in meta_model(config).named_parameters()}
    folder.mkdir()
    writer = ShardWriter(folder, shapes, torch.bfloat16, max_shard_bytes=500 * 10**6)
    source = RandomWeights(seed=3, std=0.02)
    for name, shape in shapes.items():
        writer.add(name, source.read(name, shape, 0, shape.numel()).view(shape))
    writer.close()
    write_settings(folder, config, GenerationConfig(), None, torch.bfloat16)


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


class Peak:
    """The highest anonymous memory while the block runs, sampled every few milliseconds."""

    def __enter__(self) -> Peak:
        self.start = self.highest = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def load(rank: int, world_size: int, folder: str) -> None:
    config = ds_config(world_size) | {"bf16": {"enabled": True}}
    torch.distributed.barrier()
    with Peak() as peak:
        model = build_model(ModelSpec(path=folder), seed=1, ds_config=config, device="cpu")
    sizes = [parameter.ds_numel for parameter in model.parameters()]
    assert sum(sizes) > 1e9
    partition, largest_slice = BFLOAT16 * sum(sizes) / world_size, BFLOAT16 * max(sizes) / world_size
    growth = peak.highest - peak.start
    print(f"rank {rank}: partition {partition / 1e6:.0f} MB, peak growth {growth / 1e6:.0f} MB", flush=True)
    assert partition < growth < partition + 2 * largest_slice + SLACK


def test_each_of_two_ranks_holds_its_half_of_a_billion_parameters(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 4
    run_on_ranks(load, 2, str(tmp_path / "model"))
