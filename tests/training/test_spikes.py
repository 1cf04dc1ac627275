"""Finite divergence: which steps count as spikes, compared with a plain account of all steps before them."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest

from bico_ds.config.load import load_recipe
from bico_ds.training.callbacks.base import RunStart, StepReport
from bico_ds.training.spikes import SpikeDetector
from tests.training.test_callbacks import report

WARMUP = 7
RECIPE = load_recipe("tiny_base", [f"schedule.warmup_steps={WARMUP}", "schedule.decay_steps=1"])


def drawn(seed: int, steps: int = 700) -> list[StepReport]:
    """Steps of two objectives whose losses and norms differ tenfold, with planted jumps, and steps without an update."""
    draw = np.random.default_rng(seed)
    scale = {"ntp": 1.0, "bico": 10.0}
    reports = []
    for step in range(1, steps + 1):
        name = str(draw.choice(["ntp", "bico"], p=[0.8, 0.2]))
        loss, norm = scale[name] * draw.lognormal(0, 0.3, size=2)
        kind = draw.choice(["plain", "loss", "norm", "skipped", "empty"], p=[0.86, 0.05, 0.05, 0.02, 0.02])
        loss *= draw.uniform(2, 6) if kind == "loss" else 1
        norm *= draw.uniform(20, 60) if kind == "norm" else 1
        targets = 0 if kind == "empty" else 10
        norm = math.nan if kind == "skipped" else norm
        values = {"loss": float(loss), "grad_norm": float(norm), "applied": kind != "skipped"}
        reports.append(report(step, objective=name, targets=targets, **values))
    return reports


def judged(detector: SpikeDetector, reports: list[StepReport]) -> list[bool]:
    """As the loop asks and reports: what is no update is not judged."""
    spikes = []
    for one in reports:
        judges = one.applied and one.targets > 0
        found = detector.find(one.step, one.objective, loss=one.loss, grad_norm=one.grad_norm)
        spikes.append(judges and found is not None)
        detector.on_step(StepReport(**{**vars(one), "is_spike": spikes[-1]}))
    return spikes


def plain_account(reports: list[StepReport]) -> list[bool]:
    """The rule, from all steps before: no state is kept."""
    spikes: list[bool] = []
    for number, one in enumerate(reports):
        counts = one.applied and one.targets > 0 and one.step > WARMUP
        before = [
            r
            for r, was_spike in zip(reports[:number], spikes, strict=True)
            if r.objective == one.objective and r.applied and r.targets and r.step > WARMUP and not was_spike
        ][-100:]
        if not counts or len(before) < 20:
            spikes.append(False)
            continue
        loss = statistics.median(r.loss for r in before)
        norm = statistics.median(r.grad_norm for r in before)
        loss_is_high = one.loss > 3 * loss and one.loss > loss + 1
        spikes.append(loss_is_high or (one.grad_norm > 30 * norm and one.grad_norm > 10))
    return spikes


@pytest.mark.parametrize("seed", range(5))
def test_spikes_are_those_of_the_rule(seed):
    reports = drawn(seed)
    found = judged(SpikeDetector(RECIPE), reports)
    assert found == plain_account(reports)
    assert 10 < sum(found) < 100


@pytest.mark.parametrize("seed", range(5))
def test_a_resume_judges_as_if_there_had_been_none(seed):
    reports = drawn(seed)
    whole = SpikeDetector(RECIPE)
    straight = judged(whole, reports)
    for stop in (3, 50, 333):
        first, second = SpikeDetector(RECIPE), SpikeDetector(RECIPE)
        found = judged(first, reports[:stop])
        saved = json.loads(json.dumps(first.state()))
        second.on_start(RunStart(recipe=RECIPE, first_step=stop, total_steps=700, summary={}, saved=saved))
        assert found + judged(second, reports[stop:]) == straight
        assert second.state() == whole.state()


def steady(detector: SpikeDetector, *, steps: int = 40, loss: float = 2.0, norm: float = 1.0) -> int:
    """Let it see ordinary steps; returns the next step."""
    for step in range(WARMUP + 1, WARMUP + 1 + steps):
        detector.on_step(report(step, loss=loss, grad_norm=norm))
    return WARMUP + 1 + steps


@pytest.mark.parametrize("known", [19, 20])
def test_nothing_is_judged_before_twenty_steps_of_an_objective_after_the_warm_up(known):
    detector = SpikeDetector(RECIPE)
    for step in range(1, WARMUP + 1):
        detector.on_step(report(step, loss=2.0))
        assert detector.find(step, "ntp", loss=1e6, grad_norm=1e6) is None
    step = steady(detector, steps=known)
    assert (detector.find(step, "ntp", loss=1e6) is not None) == (known == 20)
    assert detector.find(step, "bico", loss=1e6, grad_norm=1e6) is None


def test_a_divergence_that_lasts_never_becomes_the_measure_and_is_told_once():
    detector = SpikeDetector(RECIPE)
    first = steady(detector)
    told = []
    for step in range(first, first + 300):
        spike = detector.find(step, "ntp", loss=9.0)
        assert spike is not None and spike.median == 2.0
        told.append(detector.is_first("ntp"))
        detector.on_step(report(step, loss=9.0, is_spike=True))
    assert told == [True] + [False] * 299
    for step in range(first + 300, first + 320):
        assert not detector.is_first("ntp")
        detector.on_step(report(step, loss=2.0))
    assert detector.is_first("ntp")


@pytest.mark.parametrize("usual", [0.0, 1e-6, 0.01])
def test_texts_known_by_heart_are_no_reason_to_warn(usual):
    detector = SpikeDetector(RECIPE)
    step = steady(detector, loss=usual, norm=usual)
    assert detector.find(step, "ntp", loss=usual + 0.9, grad_norm=9.0) is None
    assert detector.find(step, "ntp", loss=usual + 1.1) is not None


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_what_is_not_finite_is_left_to_those_who_name_it_so(loss):
    detector = SpikeDetector(RECIPE)
    assert detector.find(steady(detector), "ntp", loss=loss, grad_norm=loss) is None


def test_what_is_said_names_objective_value_and_median():
    detector = SpikeDetector(RECIPE)
    step = steady(detector)
    assert str(detector.find(step, "ntp", loss=7.0)) == (
        "the loss of ntp is 7, over 3 times its running median, 2"
    )
    assert str(detector.find(step, "ntp", loss=2.0, grad_norm=31.0)) == (
        "the gradient norm of ntp is 31, over 30 times its running median, 1"
    )


def test_the_factors_are_the_recipes():
    detector = SpikeDetector(load_recipe("tiny_base", ["training.spike_factors=[1.5, 10]"]))
    for step in range(101, 150):
        detector.on_step(report(step, loss=2.0))
    assert detector.find(150, "ntp", loss=3.1) is not None
    assert detector.find(150, "ntp", loss=2.9, grad_norm=9.0) is None
    assert detector.find(150, "ntp", loss=2.9, grad_norm=11.0) is not None
