"""RMSNorm and SwiGLU in one pass: the formula and its gradients in fp64, Hugging Face's rounding, any shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model import elementwise
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.elementwise import add_rms_norm, rms_norm, swiglu
from bico_ds.model.elementwise_kernels import NativeKernels
from bico_ds.model.families import FAMILIES
from bico_ds.native.library import native_refusal

pytestmark = pytest.mark.skipif(native_refusal() is not None, reason=f"the fused kernels: {native_refusal()}")

NATIVE = NativeKernels()
EPS = 1e-6
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-6}
SHAPES = {
    "shape": st.lists(st.integers(1, 70), min_size=1, max_size=2),
    "width": st.integers(1, 90),
    "scale": st.sampled_from([1e-3, 1.0, 30.0]),
    "seed": st.integers(0, 2**31),
}


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def with_gradients(function, *inputs: Tensor) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    slope = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, slope)]


def worst_error(found: list[Tensor], exact: list[Tensor], sizes: list[float] | None = None) -> float:
    """Largest error of any result, in units of `sizes`, or of that result's largest value; NaN where any is."""
    sizes = sizes or [max(theirs.abs().max().item(), 1e-30) for theirs in exact]
    errors = [
        (ours.double() - theirs).abs().max() / size
        for ours, theirs, size in zip(found, exact, sizes, strict=True)
    ]
    return torch.stack(errors).max().item()  # Python's `max` passes over a NaN that does not come first


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_the_norm_and_its_gradients_equal_the_formula(dtype, shape, width, scale, seed):
    torch.manual_seed(seed)
    x = (scale * torch.randn(*shape, width)).to(dtype)
    weight = (1 + torch.randn(width)).to(dtype)
    found = with_gradients(lambda x, w: rms_norm(x, w, EPS, NATIVE), x, weight)
    exact = with_gradients(exact_norm, x.double(), weight.double())
    # x's gradient is a difference; its error is measured by what is subtracted, 2 |weight| / rms at most.
    smallest_rms = (x.double().pow(2).mean(-1) + EPS).sqrt().min().item()
    largest = weight.double().abs().max().item()
    sizes = [exact[0].abs().max().item(), 2 * largest / smallest_rms, 2 * exact[0].numel() / width]
    assert worst_error(found, exact, sizes) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=20, deadline=None)
@given(**SHAPES)
def test_the_norm_of_a_sum_is_bit_by_bit_the_norm_after_the_sum(dtype, shape, width, scale, seed):
    """With its gradients, of which the sum's own is added to the norm's."""
    torch.manual_seed(seed)
    x, residual, slope = ((scale * torch.randn(*shape, width)).to(dtype) for _ in range(3))
    weight = (1 + torch.randn(width)).to(dtype)

    def joined(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        normed, total = add_rms_norm(x, residual, weight, EPS, NATIVE)
        return torch.stack([normed, total * slope])

    def apart(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total = x + residual
        return torch.stack([rms_norm(total, weight, EPS, NATIVE), total * slope])

    found, expected = (with_gradients(way, x, residual, weight) for way in (joined, apart))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_the_gate_and_its_gradients_equal_the_formula(dtype, shape, width, scale, seed):
    torch.manual_seed(seed)
    gate, up = ((scale * torch.randn(*shape, width)).to(dtype) for _ in range(2))
    found = with_gradients(lambda g, u: swiglu(g, u, NATIVE), gate, up)
    exact = with_gradients(lambda g, u: silu(g) * u, gate.double(), up.double())
    assert worst_error(found, exact) < TOLERANCE[dtype]


def test_gates_far_out_are_neither_nan_nor_cut_off():
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 1e4])
    found = with_gradients(lambda g, u: swiglu(g, u, NATIVE), gate, torch.ones(6))
    exact = with_gradients(lambda g, u: silu(g) * u, gate.double(), torch.ones(6, dtype=torch.float64))
    assert worst_error(found, exact) < 2e-6
    assert all(torch.isfinite(x).all() for x in found)


def test_bf16_is_rounded_where_hugging_face_rounds_it():
    x, weight = torch.randn(200, 576).bfloat16(), torch.randn(576).bfloat16()
    plain = LlamaRMSNorm(576, eps=EPS).bfloat16()
    plain.weight.data.copy_(weight)
    norm_differs = (rms_norm(x, weight, EPS, NATIVE) != plain(x)).float().mean().item()
    gate_differs = (swiglu(x, x.flip(0), NATIVE) != silu(x) * x.flip(0)).float().mean().item()
    assert max(norm_differs, gate_differs) < 1e-3, (
        "a sum or an exp in another order may tip a rounding, rarely"
    )


def test_gradients_do_not_depend_on_the_thread_count():
    x, weight = torch.randn(1000, 65), torch.randn(65)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(lambda x, w: rms_norm(x, w, EPS, NATIVE), x, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def tiny_model(*, recompute_every: int = 0, **values: object) -> TrainableModel:
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    return build_model(
        ModelSpec(config=shape | values, dtype="fp32", activation_checkpointing=recompute_every),
        seed=1,
        ds_config=None,
        device="cpu",
        longest_document=7,
    )


def packed_batch(tokens: Tensor) -> PackedBatch:
    rows = torch.arange(len(tokens) - 1)
    return PackedBatch(
        input_ids=tokens,
        position_ids=torch.arange(len(tokens)),
        plan=build_plan("causal", kept_lengths=[len(tokens)]),
        loss_rows=rows,
        targets=tokens[rows + 1],
        represented_tokens=len(tokens),
        documents=torch.zeros(1, 3, dtype=torch.int64),
    )


def expected_calls(model_type: str) -> dict[str, int]:
    """Of two layers, with two norms each, and the last norm: of sums, but for the first one, and those of q and k."""
    return {"rms_norm": 5 if FAMILIES[model_type].qk_norms else 1, "add_rms_norm": 4, "swiglu": 2}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        *(({"model_type": name}, expected_calls(name)) for name in FAMILIES),
        ({"model_type": "llama", "hidden_act": "gelu"}, {"rms_norm": 1, "add_rms_norm": 4}),
    ],
    ids=str,
)
def test_packed_batches_take_every_kernel_and_plain_calls_none(monkeypatch, values, expected):
    model, calls = tiny_model(**values), Counter()
    for function in (rms_norm, add_rms_norm, swiglu):

        def counted(*args: object, function: Callable = function) -> Tensor:
            calls[function.__name__] += 1
            return function(*args)

        monkeypatch.setattr(elementwise, function.__name__, counted)
    model(packed_batch(torch.arange(7)))
    assert calls == expected
    calls.clear()
    model.causal_lm(torch.arange(7)[None])
    assert not calls


@pytest.mark.parametrize("recompute_every", [1, 2])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_recomputed_layer_gives_the_gradients_of_one_that_is_kept_bit_by_bit(model_type, recompute_every):
    """Its input is normed again from the sum that was handed over with it."""
    found = []
    for every in (0, recompute_every):
        model = tiny_model(model_type=model_type, num_hidden_layers=4, recompute_every=every).train()
        model(packed_batch(torch.arange(7))).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
