"""How the parts share six minutes: by the limits that each has."""

from __future__ import annotations

import re

import pytest

from bico_ds.proof import parts
from bico_ds.proof.parts import PARTS

MINUTES = 360
START = 10  # until a tool has imported torch


def test_a_step_gets_all_of_its_time_whatever_the_parts_before_it_take():
    names = list(PARTS)
    before = names[: names.index("step") + 1]
    assert before == ["check", "speed", "policy", "step"]
    assert sum(PARTS[name].seconds for name in before) <= MINUTES


@pytest.mark.parametrize("name", ["check", "speed", "policy"])
def test_a_tool_that_leaves_out_what_it_has_no_time_for_ends_before_it_is_cut(name):
    options = PARTS[name].options
    assert float(options[options.index("--seconds") + 1]) + START < PARTS[name].seconds


def test_what_is_expected_of_the_parts_fits_six_minutes_and_their_limits():
    expected = {name: int(s) for name, s in re.findall(r"^\| (\w+) \| (\d+) \|", parts.__doc__, re.M)}
    assert [*expected, "elementwise", "fused_adam"] == list(PARTS)
    assert sum(expected.values()) == MINUTES
    assert all(seconds < PARTS[name].seconds for name, seconds in expected.items())
