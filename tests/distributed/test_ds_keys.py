"""Each key of DeepSpeed's ZeRO that a recipe may set trains as without it, on two real ranks, and takes over checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.utils import groups

from bico_ds.checkpoint.state_checksums import Checksums, differences, state_checksums
from bico_ds.config.load import load_recipe
from bico_ds.model.build import build_model
from bico_ds.runtime.ds_config import build_ds_config
from bico_ds.runtime.ds_keys import PROVEN
from bico_ds.training.build_engine import wrap_model
from tests.distributed.model_ranks import VOCABULARY, causal_batch, run_on_ranks

pytestmark = pytest.mark.distributed

STEPS = 40  # more than the cases make
# By stage: a value that is not the shipped one. A weight of this model has 2,048 elements.
CASES: dict[int, tuple[str, ...]] = {
    2: (
        "contiguous_gradients=false",
        "overlap_comm=true",
        "reduce_scatter=false",
        "reduce_bucket_size=1500",
        "allgather_bucket_size=1500",
        "use_multi_rank_bucket_allreduce=false",
        "ignore_unused_parameters=false",
    ),
    3: (
        "contiguous_gradients=false",
        "overlap_comm=true",
        "reduce_scatter=false",
        "reduce_bucket_size=1500",
        "stage3_prefetch_bucket_size=0",
        "stage3_param_persistence_threshold=0",
        "stage3_model_persistence_threshold=1000",
        "stage3_max_live_parameters=0",
        "stage3_max_reuse_distance=0",
        "stage3_use_all_reduce_for_fetch_params=true",
        "stage3_allgather_sequential=true",
        "zero_hpz_partition_size=2",
        "log_trace_cache_warnings=true",
        "enable_sanity_checks=true",
    ),
}
# Proven elsewhere: stage and sub_group_size by conversions (test_survival*), the offloads by the slow tests.
ELSEWHERE = {"stage", "sub_group_size", "offload_optimizer", "offload_param"}


def engine_of(
    stage: int, folder: Path, *overrides: str, ranks: int = 2, seed: int = 3, settings: tuple[str, ...] = ()
) -> Any:
    """`overrides`: of `zero_optimization`; `settings`: others of the recipe."""
    recipe = load_recipe(
        "tiny_base",
        [
            f"model.config.vocab_size={VOCABULARY}", "model.config.hidden_size=32", "model.config.head_dim=8",
            "model.config.num_attention_heads=4", "model.config.num_hidden_layers=2",
            "model.config.intermediate_size=64", "training.micro_batch_bins=1",
            f"training.global_batch_bins={ranks}", f"training.steps={STEPS}", "schedule.warmup_steps=1",
            "schedule.decay_steps=2", f"deepspeed.config=zero{stage}_bf16",
            *(f"deepspeed.overrides.zero_optimization.{override}" for override in overrides), *settings,
        ],
    )  # fmt: skip
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes the groups of hpZ once per process
    config = build_ds_config(recipe, world_size=ranks, hidden_size=32, on_cuda=False, run_folder=folder)
    model = build_model(recipe.model, seed=seed, ds_config=config, device="cpu")
    return wrap_model(model, recipe, config, STEPS)


def train_step(engine: Any, rank: int, step: int) -> tuple[float, float]:
    """Loss and gradient norm."""
    loss = engine(causal_batch(2 * step + rank, [12, 7], 17)).loss
    engine.backward(loss)
    engine.step()
    return loss.item(), float(engine.get_global_grad_norm())


def saved(engine: Any, folder: Path, step: int) -> Checksums:
    engine.save_checkpoint(str(folder), tag=str(step))
    return state_checksums(engine)


def loaded(engine: Any, folder: Path, step: int, expected: Checksums) -> Any:
    engine.load_checkpoint(str(folder), tag=str(step))
    assert differences(state_checksums(engine), expected) == []
    return engine


def every_key(rank: int, world_size: int, root: str, stage: int) -> None:
    """Each case takes over from the one before it, then from itself: a step each, against a run without any of them."""
    folder, plain = Path(root), engine_of(stage, Path(root))
    train_step(plain, rank, 0)
    sums, step = saved(plain, folder, 0), 1
    for override in CASES[stage]:
        for _ in range(2):
            changed = loaded(engine_of(stage, folder, override), folder, step - 1, sums)
            found, expected = train_step(changed, rank, step), train_step(plain, rank, step)
            assert found == pytest.approx(expected, rel=1e-5), override
            sums, step = saved(changed, folder, step), step + 1
    found = train_step(loaded(engine_of(stage, folder), folder, step - 1, sums), rank, step)
    assert found == pytest.approx(train_step(plain, rank, step), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", CASES)
def test_an_accepted_key_of_zero_changes_neither_training_nor_resumes(tmp_path, stage):
    run_on_ranks(every_key, 2, str(tmp_path), stage)


def test_every_accepted_key_is_among_the_cases():
    keys = {override.partition("=")[0] for cases in CASES.values() for override in cases}
    assert keys | ELSEWHERE == set(PROVEN["zero_optimization"].keys)
