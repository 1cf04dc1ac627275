"""The head's softmax in Triton's interpreter against dense softmaxes in fp64, what it states on meta, and its own proof.

In fp32 and fp16: the interpreter has no bf16.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from bico_ds.common.traffic import Traffic, counting_traffic
from bico_ds.config.sections.model import LOW_PRECISION_CHUNKS
from bico_ds.model.head import chunked_cross_entropy
from bico_ds.model.head_softmax import TritonSoftmax, head_softmax, head_softmax_fault, head_softmax_refusal
from tests.attention.triton.interpreter import interpreted, needs_triton

META, CPU = torch.device("meta"), torch.device("cpu")
BLOCK = 8192  # columns of a sweep
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3}


def softmax_of(logits: Tensor, labels: Tensor, gradient: bool = True) -> list[Tensor]:
    """lse, losses, and what is then in the place of the logits, by the kernels."""
    softmax = head_softmax(logits)
    assert isinstance(softmax, TritonSoftmax)
    lse, losses = torch.empty(2, len(logits))
    softmax.cross_entropy(logits, labels, lse, losses, gradient=gradient)
    return [lse, losses, logits]


def part_of(logits: Tensor, labels: Tensor, lse: Tensor, first: int) -> Tensor:
    head_softmax(logits).write_gradient(logits, labels, lse, first)
    return logits


def dense(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """The same in fp64."""
    exact = logits.double()
    losses = cross_entropy(exact, labels, reduction="none")
    return [exact.logsumexp(1), losses, exact.softmax(1) - one_hot(labels, logits.shape[1])]


def draws(rows: int, columns: int, dtype: torch.dtype, size: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits, and labels with the first and the last column among them."""
    logits = (size * torch.randn(rows, columns)).to(dtype)
    labels = torch.randint(columns, (rows,))
    labels[:2] = torch.tensor([0, columns - 1])[:rows]
    return logits, labels


def check(logits: Tensor, labels: Tensor, tolerance: float | None = None) -> None:
    lse, losses, gradient = interpreted(softmax_of, logits, labels)
    expected = dense(logits, labels)
    assert (lse.dtype, losses.dtype, gradient.dtype) == (torch.float32, torch.float32, logits.dtype)
    torch.testing.assert_close(lse.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses.double(), expected[1], rtol=1e-6, atol=2e-6)
    rounding = tolerance or ROUNDING[logits.dtype]
    # A label's entry is its probability less 1: where that is near 0, its error is still the probability's.
    size = torch.maximum(expected[2] + one_hot(labels, logits.shape[1]), expected[2].abs())
    assert ((gradient.double() - expected[2]).abs() <= 4 * rounding * size + rounding / 10).all()


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("rows", "columns"), [(3, 5), (1, BLOCK), (2, BLOCK + 1), (4, 2 * BLOCK + 77), (0, 100)]
)
def test_one_launch_gives_what_a_dense_softmax_gives(rows, columns, dtype):
    check(*draws(rows, columns, dtype))


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDING)
def test_logits_of_ten_thousand_overflow_nothing(dtype):
    logits, labels = draws(4, BLOCK + 100, dtype, size=1e4)
    logits = logits.clamp(-1e4, 1e4)
    logits[0, labels[0]], logits[1, labels[1]] = 1e4, -1e4
    check(logits, labels)


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDING)
def test_columns_of_minus_infinity_have_no_probability_even_where_a_row_begins_with_a_block_of_them(dtype):
    logits, labels = draws(4, BLOCK + 100, dtype)
    logits[:, :BLOCK] = -torch.inf
    labels[:] = torch.tensor([BLOCK, BLOCK + 99, BLOCK + 5, 7])
    lse, losses, gradient = interpreted(softmax_of, logits, labels)
    expected = dense(logits, labels)
    torch.testing.assert_close(lse.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses.double(), expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected[2], rtol=4 * ROUNDING[dtype], atol=1e-4)
    assert losses[3] == torch.inf and gradient[3, 7] == -1 and not gradient[:3, :BLOCK].any()


@needs_triton
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_makes_the_loss_of_its_row_nan_and_no_other(bad):
    logits, labels = draws(3, BLOCK + 100, torch.float32)
    logits[1, BLOCK + 3] = bad
    _, losses, _ = interpreted(softmax_of, logits, labels)
    assert losses.isnan().tolist() == [False, True, False]


@needs_triton
@pytest.mark.parametrize("label", [-1, 100, 2**40])
def test_a_label_outside_of_the_vocabulary_makes_its_loss_nan(label):
    logits, labels = draws(3, 100, torch.float32)
    labels[1] = label
    _, losses, _ = interpreted(softmax_of, logits, labels)
    assert losses.isnan().tolist() == [False, True, False]


@needs_triton
def test_without_a_gradient_the_logits_stay():
    logits, labels = draws(3, BLOCK + 100, torch.float16)
    assert torch.equal(interpreted(softmax_of, logits, labels, False)[2], logits)


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("columns", [1, 2048, 2048 + 65])
def test_a_part_of_the_vocabulary_gets_its_columns_of_the_gradient(columns, dtype):
    """With labels in it, before, behind, and at both of its ends."""
    logits, labels = draws(6, 5000, dtype)
    first = 1000
    labels[:] = torch.tensor([first, first + columns - 1, first - 1, first + columns, 0, 4999])
    lse, _, gradient = dense(logits, labels)
    part = slice(first, first + columns)
    found = interpreted(part_of, logits[:, part].contiguous(), labels, lse.float(), first)
    torch.testing.assert_close(
        found.double(), gradient[:, part], rtol=4 * ROUNDING[dtype], atol=ROUNDING[dtype] / 10
    )


