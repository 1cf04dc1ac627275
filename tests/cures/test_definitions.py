"""The definitions themselves: next-token prediction is Hugging Face's, and the others are what the papers draw."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.cures import comparing, definitions
from tests.cures.comparing import Trained, difference
from tests.cures.definitions import Rows

ABCDEF, MASKED = [10, 11, 12, 13, 14, 15], [False, True, True, False, True, False]


def seen(rows: Rows) -> list[str]:
    """Of each row, the keys that it has."""
    return ["".join("x" if key else "." for key in keys) for keys in rows.sees]


def test_the_causal_loss_and_its_gradients_are_hugging_faces() -> None:
    config = LlamaConfig(**{k: v for k, v in comparing.SHAPE.items() if k != "model_type"})
    theirs = LlamaForCausalLM(config).double()
    tokens = torch.randint(0, comparing.VOCABULARY, (1, 23))
    loss = theirs(tokens, labels=tokens).loss
    loss.backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in theirs.named_parameters()}
    llama = definitions.Llama(
        weights=weights, heads=4, key_value_heads=2, rope_theta=comparing.ROPE_THETA, eps=comparing.EPS
    )
    ours = definitions.batch_loss(llama, [definitions.ntp(tokens[0].tolist())])
    ours.backward()
    torch.testing.assert_close(loss.double(), ours, rtol=1e-5, atol=0)
    none = torch.zeros(0)
    found, expected = (
        Trained(loss=mean.detach(), gradients=gradients, losses=none, weights=none)
        for mean, gradients in (
            (loss, {name: p.grad for name, p in theirs.named_parameters()}),
            (ours, {name: weight.grad for name, weight in weights.items()}),
        )
    )
    # Theirs has norms, angles and the loss in fp32 all the same. Most gradients are within 3e-6; drawn scores that lie far
    # apart may make it thirty times that, and a fault of the formula makes it 1e-3 at least.
    assert difference(found, expected) < 1e-3


def test_a_placeholder_is_nobodys_key_and_its_token_is_predicted_before_it_or_at_it() -> None:
    rows = definitions.bico(ABCDEF, MASKED, 0)
    assert rows.tokens == [10, 0, 0, 13, 0, 15]
    assert seen(rows) == ["x..x.x"] * 6
    assert rows.predicts == [11, 12, None, 14, None, None]
    assert definitions.bico(ABCDEF, MASKED, 0, predict="same").predicts == [None, 11, 12, None, 14, None]


def test_a_document_of_mlm_u_weighs_one_and_one_without_a_mask_nothing() -> None:
    assert definitions.mlm_u(ABCDEF, MASKED, 0, predict="same").weight * sum(MASKED) == 1
    assert definitions.mlm_u(ABCDEF, [False] * 6, 0, predict="next").weight == 0


def test_a_blank_sees_what_is_kept_and_itself_so_far() -> None:
    rows = definitions.abi(ABCDEF, MASKED, spans="separate")
    assert rows.tokens == ABCDEF
    assert seen(rows) == ["x..x.x", "xx.x.x", "xxxx.x", "x..x.x", "x..xxx", "x..x.x"]
    assert rows.predicts == [11, 12, None, 14, None, None]
    one_sequence = definitions.abi(ABCDEF, MASKED, spans="left_to_right")
    assert seen(one_sequence) == ["x..x.x", "xx.x.x", "xxxx.x", "x..x.x", "xxxxxx", "x..x.x"]
    assert one_sequence.predicts == rows.predicts


def test_words_change_places_and_keep_their_order_inside() -> None:
    words = [True, False, True, False, True]
    parts = definitions.segments([11, 12, 13, 14, 15], words, entities=[])
    rows = definitions.reverse(parts, first=[1], last=[2])
    assert rows.tokens == [1, 15, 13, 14, 11, 12, 2]
    assert rows.predicts == [15, 13, 14, 11, 12, 2, None]
    assert definitions.segments([11, 12, 13, 14, 15], words, entities=[(1, 3)]) == [[11, 12, 13, 14], [15]]


def test_the_text_follows_its_masked_copy_and_is_all_that_is_predicted() -> None:
    rows = definitions.masked_ft([1, 11, 2], [False, True, False], mask_id=0, instruction=[7], separator=[8])
    assert rows.tokens == [7, 1, 0, 2, 8, 1, 11, 2]
    assert rows.predicts == [None, None, None, None, 1, 11, 2, None]


def test_a_key_behind_the_query_is_turned_as_one_before_it() -> None:
    """The score of two rows that see each other is the same both ways where their q and k are."""
    rows = definitions.bico([5, 6, 7, 8], [False] * 4, 0)
    model = comparing.tiny_llama("oracle")
    llama = comparing.of_the_definitions(model)
    forward = definitions.hidden_states(llama, rows)
    mirrored = definitions.bico([8, 7, 6, 5], [False] * 4, 0)
    torch.testing.assert_close(
        definitions.hidden_states(llama, mirrored).flip(0), forward, rtol=0, atol=1e-12
    )
