"""Seeds of 64 bits, as a time stamp is one: a real run of one rank with them."""

from __future__ import annotations

import pytest

from tests.distributed.launching import metrics, train
from tests.distributed.survival import RECIPE, SMALL, state

pytestmark = pytest.mark.distributed


SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in (20261126014500, -(2**63))]


@pytest.mark.parametrize("seed", [2**64 - 1, *SLOW])
def test_any_seed_of_64_bits_trains(tmp_path, seed):
    short = ("training.steps=2", "schedule={name: constant}", "model.lora={rank: 2, dropout: 0.5}")
    done = train(RECIPE, tmp_path / "run", *SMALL, *short, f"seed={seed}", ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert state(tmp_path / "run")["state"] == "done"
    assert len(metrics(tmp_path / "run")) == 2