def head_of(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> list[Tensor]:
    """Loss, losses of the rows, and gradients, by the kernels."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    assert isinstance(head_softmax(hidden), TritonSoftmax)
    loss, row_losses = chunked_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)
    return [loss.detach(), row_losses, *torch.autograd.grad(3.5 * loss, (hidden, weight))]


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("rows", "chunk_rows"), [(0, 8), (1, 8), (20, 8), (36, 2)])
def test_the_head_by_kernels_is_the_plain_cross_entropy(rows, chunk_rows, dtype):
    by_parts = rows > LOW_PRECISION_CHUNKS * chunk_rows
    assert by_parts == (rows == 36)
    hidden, weight = torch.randn(rows, 16).to(dtype), (torch.randn(333, 16) / 4).to(dtype)
    targets = torch.randint(333, (rows,))
    found = interpreted(head_of, hidden, weight, targets, chunk_rows)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    losses = cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
    expected = [losses.sum(), losses, *torch.autograd.grad(3.5 * losses.sum(), exact)]
    for mine, other in zip(found, expected, strict=True):
        error = (mine.double() - other).norm() / other.norm().clamp_min(1e-9)
        assert error < 3 * ROUNDING[dtype]


MUTATIONS = {
    "log-sum-exp": ("total = total * tl.exp(peak - higher) +", "total = total +"),
    "loss": ("peak - picked + tl.log(mass)", "peak - picked + tl.log2(mass)"),
    "gradient": ("peak, 1.0 / mass, BLOCK)", "peak, 1.0, BLOCK)"),
    "gradient of a part": ("tl.load(LABELS + row) - first", "tl.load(LABELS + row)"),
}


def fault_of(old: str, new: str, dtype: torch.dtype) -> str | None:
    """What the kernels' own proof finds where `old` in their source, which is there once, became `new`."""
    name = "bico_ds.model.head_kernels"
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {name}"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        (mutant := Path(folder) / "mutant.py").write_text(source.replace(old, new), encoding="utf-8")
        loader = importlib.util.spec_from_file_location(name, mutant)
        assert loader is not None and loader.loader is not None
        module = importlib.util.module_from_spec(loader)
        loader.loader.exec_module(module)
        patch.setitem(sys.modules, name, module)
        return head_softmax_fault(dtype, CPU)


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDING)
def test_kernels_that_are_right_prove_themselves(dtype):
    assert interpreted(head_softmax_fault, dtype, CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_runs_the_kernels(dtype):
    assert head_softmax_refusal(dtype, torch.device("cuda")) is None


@needs_triton
@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_kernel_is_found_before_its_first_use(wrong):
    assert (
        interpreted(fault_of, *MUTATIONS[wrong], torch.float16) == f"gives another {wrong} than torch on cpu"
    )


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels work")
def test_where_the_kernels_fail_torch_serves_and_a_warning_says_so_once(caplog):
    head_softmax_refusal.cache_clear()
    with caplog.at_level(logging.WARNING):
        answers = {head_softmax_refusal(torch.bfloat16, torch.device("cuda")) for _ in range(3)}
    (refusal,) = answers
    assert refusal is not None
    assert [record.getMessage() for record in caplog.records] == [
        f"the head's softmax runs by torch's own kernels: ours {refusal}"
    ]


def test_a_cpu_and_fp64_are_served_by_torch():
    assert head_softmax_refusal(torch.bfloat16, CPU) == "runs on CUDA tensors, not on cpu"
    assert head_softmax_refusal(torch.float64, META) == "takes bfloat16, float16 or float32, not float64"


def head_on_meta(rows: int, chunk_rows: int, grad: bool = True) -> list[Traffic]:
    hidden = torch.empty(rows, 64, dtype=torch.bfloat16, device=META, requires_grad=grad)
    weight = torch.empty(1000, 64, dtype=torch.bfloat16, device=META, requires_grad=grad)
    targets = torch.empty(rows, dtype=torch.int64, device=META)
    with counting_traffic() as calls:
        chunked_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)
    return calls


def test_the_traffic_is_that_of_a_sum_by_hand():
    """Chunks of 8, 8 and 4 rows: 1000 logits of 2 bytes per row, a label of 8 bytes, lse and loss of 4 each."""

    def chunk(rows: int, written: int) -> Traffic:
        return Traffic(
            op="head cross entropy", launches=1, bytes_read=rows * 2008, bytes_written=rows * written
        )

    assert head_on_meta(20, 8) == [chunk(rows, 2008) for rows in (8, 8, 4)]
    assert head_on_meta(20, 8, grad=False) == [chunk(rows, 8) for rows in (8, 8, 4)]


def test_the_weights_gradient_by_parts_of_the_vocabulary_moves_each_logit_once_more():
    """33 rows by 2: the buffer holds 2000 logits, for 33 rows 60 columns, and 48 are aligned: 20 parts, and one of 40."""
    calls = head_on_meta(33, 2)
    parts = [call for call in calls if call.op == "head gradient"]
    assert len(calls) == 17 + len(parts)
    assert parts == [
        Traffic(
            op="head gradient",
            launches=1,
            bytes_read=33 * (2 * columns + 12),
            bytes_written=33 * 2 * columns,
        )
        for columns in [48] * 20 + [40]
    ]
