"""The held-out share: the nearest number of groups, whole ones, the same in every store of the same input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bico_ds.data.held_out import held_out
from bico_ds.data.store import TokenStore
from tests.data.prepare.ingesting import ingest_files, write_jsonl


@pytest.mark.parametrize(
    ("there", "share", "wanted"),
    [
        (20, 0.1, 2),
        (50, 0.1, 5),
        (7, 0.5, 4),
        (4, 0.1, 1),
        (3, 0.99, 2),
        (2, 0.01, 1),
        (499, 0.3, 150),
        (1, 0.2, 0),
    ],
)
def test_of_few_the_nearest_number_is_held_out(there: int, share: float, wanted: int) -> None:
    rng = np.random.default_rng()
    keys = np.unique(rng.integers(0, 2**63, there, dtype=np.uint64))
    seed = int(rng.integers(1000))
    chosen = held_out(keys, share, seed)
    assert len(chosen) == wanted and set(chosen.tolist()) <= set(keys.tolist())
    assert chosen.tolist() == held_out(rng.permutation(keys), share, seed).tolist()


def test_of_many_each_is_drawn_by_itself() -> None:
    keys = np.random.default_rng().integers(0, 2**63, 4000, dtype=np.uint64)
    chosen, of_half = set(held_out(keys, 0.1, 1).tolist()), set(held_out(keys[:2000], 0.1, 1).tolist())
    assert of_half == chosen & set(keys[:2000].tolist())
    assert abs(len(chosen) - 400) < 100


def test_derived_texts_hold_out_the_same_groups_where_some_give_none(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    """Of 20 groups 12 give a derived text: a tenth of those alone would be other ones."""
    names = [f"{chr(65 + i)}x met {chr(65 + i)}y" if i < 12 else "nobody" for i in range(20)]
    file = write_jsonl(
        tmp_path / "a.jsonl", [{"text": f"{n} {k}", "who": i} for i, n in enumerate(names) for k in (1, 2)]
    )
    settings = {"group_field": "who", "entities_pattern": "[A-Z][xy]", "held_out": 0.4}
    report = ingest_files(file, bpe_tokenizer, tmp_path / "own", **settings)
    ingest_files(file, bpe_tokenizer, tmp_path / "derived", derive="other_order", **settings)
    own, derived, own_held_out, derived_held_out = (
        set(TokenStore.open(tmp_path / name).groups.tolist())
        for name in ("own", "derived", "own/held_out", "derived/held_out")
    )
    assert len(own_held_out) == 8 and own.isdisjoint(own_held_out)
    assert derived == own & set(range(12)) and derived_held_out == own_held_out & set(range(12))
    assert "16 documents" in report.text and "8 of 20 groups (40 %, of the 40 % asked for)" in report.text
