"""Our op inside Hugging Face models computes what they compute, and BICO's losses are those of the dense formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from bico_ds.attention.oracle import dense_attention
from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.families import FAMILIES

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 131,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


def model_of(model_type: str = "llama", *, checkpointing: int = 0, **values: object) -> TrainableModel:
    spec = ModelSpec(
        config=SHAPE | {"model_type": model_type, "max_position_embeddings": 512} | values,
        dtype="fp32",
        activation_checkpointing=checkpointing,
        loss_chunk_rows=7,
    )
    return build_model(spec, seed=1, ds_config=None, device="cpu", longest_document=64)


def gradients(model: TrainableModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ntp_batch(documents: list[Tensor]) -> PackedBatch:
    lengths = [len(document) for document in documents]
    ids = torch.cat(documents)
    last = torch.tensor(lengths).cumsum(0) - 1
    rows = torch.tensor([row for row in range(len(ids)) if row not in set(last.tolist())])
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        plan=build_plan("causal", kept_lengths=lengths),
        loss_rows=rows,
        targets=ids[rows + 1],
        represented_tokens=len(ids),
        documents=torch.zeros(len(lengths), 3, dtype=torch.int64),
    )


# What a family can be besides its defaults; each is tested as it is, too.
VARIANTS = {
    "llama": [
        {"attention_bias": True},
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True},
    ],
    "mistral": [{"sliding_window": 64}],
    "qwen3": [{"head_dim": 16}],
}


@pytest.mark.parametrize(
    ("model_type", "values"),
    [(name, values) for name in FAMILIES for values in ({}, *VARIANTS.get(name, []))],
    ids=str,
)
def test_ntp_through_our_op_is_hugging_faces_own_forward(model_type: str, values: dict) -> None:
    model = model_of(model_type, **values)
    torch.manual_seed(2)
    documents = [torch.randint(0, 131, (length,)) for length in (1, 40, 17)]
    ours = model(ntp_batch(documents)).loss
    theirs = sum(
        cross_entropy(model.causal_lm(d[None]).logits[0, :-1], d[1:], reduction="sum")
        for d in documents
        if len(d) > 1
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours_by_name, theirs_by_name = gradients(model, ours), gradients(model, theirs)
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, gradient in ours_by_name.items():
        torch.testing.assert_close(gradient, theirs_by_name[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_without_a_plan_the_forward_is_bitwise_hugging_faces_own(model_type: str) -> None:
    swapped = model_of(model_type).causal_lm
    plain = AutoModelForCausalLM.from_config(swapped.config)
    plain.load_state_dict(swapped.state_dict())
    tokens = torch.randint(0, 131, (2, 11))
    assert torch.equal(swapped(tokens).logits, plain(tokens).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(swapped.generate(tokens, **options), plain.generate(tokens, **options))


def masked_document(length: int, rate: float) -> tuple[Tensor, Tensor]:
    masked = torch.rand(length) < rate
    masked[0] = False
    return torch.randint(0, 131, (length,)), masked


def bico_batch(documents: list[tuple[Tensor, Tensor]], placeholder: int, *, drop_dead: bool) -> PackedBatch:
    """BICO's batch, by loops over tokens; with `drop_dead` off, dead placeholders are query-only rows of it."""
    kept, extra, kept_lengths, live_document, live_split = [], [], [], [], []
    for index, (ids, masked) in enumerate(documents):
        kept_lengths.append(int((~masked).sum()))
        for position in range(len(ids)):
            target = int(ids[position + 1]) if position + 1 < len(ids) and masked[position + 1] else None
            if not masked[position]:
                kept.append((int(ids[position]), position, target))
            elif target is not None or not drop_dead:
                extra.append((placeholder, position, target))
                live_document.append(index)
                live_split.append(int((~masked[: position + 1]).sum()))
    rows = kept + extra
    predicted = [(row, target) for row, (_, _, target) in enumerate(rows) if target is not None]
    return PackedBatch(
        input_ids=torch.tensor([row[0] for row in rows]),
        position_ids=torch.tensor([row[1] for row in rows]),
        plan=build_plan(
            "bidirectional", kept_lengths=kept_lengths, live_document=live_document, live_split=live_split
        ),
        loss_rows=torch.tensor([row for row, _ in predicted]),
        targets=torch.tensor([target for _, target in predicted]),
        represented_tokens=sum(len(ids) for ids, _ in documents),
        documents=torch.zeros(len(documents), 3, dtype=torch.int64),
    )


