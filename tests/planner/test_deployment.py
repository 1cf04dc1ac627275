"""A configuration with which nothing can be planned is refused with a message, and no run is made with it either."""

from __future__ import annotations

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.planner.deployment import Zero, read_zero
from bico_ds.planner.devices import DEVICES
from bico_ds.planner.plan import make_plan
from bico_ds.planner.workload import assumed_texts
from bico_ds.runtime.ds_config import build_ds_config

ZERO = "deepspeed.overrides.zero_optimization"


def zero_of(*overrides: str) -> Zero:
    recipe = load_recipe("llama3_8b_bico", overrides)
    return read_zero(recipe, hidden_size=4096, ranks=8, ranks_per_node=8, on_cuda=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{ZERO}.stage=0", "stage: must be at least 1, found 0"),
        (f"{ZERO}.stage=7", "stage: must be at most 3, found 7"),
        (f"{ZERO}.reduce_bucket_size=0", "reduce_bucket_size: must be at least 1, found 0"),
        (f"{ZERO}.reduce_bucket_size=-5", "reduce_bucket_size: must be at least 1, found -5"),
        (f"{ZERO}.stage3_prefetch_bucket_size=-1", "stage3_prefetch_bucket_size: must be at least 0"),
        (f"{ZERO}.reduce_bucket_size=large", "reduce_bucket_size: cannot plan with 'large'"),
        (f"{ZERO}.offload_optimizer.device=gpu", r"offload_optimizer\.device: 'gpu' is not one of none, cpu"),
        (f"{ZERO}.offload_param.device=[1]", r"offload_param\.device: \[1\] is not one of"),
        ("deepspeed.overrides.data_types.grad_accum_dtype=int8", r"data_types\.grad_accum_dtype: 'int8' is not"),
        ("deepspeed.overrides.communication_data_type=foo", "communication_data_type: 'foo' is not one of fp32"),
    ],
)  # fmt: skip
def test_what_nothing_can_be_planned_with_is_refused_as_it_is_by_a_run(override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        zero_of(override)
    recipe = load_recipe("llama3_8b_bico", [override])
    with pytest.raises(UserError):
        build_ds_config(recipe, hidden_size=4096, world_size=8, on_cuda=True, run_folder=tmp_path)


@pytest.mark.parametrize("override", ["communication_data_type=bf16", "data_types.grad_accum_dtype=null"])
def test_other_types_of_gradients_are_planned(override):
    assert zero_of(f"deepspeed.overrides.{override}") != zero_of()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora={targets: [q_prj]}"], r"'q_prj' in the decoder \(did you mean 'q_proj'\?\)"),
        (["model.lora={rank: 1025}"], r"model\.lora\.rank: 1025 is above the rank of k_proj, which is 1024 x 4096"),
        (["model.config.model_type=[llama]"], r"model_type: '\['llama'\]' is not supported"),
        (["model.config.num_hidden_layers=100000000"], "num_hidden_layers: must be at most 10,000"),
        (["model.config.hidden_size=100"], r"hidden_size: must be a multiple of num_attention_heads \(32\)"),
    ],
)  # fmt: skip
def test_a_model_that_no_run_builds_is_refused(overrides, message):
    recipe = load_recipe("llama3_8b_bico", overrides)
    with pytest.raises(UserError, match=message):
        make_plan(recipe, DEVICES["h200"], nodes=1, ranks_per_node=8, texts=assumed_texts(recipe))
