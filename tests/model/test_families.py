"""What the table has for each model family is true of transformers' model of that name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from bico_ds.common.errors import UserError
from bico_ds.model.architecture import meta_model
from bico_ds.model.families import FAMILIES, family_of
from bico_ds.model.swap import check_attention

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 131,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_modules_of_a_family_are_of_the_classes_in_its_entry(name):
    family, decoder = FAMILIES[name], meta_model(AutoConfig.for_model(name, **SHAPE)).model
    layer = decoder.layers[0]
    found = type(layer.self_attn), type(layer), type(layer.mlp)
    assert found == (family.attention, family.layer, family.mlp)
    norms = [layer.input_layernorm, layer.post_attention_layernorm, decoder.norm]
    if family.qk_norms:
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
    assert {type(norm) for norm in norms} == {family.norm}
    assert {id(norm) for norm in norms} == {id(m) for m in decoder.modules() if type(m) is family.norm}


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_are_where_the_entry_says(name):
    attention = meta_model(AutoConfig.for_model(name, **SHAPE)).model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert (projection.bias is not None) == FAMILIES[name].qkv_bias
    assert attention.o_proj.bias is None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_is_refused_in_the_families_that_heed_one(name):
    config = AutoConfig.for_model(name, **SHAPE)
    assert hasattr(config, "sliding_window") == FAMILIES[name].has_window
    config.use_sliding_window, config.sliding_window = True, 16
    check_attention(config, longest_document=16)
    if FAMILIES[name].has_window:
        with pytest.raises(UserError, match="sliding window of 16 tokens, but documents are of up to 17"):
            check_attention(config, longest_document=17)
    else:
        check_attention(config, longest_document=17)


def test_another_model_type_is_refused_with_those_that_are_known():
    with pytest.raises(UserError, match=f"'gpt2' is not supported.*: {', '.join(FAMILIES)}"):
        family_of("gpt2")
    with pytest.raises(UserError, match="'gpt2' is not supported"):
        check_attention(SimpleNamespace(model_type="gpt2"))
