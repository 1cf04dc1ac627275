"""Each way in which an objective could be wrong, and no test of training would notice, makes it differ from its definition.

The faults are made in the batch, where the objective's own code would make them, and in the attention's formula.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bico_ds.attention import oracle, packed
from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from tests.cures.comparing import (
    CURES,
    EOS,
    MASKS,
    built,
    by_the_package,
    difference,
    expected,
    make_documents,
    tiny_llama,
)


def replan(batch: PackedBatch, **values: Any) -> PackedBatch:
    """The batch with other values of `build_plan`."""
    plan, spans = batch.plan, batch.plan.span_cu_seqlens
    as_built = {
        "mode": plan.mode,
        "kept_lengths": plan.cu_seqlens.diff(),
        "live_document": plan.live_document,
        "live_split": plan.live_split,
        "live_spans": None if spans is None else spans.diff(),
    }
    return replace(batch, plan=build_plan(**{**as_built, **values}))


def labels_of_the_row_before(batch: PackedBatch) -> PackedBatch:
    return replace(batch, targets=batch.targets.roll(1))


def rows_one_too_late(batch: PackedBatch) -> PackedBatch:
    return replace(batch, loss_rows=(batch.loss_rows + 1) % batch.plan.num_rows)


def splits_one_too_early(batch: PackedBatch) -> PackedBatch:
    return replan(batch, live_split=(batch.plan.live_split - 1).clamp(min=1))


def splits_at_the_end(batch: PackedBatch) -> PackedBatch:
    return replan(batch, live_split=batch.plan.cu_seqlens.diff()[batch.plan.live_document])


def positions_without_gaps(batch: PackedBatch) -> PackedBatch:
    position = batch.position_ids.clone()
    for start, end in batch.plan.cu_seqlens.unfold(0, 2, 1).tolist():
        position[start:end] = torch.arange(end - start)
    return replace(batch, position_ids=position)


def live_ids(fill: int) -> Callable[[PackedBatch], PackedBatch]:
    def broken(batch: PackedBatch) -> PackedBatch:
        ids = batch.input_ids.clone()
        ids[batch.plan.num_kept :] = fill
        return replace(batch, input_ids=ids)

    return broken


def spans_that_see_the_next(batch: PackedBatch) -> PackedBatch:
    return replan(batch, live_spans=torch.unique_consecutive(batch.plan.live_document, return_counts=True)[1])


def rows_that_see_themselves_alone(batch: PackedBatch) -> PackedBatch:
    return replan(batch, live_spans=torch.ones(batch.plan.num_live, dtype=torch.int64))


def rows_that_see_no_row(batch: PackedBatch) -> PackedBatch:
    return replan(batch, live_spans=None)


def no_weights(batch: PackedBatch) -> PackedBatch:
    return replace(batch, loss_weights=None)


def weights_by_length(batch: PackedBatch) -> PackedBatch:
    """Divided by the document's kept tokens, not by its masked ones."""
    kept = batch.plan.cu_seqlens.diff()
    document = torch.cat([torch.repeat_interleave(kept.long()), batch.plan.live_document])[batch.loss_rows]
    return replace(batch, loss_weights=1 / kept[document].float())


def loss_of_the_prompt(batch: PackedBatch) -> PackedBatch:
    last = set((batch.plan.cu_seqlens[1:] - 1).tolist())
    rows = torch.tensor([row for row in range(batch.plan.num_rows) if row not in last])
    return replace(batch, loss_rows=rows, targets=batch.input_ids[rows + 1])


def no_loss_of_the_last(batch: PackedBatch) -> PackedBatch:
    weights = None if batch.loss_weights is None else batch.loss_weights[:-1]
    return replace(batch, loss_rows=batch.loss_rows[:-1], targets=batch.targets[:-1], loss_weights=weights)


EVERY = ["ntp", "bico", "abi", "mlm_u, next", "reverse", "masked_ft"]  # one of a kind
MASKED = [name for name, cure in CURES.items() if cure.recipe["kind"] in ("bico", "abi", "mlm_u")]
INFILLING = [name for name in MASKED if name.startswith("abi")]
WITH_PROMPT = [name for name in CURES if name.startswith("masked_ft")]
UNIFORM = [name for name in MASKED if name.startswith("mlm_u")]
FAULTS: list[tuple[Callable[[PackedBatch], PackedBatch], list[str]]] = [
    (labels_of_the_row_before, EVERY),
    (rows_one_too_late, EVERY),
    (splits_one_too_early, MASKED),
    (splits_at_the_end, MASKED),
    (positions_without_gaps, MASKED),
    (live_ids(EOS), MASKED),
    (spans_that_see_the_next, ["abi"]),
    (rows_that_see_themselves_alone, INFILLING),
    (rows_that_see_no_row, INFILLING),
    (loss_of_the_prompt, WITH_PROMPT),
    (no_loss_of_the_last, EVERY),
    (no_weights, UNIFORM),
    (weights_by_length, UNIFORM),
]


def error_with(cure: str, fault: Callable[[PackedBatch], PackedBatch]) -> float:
    model, documents = tiny_llama("oracle"), make_documents(MASKS, seed=7)
    return difference(
        by_the_package(model, fault(built(CURES[cure], documents, MASKS))), expected(cure, seed=7)
    )


@pytest.mark.parametrize(
    ("fault", "cure"),
    [(fault, cure) for fault, cures in FAULTS for cure in cures],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_fault_of_the_batch_is_seen(fault: Callable[[PackedBatch], PackedBatch], cure: str) -> None:
    error = error_with(cure, fault)
    assert error > 1e-3


# A place of the formula, what it becomes, and whom it must change.
WRONG_FORMULAS = [
    (
        "dense_attention",
        "_rotate(q, cos, -sin), _rotate(k, cos, -sin)",
        "_rotate(q, cos, sin), _rotate(k, cos, sin)",
        MASKED,
    ),
    ("dense_attention", "_rotate(k, cos, -sin)", "_rotate(k, cos, sin)", MASKED),
    ("dense_attention", "<= position[:, None]", "< position[:, None]", ["ntp"]),
    ("dense_attention", "(span[:, None] >= 0) & earlier", "(span[:, None] >= 0)", INFILLING),
    ("dense_attention", "(document[None, :] == document[:, None]) & ", "", EVERY),
    ("oracle_attention", "is_key=row < plan.num_kept", "is_key=row >= 0", MASKED),
]


@pytest.mark.parametrize(
    ("function", "old", "new", "cure"),
    [(*change, cure) for *change, cures in WRONG_FORMULAS for cure in cures],
)
def test_a_fault_of_the_formula_is_seen(
    function: str, old: str, new: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect.getsource(getattr(oracle, function))
    assert source.count(old) == 1
    changed: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + source.replace(old, new), vars(oracle), changed)
    monkeypatch.setattr(oracle, function, changed[function])
    monkeypatch.setattr(packed, "oracle_attention", oracle.oracle_attention)
    error = error_with(cure, lambda batch: batch)
    assert error > 1e-3


@pytest.mark.parametrize("cure", CURES)
def test_no_cure_passes_for_another(cure: str) -> None:
    """So the definitions differ, and a kind that builds what another one does is seen."""
    found = by_the_package(tiny_llama("oracle"), built(CURES[cure], make_documents(MASKS, seed=7), MASKS))
    alike = [other for other in CURES if difference(found, expected(other, seed=7)) < 1e-3]
    assert alike == [cure]
