"""Names in logs that nothing else in the same run has."""

from __future__ import annotations

import random

from bico_ds.config.unique_names import unique_names
from tests.cpu_time import cpu_seconds_below


def test_names_are_all_different_whatever_was_wanted_and_the_first_of_a_name_keeps_it():
    draw = random.Random()
    for _ in range(200):
        wanted = draw.choices(["a", "a_2", "a_2_2", "a_3", "b"], k=8)
        names = unique_names(wanted)
        assert len(set(names)) == len(names), wanted
        assert all(name.startswith(want) for name, want in zip(names, wanted, strict=True))
        assert names[0] == wanted[0]


def test_the_same_name_again_is_numbered_from_two():
    assert unique_names(["bico", "ntp", "bico", "bico"]) == ["bico", "ntp", "bico_2", "bico_3"]


def test_a_number_that_is_taken_is_passed_over():
    assert unique_names(["a", "a_2", "a"]) == ["a", "a_2", "a_3"]
    assert unique_names(["a", "a", "a_2"]) == ["a", "a_2", "a_2_2"]


def test_thousands_of_equal_names_are_given_within_a_second():
    with cpu_seconds_below(1):
        names = unique_names(["both_orders"] * 20_000)
    assert len(set(names)) == 20_000
    assert names[-1] == "both_orders_20000"
