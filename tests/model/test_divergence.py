"""The divergence from the start model: value and gradient of plain softmaxes in fp64, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bico_ds.batch import TeacherRows
from bico_ds.config.sections.model import LOW_PRECISION_CHUNKS
from bico_ds.model.divergence import divergence_from_hidden, divergence_from_stored
from bico_ds.model.head import Comparison, LossHead

M, E, V = 41, 24, 301
CHUNKS = [1, 7, 41, 512]


def draws(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of the model and of the start model, a head, and targets.

    The logits have a deviation of 2.4: what the stored tokens leave of 1 is computed from them, and near 0 it is rounding.
    """
    hidden, start, weight = (torch.randn(rows, E).to(dtype) for rows in (M, M, V))
    weight /= 2
    return hidden.requires_grad_(), start, weight, torch.randint(0, V, (M,))


def probabilities(hidden: Tensor, weight: Tensor, without: Tensor | None) -> Tensor:
    """Of plain softmaxes, then divided by what is left without a token of each row."""
    probs = (hidden @ weight.T).softmax(-1)
    if without is not None:
        probs = probs * (torch.arange(len(weight)) != without[:, None])
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The sum of p log(p / q) where p is not zero."""
    return torch.where(p > 0, p * (p / q.clamp_min(1e-300)).clamp_min(1e-300).log(), 0.0).sum()


def stored_top(probs: Tensor, targets: Tensor, k: int) -> TeacherRows:
    log_probs, ids = probs.log().topk(k)
    return TeacherRows(
        ids=ids, log_probs=log_probs, target_log_probs=probs.log().gather(1, targets[:, None])[:, 0]
    )


def buckets(probs: Tensor, ids: Tensor) -> Tensor:
    """The probabilities of the tokens of `ids`, and that of all others together."""
    stored = probs.gather(1, ids)
    others = torch.ones_like(probs).scatter(1, ids, 0.0)
    return torch.cat([stored, (probs * others).sum(1, keepdim=True)], 1)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("excludes", [False, True])
def test_from_hidden_states_it_is_that_of_plain_softmaxes(chunk_rows: int, excludes: bool) -> None:
    hidden, start, weight, targets = draws()
    without = targets if excludes else None
    value = divergence_from_hidden(hidden, start, weight, without=without, chunk_rows=chunk_rows)
    expected = divergence(probabilities(start, weight, without), probabilities(hidden, weight, without))
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    ours, theirs = (torch.autograd.grad(3.5 * total, hidden)[0] for total in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("excludes", [False, True])
@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_from_stored_rows_it_is_that_of_tokens_and_one_bucket(
    chunk_rows: int, k: int, excludes: bool
) -> None:
    hidden, start, weight, targets = draws()
    weight.requires_grad_()
    full = probabilities(start, weight.detach(), None)
    targets[::2] = full[::2].argmax(
        1
    )  # of half of the rows a stored token, of others mostly one of the bucket
    teacher = stored_top(full, targets, k)
    value = divergence_from_stored(
        hidden, teacher, weight, exclude_target=excludes, targets=targets, chunk_rows=chunk_rows
    )
    without = targets if excludes else None
    whole = probabilities(start, weight.detach(), without), probabilities(hidden, weight, without)
    expected = divergence(*(buckets(probs, teacher.ids) for probs in whole))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    if k == V:
        torch.testing.assert_close(value, divergence(*whole), rtol=1e-9, atol=1e-9)
    assert value <= divergence(*whole) + 1e-9
    inputs = (hidden, weight)
    ours, theirs = (torch.autograd.grad(3.5 * total, inputs) for total in (value, expected))
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_has_not_moved_diverges_by_exactly_nothing(dtype: torch.dtype) -> None:
    hidden, _, weight, targets = draws(dtype)
    for without in (None, targets):
        value = divergence_from_hidden(hidden, hidden.detach(), weight, without=without, chunk_rows=7)
        assert value.item() == 0.0 and value.dtype == torch.float32
        assert not torch.autograd.grad(value, hidden)[0].any()


def test_the_target_that_is_left_out_may_be_all_that_the_start_model_expects() -> None:
    """Its probability rounds to one, and what is left would round to nothing."""
    hidden = torch.zeros(1, 1, requires_grad=True)
    weight = torch.tensor([[90.0], [2.0], [1.0]])
    value = divergence_from_hidden(hidden, torch.ones(1, 1), weight, without=torch.tensor([0]), chunk_rows=1)
    p = torch.tensor([2.0, 1.0]).softmax(0)
    torch.testing.assert_close(value, (p * (2 * p).log()).sum())
    torch.testing.assert_close(torch.autograd.grad(value, hidden)[0][0, 0], (0.5 - p) @ weight[1:, 0])


def test_a_stored_target_of_nearly_all_probability_leaves_no_rounding_behind() -> None:
    """What is left of 1 - 1e-7 in fp32 is rounding; the tokens that are stored still have their ratios."""
    log_probs = torch.tensor([[-1.0e-7, -17.0, -18.0], [0.0, -120.0, -120.0]])
    teacher = TeacherRows(
        ids=torch.tensor([[4, 0, 1]]).expand(2, -1), log_probs=log_probs, target_log_probs=log_probs[:, 0]
    )
    hidden = torch.zeros(2, 1, requires_grad=True)
    value = divergence_from_stored(
        hidden, teacher, torch.ones(5, 1), exclude_target=True, targets=torch.tensor([4, 4]), chunk_rows=9
    )
    p = torch.tensor([-17.0, -18.0]).softmax(0)
    torch.testing.assert_close(value, (p * (4 * p).log()).sum())
    assert torch.autograd.grad(value, hidden)[0].abs().max() < 1e-6


def test_stored_rows_stay_finite_where_the_model_is_certain() -> None:
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[200.0], [-200.0], [-200.0]], requires_grad=True)
    teacher = TeacherRows(
        ids=torch.zeros(2, 1, dtype=torch.int64),
        log_probs=torch.tensor([[0.5], [1.0]]).log(),
        target_log_probs=torch.tensor([0.25, 0.0]).log(),
    )
    for excludes in (False, True):
        value = divergence_from_stored(
            hidden, teacher, weight, exclude_target=excludes, targets=torch.tensor([1, 1]), chunk_rows=1
        )
        gradients = torch.autograd.grad(value, (hidden, weight))
        assert value.isfinite() and all(part.isfinite().all() for part in gradients)


def test_certain_distributions_stay_finite() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    value = divergence_from_hidden(hidden, -hidden.detach(), weight, without=None, chunk_rows=1)
    assert value.item() == pytest.approx(1200.0)
    assert torch.autograd.grad(value, hidden)[0].tolist() == [[2.0], [-2.0]]


def test_the_weights_gradient_of_stored_rows_stays_exact_however_many_chunks() -> None:
    """In bf16 a sum over many chunks stalls: each adds less than the sum's rounding."""
    rows, size, vocabulary, k = 256 * LOW_PRECISION_CHUNKS, 16, 64, 5
    hidden = torch.randn(rows, size).bfloat16()
    weight = (0.1 * torch.randn(vocabulary, size)).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    p = torch.full((vocabulary,), 1e-3, dtype=torch.float64)
    p[:k] = (1 - (vocabulary - k) * 1e-3) / k
    full = p.expand(rows, vocabulary)
    teacher = stored_top(full, targets, k)
    for excludes in (False, True):
        without = targets if excludes else None
        exact = weight.detach().double().requires_grad_()
        probs = [probabilities(hidden.double(), exact, without), full.clone()]
        if without is not None:
            probs[1][torch.arange(rows), targets] = 0.0
            probs[1] /= probs[1].sum(1, keepdim=True)
        divergence(*(buckets(part, teacher.ids) for part in reversed(probs))).backward()
        for chunk_rows in (16, 255, 256, rows):
            value = divergence_from_stored(
                hidden, teacher, weight, exclude_target=excludes, targets=targets, chunk_rows=chunk_rows
            )
            (gradient,) = torch.autograd.grad(value, weight)
            error = ((gradient.double() - exact.grad).norm() / exact.grad.norm()).item()
            assert error < 6e-3, f"{chunk_rows} rows a chunk, {excludes}"


def test_one_entry_of_the_head_gives_both_terms_and_the_weight_one_gradient() -> None:
    hidden, start, weight, targets = draws()
    head = LossHead(E, V, bias=False, dtype=torch.float64)
    head.chunk_rows = 7
    with torch.no_grad():
        head.weight.copy_(weight)
    index = torch.tensor([3, 4, 30])
    full = probabilities(start, weight, None)[index]
    teacher = stored_top(full, targets[index], V)
    losses = head(hidden, targets, Comparison(index=index, start_model=teacher, exclude_target=False))
    logits = hidden @ head.weight.T
    expected = cross_entropy(logits, targets, reduction="sum"), divergence(full, logits[index].softmax(-1))
    for ours, theirs in zip((losses.loss, losses.divergence), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    inputs = (hidden, head.weight)
    gradients = torch.autograd.grad(losses.loss + 0.3 * losses.divergence, inputs)
    theirs = torch.autograd.grad(expected[0] + 0.3 * expected[1], inputs)
    for ours, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-9)
