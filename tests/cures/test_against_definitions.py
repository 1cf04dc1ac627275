"""Every objective, by every backend of a CPU, has the losses, weights and gradients of its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.attention.backend import Backend
from bico_ds.documents import Documents
from bico_ds.native.library import native_refusal
from bico_ds.objectives.masks import TokenGrid
from tests.attention.attention_problems import NoKeyMask
from tests.attention.triton.interpreter import interpreted, needs_triton
from tests.cures.comparing import (
    BACKENDS,
    CURES,
    FUSED,
    HIDDEN,
    KEY,
    MASKS,
    Cure,
    Trained,
    built,
    by_the_definition,
    by_the_package,
    difference,
    drawn_masks,
    expected,
    make_documents,
    places_of,
    rows_of,
    tiny_llama,
)

IN_FP32, IN_FP64 = 1e-4, 1e-10

# A causal batch has no live rows: how flash kernels hide their keys makes no difference to it.
CAUSAL = [name for name, cure in CURES.items() if cure.recipe["kind"] in ("ntp", "reverse", "masked_ft")]
PAIRS = [
    (cure, backend)
    for cure in CURES
    for backend in BACKENDS
    if cure not in CAUSAL or backend not in ("hidden keys", "wider heads")
]


def differs(cure: Cure, masks: list[list[bool]], seed: int, backend: str | Backend) -> float:
    """By how much the package differs from the definition on such documents, in fp64."""
    documents, model = make_documents(masks, seed), tiny_llama(backend)
    found = by_the_package(model, built(cure, documents, masks))
    return difference(found, by_the_definition(model, rows_of(cure, documents, masks)))


@pytest.mark.parametrize(("cure", "backend"), PAIRS)
def test_losses_and_gradients_are_the_definitions(cure: str, backend: str) -> None:
    model = tiny_llama(BACKENDS[backend])
    found = by_the_package(model, built(CURES[cure], make_documents(MASKS, seed=1), MASKS))
    error = difference(found, expected(cure, seed=1))
    assert error < IN_FP64


@pytest.mark.parametrize("cure", CURES)
@settings(max_examples=5, deadline=None)
@given(masks=drawn_masks, seed=st.integers(0, 2**31), backend=st.sampled_from(list(BACKENDS)))
def test_so_are_those_of_drawn_documents(cure: str, masks: list, seed: int, backend: str) -> None:
    error = differs(CURES[cure], masks, seed, BACKENDS[backend])
    assert error < IN_FP64


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cure", CURES)
@settings(max_examples=40, deadline=None)
@given(masks=drawn_masks, seed=st.integers(0, 2**31))
def test_so_are_those_of_many_drawn_documents(cure: str, backend: str, masks: list, seed: int) -> None:
    error = differs(CURES[cure], masks, seed, BACKENDS[backend])
    assert error < IN_FP64


@pytest.mark.parametrize("cure", CURES)
def test_the_fused_kernel_gives_the_definitions_losses_and_gradients(cure: str) -> None:
    if native_refusal():
        pytest.skip(f"the fused kernel {native_refusal()}")
    documents, model = make_documents(MASKS, seed=2), tiny_llama(FUSED, torch.float32)
    found = by_the_package(model, built(CURES[cure], documents, MASKS))
    error = difference(found, expected(cure, 2, torch.float32))
    assert error < IN_FP32


def train_interpreted(cure: str, passes: bool) -> Trained:
    """With Triton's kernels alone, or with those around the passes of a flash kernel."""
    from bico_ds.attention.triton.passes import TRITON_PASSES

    backend = Backend(kernel=NoKeyMask(), policy=HIDDEN, passes=TRITON_PASSES) if passes else "triton"
    model, documents = tiny_llama(backend, torch.float32), make_documents(MASKS, seed=3)
    return by_the_package(model, built(CURES[cure], documents, MASKS))


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("cure", CURES)
def test_the_triton_kernels_give_the_definitions_losses_and_gradients(cure: str, passes: bool) -> None:
    found = interpreted(train_interpreted, cure, passes)
    error = difference(found, expected(cure, 3, torch.float32))
    assert error < IN_FP32


@pytest.mark.parametrize("cure", CURES)
def test_a_document_has_the_same_losses_alone(cure: str) -> None:
    documents, model = make_documents(MASKS, seed=4), tiny_llama("cpu-flash")
    together = by_the_package(model, built(CURES[cure], documents, MASKS))
    alone = [
        by_the_package(model, built(CURES[cure], Documents.of([document]), [masked]))
        for document, masked in zip(documents, MASKS, strict=True)
    ]
    for part in ("losses", "weights"):
        expected = torch.cat([getattr(one, part) for one in alone])
        torch.testing.assert_close(getattr(together, part), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "cure", [name for name in CURES if CURES[name].recipe["kind"] in ("bico", "abi", "mlm_u", "masked_ft")]
)
def test_the_masks_that_are_drawn_are_the_ones_that_are_trained(cure: str) -> None:
    objective, model = CURES[cure].objective(), tiny_llama("cpu-flash")
    documents = make_documents([[False] * length for length in (1, 2, 9, 30)], seed=5)
    drawn = objective.policy.draw(documents, TokenGrid.of(documents), KEY)
    masks = [part.tolist() for part in np.split(drawn, documents.offsets[1:-1])]
    assert any(map(any, masks))
    found = by_the_package(model, objective.build(documents, KEY))
    error = difference(found, by_the_definition(model, rows_of(CURES[cure], documents, masks)))
    assert error < IN_FP64


@pytest.mark.parametrize("cure", CURES)
def test_the_pairs_that_compute_is_counted_by_are_those_that_rows_of_the_batch_see(cure: str) -> None:
    documents = make_documents(MASKS, seed=8)
    batch, rows = built(CURES[cure], documents, MASKS), rows_of(CURES[cure], documents, MASKS)
    places = list(zip(*(place.tolist() for place in places_of(batch)), strict=True))
    assert len(set(places)) == batch.plan.num_rows
    assert batch.plan.num_pairs == sum(sum(rows[document].sees[position]) for document, position in places)
