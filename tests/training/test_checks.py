"""What is refused before data is prepared and weights are loaded: shapes, adapters, DeepSpeed's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bico_ds.checkpoint.manifest import FoundCheckpoint
from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.training.checks import check_recipe, refuse_fewer_steps


def check(tmp_path, *overrides: str) -> None:
    recipe = load_recipe("tiny_base", overrides)
    check_recipe(recipe, world_size=1, on_cuda=False, run_folder=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora={rank: 100000}"], r"model\.lora\.rank: 100000 is above the rank of q_proj, .* 128 x 128"),
        (["model.lora={rank: 129}"], "give at most 128"),
        (
            ["model.lora={rank: 65, targets: [k_proj]}", "model.config.num_key_value_heads=1"],
            "above the rank of k_proj, which is 64 x 128",
        ),
        (["model.lora={targets: [lm_head]}"], "no linear layer 'lm_head'"),
        (["model.config.attention_dropout=0.1"], "attention_dropout 0.1"),
        (["model.config.head_dim=12"], "kernels need a multiple of 8"),
        (["deepspeed.overrides.zero_optimization.stage=0"], "give 1, 2 or 3"),
        (["deepspeed.overrides.zero_optimization.stage=true"], "stage: must be a number, found True"),
        (["deepspeed.overrides.zero_optimization.stage='2'"], "stage: must be a number, found '2'"),
        (["deepspeed.overrides.zero_optimization.reduce_bucket_size=1000000000000000000"], "so many numbers is alloc"),
        (["deepspeed.overrides.zero_optimization.reduce_bucket_size=true"], "must be a number, found True"),
        (["deepspeed.overrides.zero_optimization.sub_group_size=.inf"], "must be a finite number"),
    ],
)  # fmt: skip
def test_what_needs_the_model_s_shape_is_refused_before_the_data(tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        check(tmp_path, *overrides)
    assert list(tmp_path.iterdir()) == []


def test_adapters_as_large_as_the_matrix_are_accepted(tmp_path):
    check(tmp_path, "model.lora={rank: 128}")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.steps=5"], "training.steps: 5 steps are fewer than the 8 of the checkpoint 'step-000008'"),
        (["training.steps=null", "training.epochs=0.5"], "training.epochs: 0.5 epochs are 5 steps, which are fewer"),
    ],
)  # fmt: skip
def test_a_run_that_would_end_before_its_checkpoint_is_refused_with_both_numbers(overrides, says):
    found = FoundCheckpoint(Path("step-000008"), {"step": 8}, 0)
    recipe = load_recipe("tiny_base", overrides)
    with pytest.raises(UserError, match=says):
        refuse_fewer_steps(recipe, 5, found)
    refuse_fewer_steps(recipe, 8, found)
