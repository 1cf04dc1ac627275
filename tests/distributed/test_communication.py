"""HpZ's second partitions and gradients reduced in bf16, on real ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from bico_ds.model.weights.materialize import gathered, materialize
from tests.distributed.model_ranks import causal_batch, run_on_ranks
from tests.distributed.test_ds_keys import engine_of, loaded, saved, train_step
from tests.distributed.test_planned_communication import count_sent

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def second_copies(rank: int, world_size: int, root: str) -> None:
    """Three steps with and without hpZ, then a resume by an engine whose second copies are of other weights."""
    folder, hpz = Path(root), "zero_hpz_partition_size=2"

    def made(*overrides: str, seed: int = 3) -> Any:
        return engine_of(3, folder, *overrides, ranks=world_size, seed=seed)

    divided, plain = made(hpz), made()
    for step in range(3):
        found, expected = train_step(divided, rank, step), train_step(plain, rank, step)
        assert found == pytest.approx(expected, rel=1e-5), step
    sums = saved(divided, folder, 3)
    resumed = loaded(made(hpz, seed=4), folder, 3, sums)
    for step in (3, 4):
        found, expected = train_step(resumed, rank, step), train_step(plain, rank, step)
        assert found == pytest.approx(expected, rel=1e-5), step


def test_hpz_trains_and_resumes_as_zero_3_does_from_the_first_step(tmp_path):
    """DeepSpeed#7606: after a resume second copies were those of the weights before it, and the first loss was too high."""
    run_on_ranks(second_copies, 4, str(tmp_path))


class Counting:
    """Weights that are their own positions."""

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, dtype=torch.float32)


def small_weights(rank: int, world_size: int, sizes: list[int]) -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": world_size}
    with torch.device("meta"):
        norms = [nn.RMSNorm(size) for size in sizes]
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    materialize(nn.ModuleList(norms), Counting(), ds_config=config, device=torch.device("cpu"))
    for size, norm in zip(sizes, norms, strict=True):
        assert hasattr(norm.weight, "ds_secondary_tensor")
        with gathered((norm.weight,)):
            assert norm.weight.tolist() == list(range(size)), size


def test_hpz_divides_weights_of_which_a_rank_has_nothing():
    """DeepSpeed#8210: of one or two elements the third and the fourth of four ranks have none."""
    run_on_ranks(small_weights, 4, [1, 2, 5, 6, 64])


STEPS = 20


def in_both_types(rank: int, world_size: int, root: str, stage: int) -> None:
    """The same steps with gradients on the way in fp32 and in bf16: bytes, the first step's gradients, losses."""
    found: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    count_sent(counts)
    for dtype in ("fp32", "bf16"):
        settings = ("model.dtype=bf16", f"deepspeed.overrides.communication_data_type={dtype}")
        engine = engine_of(stage, Path(root), ranks=world_size, settings=settings)
        counts.clear()
        loss = engine(causal_batch(rank, [12, 7], 17)).loss
        engine.backward(loss)
        sent = counts["reduce_scatter_tensor"] + counts["all_reduce"]
        gradients = [safe_get_full_grad(parameter).double().flatten() for parameter in engine.parameters()]
        engine.step()
        losses = [loss.item(), *(train_step(engine, rank, step)[0] for step in range(1, STEPS))]
        found[dtype] = (sent, torch.cat(gradients), losses)
    (exact_bytes, exact, exact_losses), (fewer, near, losses) = found["fp32"], found["bf16"]
    if rank == 0:
        (Path(root) / "found.json").write_text(
            json.dumps(
                {
                    "bytes": fewer / exact_bytes,
                    "gradient": float((near - exact).norm() / exact.norm()),
                    "loss": max(abs(a / b - 1) for a, b in zip(losses, exact_losses, strict=True)),
                }
            )
        )


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_in_bf16_are_half_the_bytes_and_round_once_between_two_ranks(tmp_path, stage):
    run_on_ranks(in_both_types, 2, str(tmp_path), stage)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bytes"] == 0.5
    # One sum of two is rounded to 8 bits: at most 2^-9 of an element, but for those that cancel.
    assert 2**-12 < found["gradient"] < 2**-8
    assert found["loss"] < 0.01
