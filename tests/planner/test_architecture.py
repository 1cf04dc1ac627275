"""Shapes read without transformers are those of the model that transformers builds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bico_ds.common.errors import UserError
from bico_ds.config.load import list_recipes, load_recipe
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.model.architecture import meta_model, model_config, parameter_count
from bico_ds.model.families import FAMILIES
from bico_ds.model.lora import add_lora
from bico_ds.planner.architecture import _DEFAULTS, Architecture, architecture_of, read_architecture


def of_transformers(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one decoder layer's parameters, and the count of all."""
    model = meta_model(model_config(spec))
    return {name: tuple(p.shape) for name, p in model.model.layers[0].named_parameters()}


def of_planner(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    room = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn") | dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), "mlp"
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in architecture.linears:
        name = f"{room[linear.name]}.{linear.name}"
        shapes[f"{name}.weight"] = (linear.outputs, linear.inputs)
        if linear.bias:
            shapes[f"{name}.bias"] = (linear.outputs,)
    return shapes


def random_config(family: str, rng: np.random.Generator) -> dict[str, object]:
    key_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    heads, head_dim = key_heads * group, 8 * int(rng.integers(1, 4))
    config: dict[str, object] = {
        "model_type": family,
        "vocab_size": int(rng.integers(50, 300)),
        "hidden_size": heads * head_dim,
        "intermediate_size": int(rng.integers(8, 200)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "tie_word_embeddings": bool(rng.integers(2)),
    }
    if family != "qwen2" and rng.integers(2):
        config["head_dim"] = 8 * int(rng.integers(1, 4))
    if family == "llama":
        config |= {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))}
    if family == "qwen3":
        config |= {"attention_bias": bool(rng.integers(2))}
    return config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_random_configs_have_the_shapes_and_the_count_of_transformers(family, seed):
    spec = ModelSpec(config=random_config(family, np.random.default_rng(seed)))
    architecture = read_architecture(spec)
    expected = of_transformers(spec)
    norms = {name: shape for name, shape in expected.items() if "norm" in name}
    assert of_planner(architecture) == {k: v for k, v in expected.items() if k not in norms}
    assert architecture.norm_elements == sum(np.prod(shape) for shape in norms.values())
    assert architecture.parameters == parameter_count(model_config(spec))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_names_its_family_alone_has_the_defaults_of_transformers(family):
    spec = ModelSpec(config={"model_type": family, "num_hidden_layers": 1})
    assert read_architecture(spec).parameters == parameter_count(model_config(spec))


def test_the_planner_knows_the_families_that_can_be_trained():
    assert set(_DEFAULTS) == set(FAMILIES)


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_has_the_parameters_of_transformers(name):
    spec = load_recipe(name).model.model_copy(update={"path": None})
    if spec.config is None:
        pytest.skip("its architecture is that of the folder that another recipe exports")
    assert read_architecture(spec).parameters == parameter_count(model_config(spec))


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj", "down_proj"], LoraSpec().targets])
def test_adapters_have_the_elements_that_peft_gives_them(targets):
    lora = LoraSpec(rank=4, targets=targets)
    spec = ModelSpec(config=random_config("llama", np.random.default_rng(7)), lora=lora)
    architecture = read_architecture(spec)
    model = meta_model(model_config(spec))
    add_lora(model, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert architecture.adapter_parameters(lora) == architecture.trained_parameters(lora) == trained
    assert architecture.trained_parameters(None) == architecture.parameters


def test_the_folder_counts_where_it_is_here(tmp_path):
    config = random_config("llama", np.random.default_rng(3)) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = ModelSpec(path=str(tmp_path), config=dict(config) | {"num_hidden_layers": 2})
    assert read_architecture(spec).layers == 3
    assert read_architecture(spec).source == f"{tmp_path}/config.json"
    elsewhere = spec.model_copy(update={"path": ModelSpec(path="models/not-here").path})
    assert read_architecture(elsewhere).layers == 2
    assert read_architecture(elsewhere).source == "model.config"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"hidden_size": "4096"}, "hidden_size: must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be a whole number of at least 1"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": True}, "vocab_size"),
    ],
)
def test_values_that_make_no_shapes_are_refused_by_key(values, says):
    with pytest.raises(UserError, match=says):
        architecture_of(values, source="model.config")


def test_without_folder_and_config_there_is_nothing_to_plan():
    with pytest.raises(UserError, match="models/not-here"):
        read_architecture(ModelSpec(path="models/not-here"))


def test_the_dtype_of_a_count_is_exact():
    """70.55 B parameters overflow no float: counts are Python integers."""
    count = read_architecture(load_recipe("llama70b_bico").model).parameters
    assert isinstance(count, int) and count == 70_553_706_496
    assert torch.Size([count]).numel() == count
