"""How the parts share two calls of six minutes: by what each needs, and the limits that it has."""

from __future__ import annotations

import re

import pytest

from bico_ds.proof import parts
from bico_ds.proof.parts import PARTS

MINUTES = 360
START = 10  # until a tool has imported torch


def seconds(*names: str) -> float:
    return sum(PARTS[name].seconds for name in names)


def expected() -> dict[str, int]:
    return {name: int(s) for name, s in re.findall(r"^\| (\w+) \| (\d+) \|", parts.__doc__ or "", re.M)}


FIRST_CALL = ["check", "speed", "step", "baselines", "nccl", "elementwise"]
SECOND_CALL = ["run", "policy", "fused_adam"]


def test_steps_and_baselines_get_what_they_need_whatever_the_parts_before_them_take():
    assert list(PARTS)[:4] == ["check", "speed", "step", "baselines"]
    assert seconds("check", "speed", "step") + PARTS["baselines"].needs <= MINUTES


@pytest.mark.parametrize("name", ["check", "speed", "policy"])
def test_a_tool_that_leaves_out_what_it_has_no_time_for_ends_before_it_is_cut(name):
    options = PARTS[name].options
    assert float(options[options.index("--seconds") + 1]) + START < PARTS[name].seconds


def test_what_is_expected_of_the_parts_fits_two_calls_and_the_limits_of_each():
    assert list(expected()) == list(PARTS) == [*FIRST_CALL, *SECOND_CALL]
    for call in (FIRST_CALL, SECOND_CALL):
        assert sum(expected()[name] for name in call) <= MINUTES
    assert all(s < PARTS[name].seconds for name, s in expected().items())


def test_a_second_call_never_cuts_what_it_begins():
    left = MINUTES - sum(expected()[name] for name in FIRST_CALL)
    assert 0 < left < min(PARTS[name].needs for name in SECOND_CALL), "the first call begins none of these"
    assert seconds("run", "policy") + PARTS["fused_adam"].needs <= MINUTES
