"""The loss head: the cross entropy of all rows at once, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from bico_ds.model.head import chunked_cross_entropy

N, E, V = 50, 24, 301


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(N, E, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, E, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 512])
def test_any_chunking_is_the_plain_cross_entropy(chunk_rows: int) -> None:
    hidden, weight, targets = inputs(torch.float64)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)[0]
    expected = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(3.5 * loss, (hidden, weight))
    for gradient, other in zip(ours, torch.autograd.grad(3.5 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 7, 50])
def test_each_row_counts_by_its_weight_in_the_loss_and_its_gradients(chunk_rows: int) -> None:
    hidden, weight, targets = inputs(torch.float64)
    weights = torch.rand(N).clamp_min(1e-3)
    loss, row_losses = chunked_cross_entropy(
        hidden, weight, targets, chunk_rows=chunk_rows, loss_weights=weights
    )
    each = cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(row_losses, each.detach(), rtol=1e-12, atol=0)
    expected = (weights.double() * each).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(3.5 * loss, (hidden, weight))
    for gradient, other in zip(ours, torch.autograd.grad(3.5 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [2, 5, 50])
def test_in_bf16_weighted_gradients_are_as_exact_as_others_by_chunks_and_by_vocabulary(
    chunk_rows: int,
) -> None:
    """Of 50 rows chunks of 2 are so many that the weight's gradient is made by parts of the vocabulary."""
    hidden, weight, targets = inputs(torch.bfloat16)
    weights = torch.rand(N).clamp_min(1e-3)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    each = cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
    (weights * each).sum().backward()
    chunked_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows, loss_weights=weights)[0].backward()
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert ((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()).item() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_1_change_no_bit(dtype: torch.dtype) -> None:
    found = []
    for weights in (None, torch.ones(N)):
        hidden, weight, targets = inputs(dtype)
        loss = chunked_cross_entropy(hidden, weight, targets, chunk_rows=2, loss_weights=weights)[0]
        (0.3 * loss).backward()
        found.append([loss.detach(), hidden.grad, weight.grad])
    assert all(map(torch.equal, *found))


def test_bf16_is_as_exact_as_torchs_own_bf16() -> None:
    exact = inputs(torch.bfloat16)
    reference = [tensor.detach().double().requires_grad_() for tensor in exact[:2]]
    cross_entropy(reference[0] @ reference[1].T, exact[2], reduction="sum").backward()
    errors = {}
    for name in ("ours", "torch"):
        hidden, weight, targets = inputs(torch.bfloat16)
        if name == "ours":
            loss = chunked_cross_entropy(hidden, weight, targets, chunk_rows=7)[0]
            assert loss.dtype == torch.float32
        else:
            loss = cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
        loss.backward()
        errors[name] = [
            ((tensor.grad.double() - other.grad).norm() / other.grad.norm()).item()
            for tensor, other in zip((hidden, weight), reference, strict=True)
        ]
    for ours, theirs in zip(errors["ours"], errors["torch"], strict=True):
        assert ours < 1.5 * theirs


def test_the_weights_gradient_stays_exact_however_many_chunks() -> None:
    """In bf16 a sum over 512 chunks stalls: each adds less than the sum's rounding."""
    rows, hidden_size, vocabulary = 8192, 16, 64
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, hidden_size, generator=generator).bfloat16()
    weight = (0.1 * torch.randn(vocabulary, hidden_size, generator=generator)).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary // 8, (rows,), generator=generator)
    exact = weight.detach().double().requires_grad_()
    cross_entropy(hidden.double() @ exact.T, targets, reduction="sum").backward()
    for chunk_rows in (16, 511, 512, 8192):
        loss = chunked_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)[0]
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.dtype == torch.bfloat16
        error = ((gradient.double() - exact.grad).norm() / exact.grad.norm()).item()
        assert error < 6e-3, f"{chunk_rows} rows a chunk"


def test_a_frozen_weight_gets_no_gradient_and_evaluation_computes_none() -> None:
    hidden, weight, targets = inputs(torch.float32)
    loss = chunked_cross_entropy(hidden, weight.detach(), targets, chunk_rows=8)[0]
    assert torch.autograd.grad(loss, hidden)[0].abs().sum() > 0
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, targets, chunk_rows=8)[0].requires_grad


def test_certain_and_hopeless_predictions_stay_finite() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([0, 0]), chunk_rows=1)[0]
    loss.backward()
    assert loss.item() == pytest.approx(600.0)
    assert hidden.grad.tolist() == [[0.0], [-2.0]]