def dense_bico_loss(model: TrainableModel, ids: Tensor, masked: Tensor, placeholder: int) -> Tensor:
    """BICO's loss of one document without drops, layer by layer from the paper's formula and the weights alone."""
    decoder, family = model.causal_lm.model, FAMILIES[model.config.model_type]
    hidden = decoder.embed_tokens(torch.where(masked, placeholder, ids))
    position = torch.arange(len(ids))
    cos, sin = (table[0] for table in decoder.rotary_emb(hidden[None], position[None]))
    for layer in decoder.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (
            linear(normed).view(len(ids), -1, attention.head_dim)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if family.qk_norms:
            q, k = attention.q_norm(q), attention.k_norm(k)
        document = torch.zeros_like(position)
        out = dense_attention(
            q, k, v, cos, sin, document=document, position=position, is_key=~masked, causal=False
        )
        hidden = hidden + attention.o_proj(out.flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits = decoder.norm(hidden) @ model.causal_lm.lm_head.weight.T
    predicts = masked[1:]
    return cross_entropy(logits[:-1][predicts], ids[1:][predicts], reduction="sum")


@pytest.mark.parametrize(
    ("model_type", "rate", "checkpointing"), [("llama", 0.15, 0), *((name, 0.5, 2) for name in FAMILIES)]
)
def test_dropping_dead_placeholders_changes_nothing(model_type: str, rate: float, checkpointing: int) -> None:
    torch.manual_seed(int(rate * 100))
    model = model_of(model_type, checkpointing=checkpointing).double()
    documents = [masked_document(length, rate) for length in (1, 30, 50, 9)]
    batches = [bico_batch(documents, placeholder=3, drop_dead=drop_dead) for drop_dead in (True, False)]
    assert len(batches[0].input_ids) < len(batches[1].input_ids) == batches[0].represented_tokens
    dense = sum(dense_bico_loss(model, ids, masked, placeholder=3) for ids, masked in documents)
    expected = gradients(model, dense)
    for batch in batches:
        loss = model(batch).loss
        torch.testing.assert_close(loss, dense, rtol=1e-12, atol=0)
        for name, gradient in gradients(model, loss).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_one_document_changes_no_bit_of_anothers_hidden_states() -> None:
    torch.manual_seed(4)
    model = model_of()
    documents = [masked_document(length, 0.4) for length in (20, 31, 12)]
    batch = bico_batch(documents, placeholder=3, drop_dead=True)
    other = PackedBatch(**{**vars(batch), "input_ids": batch.input_ids.clone()})
    start, end = batch.plan.cu_seqlens[1:3].tolist()
    other.input_ids[start:end] = (other.input_ids[start:end] + 1) % 131
    changed = (model._hidden(batch) != model._hidden(other)).any(-1)
    live = batch.plan.live_document == 1
    own = torch.cat(
        [(torch.arange(batch.plan.num_kept) >= start) & (torch.arange(batch.plan.num_kept) < end), live]
    )
    assert torch.equal(changed, own)


def test_every_loss_row_count_lets_every_parameter_take_part_in_the_backward() -> None:
    model = model_of()
    batch = ntp_batch([torch.arange(9)])
    empty = PackedBatch(**{**vars(batch), "loss_rows": batch.loss_rows[:0], "targets": batch.targets[:0]})
    for weights in (None, torch.ones(0)):
        loss = model(replace(empty, loss_weights=weights)).loss
        assert loss == 0.0
        assert loss.dtype == torch.float32
        found = gradients(model, loss)
        assert found.keys() == dict(model.named_parameters()).keys()
        assert all((gradient == 0).all() for gradient in found.values())


def test_the_model_s_loss_and_gradients_are_those_of_its_targets_by_the_batch_s_weights() -> None:
    model = model_of().double()
    batch = ntp_batch([torch.arange(9)])
    weights = torch.rand(len(batch.targets))
    ones = [
        replace(batch, loss_rows=batch.loss_rows[n : n + 1], targets=batch.targets[n : n + 1])
        for n in range(len(weights))
    ]
    expected = sum(weight * model(one).loss for weight, one in zip(weights, ones, strict=True))
    loss = model(replace(batch, loss_weights=weights)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    wanted = gradients(model, expected)
    for name, gradient in gradients(model, loss).items():
        # Hugging Face's norms compute in fp32 whatever the dtype: of the largest entry 2e-7 was seen.
        allowed = 1e-6 * float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=allowed)


def test_architectures_that_our_op_cannot_serve_are_refused() -> None:
    with pytest.raises(UserError, match=rf"'gpt2' is not supported.*: {', '.join(FAMILIES)}\."):
        build_model(ModelSpec(config={"model_type": "gpt2"}), seed=1, ds_config=None, device="meta")
    with pytest.raises(UserError, match="sliding window of 32 tokens, but documents are of up to 64"):
        model_of("mistral", sliding_window=32)
    for rope in (DYNAMIC_ROPE, LONGROPE):
        with pytest.raises(UserError, match=f"type '{rope['rope_type']}', whose frequencies depend on"):
            model_of(rope_parameters=rope)
    with pytest.raises(UserError, match="type 'proportional', which turns a part of each head"):
        model_of(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4})
    with pytest.raises(UserError, match=r"attention_dropout 0\.1"):
        model_of(attention_dropout=0.1)
    with pytest.raises(UserError, match=r"partial_rotary_factor 0\.5, but llama models rotate all of a head"):
        model_of(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert AutoConfig.for_model("qwen2").sliding_window is None  # no window unless use_sliding_window is set
