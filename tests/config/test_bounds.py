"""Numbers of a recipe and of command lines: what makes no sense is refused with its key and the reason."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from bico_ds.common.errors import UserError
from bico_ds.config import arguments
from bico_ds.config.bounds import Bound
from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.table import KINDS
from bico_ds.config.schema import Recipe
from bico_ds.config.section import Section
from bico_ds.config.sections.data import DataSpec, SourceSpec
from bico_ds.config.sections.evaluation import QuestionFileSpec, TextTaskSpec
from bico_ds.config.sections.optimizer import OptimizerSpec
from bico_ds.optim.schedule import check_schedule

# Sections that must be there before a key in them can be set.
TWO_OBJECTIVES = (
    "objectives=[{kind: ntp, probability: 0.5}, {kind: bico, probability: 0.5, mask: {rate: [0.1, 1]}}]"
)
SECTIONS = (
    "optimizer.betas=[0.9, 0.99]",
    "training.spike_factors=[3, 30]",
    "model.lora={}",
    "evaluation.tasks=[{name: other, file: x}, {kind: pairs, name: company, file: x}]",
    TWO_OBJECTIVES,
)


def numeric_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """The dotted key of every number that a recipe may hold."""
    for name, field in section.model_fields.items():
        key = prefix + name
        if name == "objectives":
            for number, kind in enumerate(("ntp", "bico")):
                yield from numeric_keys(KINDS[kind].spec, f"{key}.{number}.")
        elif section is DataSpec and name == "sources":
            yield from numeric_keys(SourceSpec, f"{key}.0.")
        elif name == "tasks":
            yield from numeric_keys(TextTaskSpec, f"{key}.0.")
            yield from numeric_keys(QuestionFileSpec, f"{key}.1.")
        else:
            yield from keys_in(field.annotation, key)


def keys_in(annotation: Any, key: str) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from numeric_keys(annotation, f"{key}.")
    elif annotation in (int, float):
        yield key
    elif getattr(annotation, "__origin__", None) is tuple:
        yield from (f"{key}.{number}" for number in range(len(get_args(annotation))))
    else:
        found = [inner for part in get_args(annotation) for inner in keys_in(part, key)]
        yield from dict.fromkeys(found)


KEYS = sorted({*numeric_keys()} - {"objectives.1.mask.rate"})


def error_of(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe("tiny_base", overrides)
    return str(caught.value)


def test_the_keys_of_a_recipe_that_take_numbers_are_found():
    assert {"seed", "model.lora.rank", "optimizer.betas.1", "data.sources.0.weight", "objectives.1.mask.mean_span",
            "objectives.1.mask.rate.0", "distributed.timeout_minutes"} <= {*KEYS}  # fmt: skip
    assert len(KEYS) > 45


# What the run itself bounds later: persons, steps, prompts, texts, token ids, matrices; and how many checkpoints are kept.
BOUNDED_LATER = ("objectives.1.mask.mean_span", "data.facts.", "checkpoint.keep_last", "evaluation.limit",
                 "evaluation.likelihood_others", "evaluation.batch_size", "schedule.", "model.lora.rank",
                 "objectives.1.placeholder_id", "evaluation.tasks.0.tokens", "evaluation.tasks.1.limit")  # fmt: skip
HUGE = [key for key in KEYS if not key.startswith(BOUNDED_LATER) or key == "data.facts.seed"]


@pytest.mark.parametrize("value", [".nan", "-.inf", "true", "false", "'5'", "-1.0e+300"])
@pytest.mark.parametrize("key", KEYS)
def test_no_key_takes_what_is_no_number(key, value):
    assert named(key) in error_of(*SECTIONS, f"{key}={value}")


@pytest.mark.parametrize("key", HUGE)
def test_no_key_takes_a_number_without_an_end(key):
    message = error_of(*SECTIONS, f"{key}=1{'0' * 400}")
    assert named(key) in message and len(message) < 2000


def named(key: str) -> str:
    """How a message begins about this key; pydantic names no member of the range of rates."""
    return "objectives.1.mask.rate" if key.startswith("objectives.1.mask.rate") else f"{key}: "


@pytest.mark.parametrize("key", sorted({*KEYS} - {"objectives.1.mask.mean_span"}))
def test_infinity_is_for_spans_alone(key):
    assert "finite" in error_of(*SECTIONS, f"{key}=.inf")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=100000000000000000000", "at most 18,446,744,073,709,551,615, found 100000000000000000000: draws"),
        ("optimizer.lr=.inf", "must be a finite number, found inf"),
        ("optimizer.lr=1000", "must be at most 1, found 1000: a step moves each weight by about lr"),
        ("optimizer.lr=1.0e-300", "must be at least 1e-12"),
        ("optimizer.betas=[2, 3]", "optimizer.betas.0: must be less than 1, found 2"),
        ("optimizer.betas=[-0.1, 0.9]", "optimizer.betas.0: must be at least 0"),
        ("optimizer.eps=1.0e+30", "must be at most 1"),
        ("optimizer.eps=1.0e-300", "must be at least 1e-20"),
        ("optimizer={lr: 0.5, weight_decay: 2}", "'lr' times 'weight_decay' must be less than 1, found 1"),
        ("training.steps=1000000000000000", "must be at most 1,000,000,000"),
        ("training.steps=2.5", "training.steps: "),
        ("training.global_batch_bins=1000000000000", "a step of more never ends"),
        ("data.capacity=1000000000000", "must be at most 16,777,216"),
        ("training={steps: 3, global_batch_bins: 256, micro_batch_bins: 256}", ""),
        ("training.max_grad_norm=1.0e-30", "'max_grad_norm' must be 0 (no limit) or at least 1e-06, found 1e-30"),
        ("data.workers=1000000", "must be at most 1,024"),
        ("data.sources.0.weight=.inf", "must be a finite number"),
        ("data.sources.0.epochs=1.0e+300", "must be at most 10,000"),
        ("model.lora={alpha: .inf}", "model.lora.alpha: must be a finite number"),
        ("model.lora={alpha: 1.0e-300}", "scaled by alpha / rank"),
        ("model.lora={rank: true}", "must be a number, found True"),
        ("objectives=[{kind: bico, mask: {rate: [0, 0]}}]", "nothing is masked"),
        ("distributed.timeout_minutes=1.0e+300", "must be at most 1e+06"),
        ("distributed.watchdog_minutes=1.0e-300", "must be at least 0.001"),
    ],
)  # fmt: skip
def test_an_impossible_value_is_refused_with_the_reason(override, words):
    more = ("data.capacity=16777216",) if not words else ()
    assert (words or "must be less than 2,147,483,648, found 4,294,967,296") in error_of(override, *more)


@pytest.mark.parametrize(
    "override",
    ["seed=20261126014500", "seed=-9223372036854775808", "seed=18446744073709551615", "training.steps=1.0e+3",
     "checkpoint.keep_last=1000000000000", "objectives=[{kind: bico, mask: {rate: 1.0}}]", "optimizer.lr=1",
     "training.max_grad_norm=0", "optimizer.weight_decay=0.99"],
)  # fmt: skip
def test_what_is_unusual_and_makes_sense_is_accepted(override):
    assert load_recipe("tiny_base", [override])


def test_a_step_shrinks_weights_and_never_flips_them():
    drawn = random.Random()
    for _ in range(200):
        lr, decay = 10 ** drawn.uniform(-6, 0), 10 ** drawn.uniform(-3, 6)
        try:
            OptimizerSpec(lr=lr, weight_decay=decay)
        except ValidationError:
            assert 1 - lr * decay <= 0
        else:
            assert 1 - lr * decay > 0


def test_a_bound_holds_what_plain_comparisons_hold():
    drawn = random.Random()
    for _ in range(500):
        low, high = sorted(drawn.uniform(-5, 5) for _ in range(2))
        value = drawn.choice([drawn.uniform(-6, 6), low, high, math.nan, math.inf, -math.inf])
        assert (Bound(least=low, most=high, why="x").problem(value) is None) == (low <= value <= high)
        assert (Bound(above=low, below=high, why="x").problem(value) is None) == (low < value < high)


def test_numbers_as_text_are_refused_and_whole_floats_are_whole_numbers():
    class Mine(Section):
        count: Annotated[int, Bound(least=1, why="it counts")] = 1

    assert type(Mine(count=2.0).count) is int
    for value in ("5", True, 2.5, None, [1], math.inf):
        with pytest.raises(ValidationError):
            Mine(count=value)


@pytest.mark.parametrize("warmup", [10**6, 301])
def test_a_schedule_longer_than_the_run_is_refused(warmup):
    recipe = load_recipe("tiny_base", [f"schedule={{name: cosine, warmup_steps: {warmup}}}"])
    with pytest.raises(UserError, match="more than the 300 steps"):
        check_schedule(recipe.schedule, 300)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (arguments.positive, "0", "must be at least 1, found 0"),
        (arguments.positive, str(10**18), "must be at most 2,147,483,647"),
        (arguments.positive, "2.5", "'2.5' is not an integer"),
        (arguments.not_negative, "-1", "must be at least 0, found -1"),
        (arguments.seed, str(2**64), "must be at most 18,446,744,073,709,551,615"),
        (arguments.positive_number, "nan", "must be a finite number"),
        (arguments.positive_number, "1e-300", "must be at least 1e-06"),
        (arguments.positive_number, "1e300", "must be at most 1e+06"),
        (arguments.positive_number, "inf", "must be a finite number"),
        (arguments.positive_number, "１.5", "'１.5' is not a number"),
        (arguments.number, "nan", "must be a finite number"),
        (arguments.number, "-inf", "must be a finite number"),
        (arguments.positive, "²", "'²' is not an integer"),
        (arguments.positive, "٣", "'٣' is not an integer"),
        (arguments.seed, "9" * 5000, "…' is not an integer"),
    ],
)
def test_an_option_is_bounded_too(kind, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert words in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("key", ["evaluation.likelihood_others", "evaluation.limit", "checkpoint.keep_last"])
def test_numbers_of_things_are_such_as_can_be_at_hand(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: must be at most 1,000,000,000,000, found"):
        load_recipe("tiny_bico", [f"{key}={2**63}"])
