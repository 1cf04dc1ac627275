"""Our calls of GPU kernels, without a GPU: each binds to the kernel's own signature, keyword by keyword.

Signatures: torch's from the torch that runs, and as its lowest supported release had them; those of flash-attn,
flash-attn-3 and flash-attn-4 as `recorded_signatures/record.py` read them from their releases.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bico_ds.attention import backends
from bico_ds.attention.backend import Backend
from bico_ds.attention.inputs import AttentionInputs, AttentionResults
from bico_ds.attention.kernels.aten_cuda import AtenCuda
from bico_ds.attention.layout import CUDA_POLICY, build_layout
from bico_ds.attention.packed import run_packed_attention
from bico_ds.attention.plan import map_tensors
from tests.attention.attention_problems import FLOATS, make_problem, relative_errors
from tests.attention.gpu_kernels import PACKAGES, RECORDS, aten_on_cpu

HIDDEN_POLICY = replace(CUDA_POLICY, tile_cost=1e9)  # every document's live rows as hidden keys
KERNELS = ["aten-cuda", *PACKAGES]


@contextmanager
def kernel_on_cpu(which, folder, changed=None):
    """The kernel of ours that calls torch, or a recorded package; `changed`: as `Package.installed`."""
    with ExitStack() as stack:
        stack.enter_context(aten_on_cpu())
        if which != "aten-cuda":
            stack.enter_context(which.installed(folder, changed))
        yield backends.KERNELS[which if which == "aten-cuda" else which.distribution]


@pytest.mark.parametrize("policy", [CUDA_POLICY, HIDDEN_POLICY], ids=["tiles", "hidden"])
@pytest.mark.parametrize(
    ("mode", "deterministic"), [("causal", False), ("bidirectional", False), ("bidirectional", True)]
)
@pytest.mark.parametrize("which", KERNELS, ids=str)
def test_each_call_binds_to_the_kernels_signature_and_gives_attention(
    which, mode, deterministic, policy, tmp_path
):
    """In fp64, which only the stand-in takes: a keyword, sign, transposition or scale that is wrong shows."""
    seed = int(torch.randint(2**31, ()))
    problem = make_problem([40, 1, 2, 77], mode=mode, mask_rate=0.4, heads=(6, 2), head_dim=24, seed=seed)
    with kernel_on_cpu(which, tmp_path) as kernel:
        backend = Backend(kernel=kernel, policy=policy)
        torch.use_deterministic_algorithms(deterministic)
        try:
            found = problem.packed(run_packed_attention, scale=24**-0.5, backend=backend)
        finally:
            torch.use_deterministic_algorithms(False)
    assert max(relative_errors(found, problem.dense_rows())) < 1e-11, f"seed {seed}"


@pytest.mark.parametrize("which", KERNELS, ids=str)
def test_spans_are_causal_documents_of_two_rows_and_more_to_the_kernel(which, tmp_path):
    seed = int(torch.randint(2**31, ()))
    shape = {"mask_rate": 0.5, "heads": (6, 2), "head_dim": 24, "spans": "run"}
    problem = make_problem([40, 1, 2, 577], seed=seed, **shape)
    policy = replace(HIDDEN_POLICY, span_flash_from=1)
    spans = build_layout(problem.plan, policy).spans
    assert spans.layout.is_one_flash_problem and spans.layout.flash[0].plan.cu_seqlens.diff().min() == 2
    with kernel_on_cpu(which, tmp_path) as kernel:
        backend = Backend(kernel=kernel, policy=policy)
        found = problem.packed(run_packed_attention, scale=24**-0.5, backend=backend)
    assert max(relative_errors(found, problem.dense_rows())) < 1e-11, f"seed {seed}"


OTHER_MEANING = {
    "flash-attn": {"block_table": torch.zeros(1, 1, dtype=torch.int32)},
    "flash-attn-3": {"attention_chunk": 8},
    "flash-attn-4": {"window_size_left": -1},  # unbounded is None there
}


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_an_argument_that_means_something_else_is_refused(package, tmp_path):
    other = OTHER_MEANING[package.distribution]
    problem = make_problem([40, 1], mode="causal", head_dim=24)
    with (
        kernel_on_cpu(package, tmp_path, other) as kernel,
        pytest.raises(AssertionError, match=next(iter(other))),
    ):
        problem.packed(run_packed_attention, scale=1.0, backend=Backend(kernel=kernel, policy=CUDA_POLICY))


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_a_recorded_release_is_one_that_we_take(package, tmp_path):
    with package.installed(tmp_path):
        backend = backends.resolve(package.distribution, torch.bfloat16, 128, torch.device("meta"))
    assert backend.kernel.name == package.distribution


def recorded_schemas():
    (path,) = RECORDS.glob("torch-*.json")
    return json.loads(path.read_text())["functions"]


@pytest.mark.parametrize("name", recorded_schemas())
def test_torchs_kernels_are_those_of_its_lowest_release(name):
    """Nothing there has moved or got another type or default; nothing new changes what a call without it means."""
    recorded = torch._C.parse_schema(recorded_schemas()[name]).arguments
    running = getattr(torch.ops.aten, name).default._schema
    by_name = {argument.name: argument for argument in running.arguments}
    positional = [argument.name for argument in recorded if not argument.kwarg_only]
    assert [argument.name for argument in running.arguments][: len(positional)] == positional
    for old in recorded:
        new = by_name.pop(old.name)
        assert str(new.type) == str(old.type), old.name
        assert (new.has_default_value(), new.default_value) == (old.has_default_value(), old.default_value)
    assert all(new.has_default_value() and new.default_value is None for new in by_name.values()), by_name
    outputs = torch._C.parse_schema(recorded_schemas()[name]).returns
    assert [str(value.type) for value in running.returns] == [str(value.type) for value in outputs]


@pytest.mark.skipif(
    torch.version.cuda is None, reason="this torch is built for CPUs: no CUDA devices, even fake ones"
)
@pytest.mark.parametrize("policy", [CUDA_POLICY, HIDDEN_POLICY], ids=["tiles", "hidden"])
@pytest.mark.parametrize(
    ("mode", "spans"), [("causal", None), ("bidirectional", None), ("bidirectional", "run")]
)
def test_every_operation_of_the_cuda_backend_runs_on_one_cuda_device(mode, spans, policy):
    """On fake tensors, which need no GPU, and whose operations refuse tensors of another device."""
    shape = {"mode": mode, "mask_rate": 0.4, "head_dim": 64, "spans": spans}
    problem = make_problem([40, 1, 2, 77], **shape).to(torch.bfloat16)
    layout = build_layout(problem.plan, policy)
    backend = Backend(kernel=AtenCuda(), policy=policy)
    rows = [getattr(problem, name)[problem.token_of_row] for name in FLOATS]
    with FakeTensorMode() as fake:
        on_cuda = lambda x: fake.from_tensor(x).to("cuda")  # noqa: E731
        q, k, v, cos, sin, grad_out = map(on_cuda, rows)
        layout = map_tensors(layout, on_cuda).with_masks(torch.bfloat16)
        inputs = AttentionInputs(q=q, k=k, v=v, cos=cos, sin=sin, scale=0.125, causal=mode == "causal")
        results = backend.forward(inputs, layout)
        results = AttentionResults(out=results.out[: len(q)], lse=results.lse)
        grads = backend.backward(inputs, layout, results, grad_out)
    for found, like in zip((results.out, *grads), (q, q, k, v), strict=True):
        assert (found.shape, found.dtype, found.device) == (like.shape, torch.bfloat16, like.device)
        assert found.device.type == "cuda"
