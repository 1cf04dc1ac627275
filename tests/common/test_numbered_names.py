"""Names with a number are known as this program writes them, and no other."""

from __future__ import annotations

import os

import pytest

from bico_ds.common.numbered_names import NumberedName

STEP = NumberedName("step-", digits=6)
FOREIGN = (
    *("step-000002.bak", "step-000002 (copy)", "step-foo", "step-", "step--1", "step-2", "step-0000002", "step-+00002"),
    *("step-00000２", "step-0_0002", "step- 00002", "step-000002\n", "Step-000002", "latest", ".step-000002.x.incomplete"),
    "step-" + "9" * 200,
)  # fmt: skip


@pytest.mark.parametrize("number", [0, 2, 999_999, 1_000_000, 10**17])
def test_a_name_of_ours_is_read_as_it_was_written(number):
    for name in (STEP, NumberedName("step-", ".json", digits=6), NumberedName("replaced-")):
        assert name.number_in(name.of(number)) == number


@pytest.mark.parametrize("name", FOREIGN)
def test_any_other_name_has_no_number(name):
    assert STEP.number_in(name) is None
    assert NumberedName("step-", ".json", digits=6).number_in(f"{name}.json") is None


def test_a_folder_shows_its_numbers_in_their_order_and_nothing_else(tmp_path):
    for name in ("step-1000000", "step-000002", "step-000010", *FOREIGN):
        (tmp_path / name).mkdir()
    assert [number for number, _ in STEP.in_folder(tmp_path)] == [2, 10, 1_000_000]
    assert STEP.in_folder(tmp_path / "none") == []
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    assert STEP.in_folder(tmp_path / "loop") == []
