"""Each optimizer of the table has the properties that torch and DeepSpeed find."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

from bico_ds.common.errors import UserError
from bico_ds.optim.state import step_counts
from bico_ds.optim.table import OPTIMIZERS, kind_named, kind_of, kind_running

KINDS = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.ds_types[0])


def running(kind) -> torch.optim.Optimizer:
    """The kind as it runs on a CPU, with a master of 7 elements, after an update."""
    parameter = torch.nn.Parameter(torch.ones(7))
    parameters = kind.ds_parameters(kind.spec(), on_cuda=False)
    del parameters["torch_adam"]  # DeepSpeed takes it out
    optimizer = next(cls for cls in kind.classes if cls.__name__ == kind.ds_types[0])(
        [parameter], **parameters
    )
    parameter.square().sum().backward()
    optimizer.step()
    return optimizer


@KINDS
def test_an_optimizer_keeps_the_moments_and_bytes_that_its_table_says(kind):
    optimizer = running(kind)
    (state,) = optimizer.state.values()
    moments = {name: t.element_size() for name, t in state.items() if t.numel() == 7}
    assert moments == kind.spec.state.moments
    assert kind.spec.state.bytes_per_parameter == 4 + sum(moments.values())
    assert step_counts(optimizer) == [1]


@KINDS
def test_its_hyperparameters_are_keys_of_the_recipe_and_of_the_optimizers_groups(kind):
    values = kind.hyperparameters(kind.spec())
    assert set(values) == set(kind.spec.model_fields)
    (group,) = running(kind).param_groups
    assert {key: list(group[key]) if key == "betas" else group[key] for key in values} == values
    assert set(kind.refused) <= set(group), "a refused parameter is one that the optimizer has"


@KINDS
def test_an_optimizer_is_found_by_its_section_its_names_and_what_runs(kind):
    assert kind_of(kind.spec()) is kind
    assert kind_running(running(kind)) is kind
    for name in kind.ds_types:
        assert name.lower() in DEEPSPEED_OPTIMIZERS
        assert kind_named(name.upper(), "FILE") is kind


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'AdamX' is not one of AdamW, Adam .*'Adam'.* in FILE"):
        kind_named("AdamX", "FILE")
