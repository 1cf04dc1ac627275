"""Which steps `--profile` records, and which requests are refused before anything is made."""

from __future__ import annotations

import argparse
import random

import pytest

from bico_ds.common.errors import UserError
from bico_ds.training.profile.request import MOST_STEPS, ProfileRequest, profile_request


def test_a_number_alone_asks_for_one_step_of_each_objective():
    drawn = [random.choice("abc") for _ in range(200)]
    found = profile_request("7").numbers(lambda step: drawn[step - 1], begins=0, total=200)
    looked_at = range(7, 7 + MOST_STEPS)
    names = [drawn[step - 1] for step in looked_at]
    assert found == sorted({looked_at[names.index(name)] for name in set(names)})


def test_an_objective_that_does_not_come_is_not_waited_for():
    comes_late = [*["often"] * (MOST_STEPS + 4), "rare"]
    request = ProfileRequest(first=3, steps=None)
    assert request.numbers(lambda step: comes_late[step - 1], begins=2, total=len(comes_late)) == [3]


def test_with_a_second_number_as_many_steps_follow_each_other():
    assert profile_request("5:3").numbers(str, begins=4, total=7) == [5, 6, 7]


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "", ":", "3:", ":3", "3:0", "3:x", "3:4:5", f"3:{MOST_STEPS + 1}"]
)
def test_what_is_no_step_is_refused_as_an_argument(text):
    with pytest.raises(argparse.ArgumentTypeError):
        profile_request(text)


@pytest.mark.parametrize(
    ("text", "begins", "words"),
    [
        ("21", 0, "step 21 is none of this run, which ends after step 20"),
        ("20:2", 0, "step 21 is none of this run"),
        ("6", 6, "begins after step 6: give a step from 7 to 20"),
        ("6:9", 10, "give a step from 11 to 20, or leave --profile out"),
        ("20", 20, "begins after step 20, the run's last: leave --profile out"),
    ],
)
def test_a_step_that_this_start_does_not_make_is_refused(text, begins, words):
    with pytest.raises(UserError, match=words):
        profile_request(text).numbers(str, begins=begins, total=20)
