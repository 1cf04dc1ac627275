"""Every objective, by every backend of a CPU, has the loss and the gradients of its definition."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.documents import Documents
from bico_ds.native.library import native_refusal
from tests.cures import comparing
from tests.cures.comparing import BACKENDS, CURES, FUSED, MASKS, Cure, drawn_masks, make_documents

tiny_llama = functools.cache(comparing.tiny_llama)


def differs(cure: Cure, masks: list[list[bool]], seed: int, backend, dtype=torch.float64) -> float:
    """By how much the package's loss and gradients of a batch differ from the definition's."""
    documents, model = make_documents(masks, seed), tiny_llama(backend, dtype)
    with pytest.MonkeyPatch.context() as patch:
        batch = comparing.built(cure, documents, masks, patch)
    rows = [cure.rows(d, masked) for d, masked in zip(documents, masks, strict=True)]
    return comparing.difference(
        comparing.by_the_package(model, batch), comparing.by_the_definition(model, rows)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cure", CURES)
def test_loss_and_gradients_are_the_definitions(cure: str, backend: str) -> None:
    assert differs(CURES[cure], MASKS, 1, BACKENDS[backend]) < 1e-10


@pytest.mark.parametrize("cure", CURES)
def test_the_fused_kernel_gives_the_definitions_loss_and_gradients(cure: str) -> None:
    if native_refusal():
        pytest.skip(f"the fused kernel {native_refusal()}")
    assert differs(CURES[cure], MASKS, 2, FUSED, torch.float32) < 1e-4
