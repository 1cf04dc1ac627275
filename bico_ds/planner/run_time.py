"""How long a run takes, with its evaluations and checkpoints, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.communication import gather_all_weights
from bico_ds.planner.deployment import ELEMENT_BYTES, Deployment
from bico_ds.planner.ranges import Range
from bico_ds.planner.step_time import MEMORY_EFFICIENCY, StepTime
from bico_ds.planner.storage import checkpoint_bytes, export_bytes

# A bf16 copy of this many parameters fits beside a training state on an 80 GB GPU; larger models generate partitioned.
REPLICA_PARAMETERS = 4_000_000_000

# Of a decoder layer in a forward pass of generation, by Hugging Face's modules: Python and launches of kernels.
LAYER_SECONDS = Range(0.3e-3, 1.2e-3)
# Prompts of a task whose files are not read here: as many as the published set has (arXiv 2309.12288).
ASSUMED_PROMPTS = 300
# An answer is cut at twice the longest right one plus 8 tokens (`bico_ds.evaluation.run_tasks`), one token at least.
SHORTEST_ANSWER = 10


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that stops the training now and then: seconds of one, how many there are, their share of the run."""

    name: str
    seconds: Range
    count: int
    share: Range
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """A whole run; None where its number of steps is not known. `cost` in the unit of the price per GPU-hour.

    Without a number of steps, `events` are those that come every so many steps: one of each, and its share until the next.
    """

    steps: int | None
    mean_step_seconds: Range
    events: tuple[Event, ...]
    hours: Range | None
    device_hours: Range | None
    cost: Range | None


@dataclass(frozen=True, kw_only=True)
class _Stop:
    """An event before its share is known. `every`: steps between two; None: once, at the end."""

    name: str
    seconds: Range
    every: int | None
    how: str

    def count(self, steps: int) -> int:
        """Every so many steps, and after the last one."""
        return 1 if self.every is None else math.ceil(steps / self.every)


def run_time(
    recipe: Recipe,
    architecture: Architecture,
    deployment: Deployment,
    steps: int | None,
    step_times: Sequence[StepTime],
    *,
    price: float | None,
    disk_bandwidth: Range,
) -> RunTime:
    """Steps at the objectives' probabilities, and everything between them.

    `step_times`: of each objective; `price` per device and hour; `disk_bandwidth`: bytes per second of all nodes together.
    Loading, the start and the search of training texts for questions are not planned.
    """
    mean = Range(
        sum(step.probability * step.seconds.low for step in step_times),
        sum(step.probability * step.seconds.high for step in step_times),
    )
    stops = [
        *_evaluations(recipe, architecture, deployment),
        *_writings(recipe, architecture, deployment, disk_bandwidth),
    ]
    if steps is None:
        events = tuple(
            Event(
                name=stop.name,
                seconds=stop.seconds,
                count=1,
                share=_share(stop.seconds, mean.times(stop.every)),
                how=stop.how,
            )
            for stop in stops
            if stop.every is not None
        )
        return RunTime(
            steps=None, mean_step_seconds=mean, events=events, hours=None, device_hours=None, cost=None
        )
    seconds = {stop.name: stop.seconds.times(stop.count(steps)) for stop in stops}
    total = sum(seconds.values(), mean.times(steps))
    hours = total.times(1 / 3600)
    device_hours = hours.times(deployment.ranks)
    return RunTime(
        steps=steps,
        mean_step_seconds=mean,
        events=tuple(
            Event(
                name=stop.name,
                seconds=stop.seconds,
                count=stop.count(steps),
                share=_share(seconds[stop.name], _without(total, seconds[stop.name])),
                how=stop.how,
            )
            for stop in stops
        ),
        hours=hours,
        device_hours=device_hours,
        cost=None if price is None else device_hours.times(price),
    )


def _without(total: Range, part: Range) -> Range:
    return Range(total.low - part.low, total.high - part.high)


def _share(part: Range, rest: Range) -> Range:
    """Of the part in the whole: smallest where the part is short and the rest long."""
    return Range(part.low / (part.low + rest.high), part.high / (part.high + rest.low))


def _evaluations(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> list[_Stop]:
    """Generation for every task, and the log-probability test: forward passes of full batches on all ranks."""
    spec = recipe.evaluation
    if not spec.task_names:
        return []
    prompts, source = prompts_per_task(recipe)
    candidates = 0 if spec.likelihood_others is None else 1 + spec.likelihood_others
    together = spec.batch_size * deployment.ranks
    answers = Range(min(spec.max_new_tokens, SHORTEST_ANSWER), spec.max_new_tokens)
    passes = Range.exactly(0)
    for count in prompts.values():
        scored = Range.exactly(math.ceil(count * candidates / together))
        passes += answers.times(math.ceil(count / together)) + scored
    each, start, how = _forward_pass(recipe, architecture, deployment)
    seconds = Range(passes.low * each.low + start.low, passes.high * each.high + start.high)
    asked = f"{sum(prompts.values()):,} prompts ({source}), {passes.low:.0f} to {passes.high:.0f} forward passes; {how}"
    return [_Stop(name="evaluation", seconds=seconds, every=spec.every_steps, how=asked)]


def prompts_per_task(recipe: Recipe) -> tuple[dict[str, int], str]:
    """The number of prompts of each of the recipe's tasks, and where it is known from.

    The embedded task asks about each person that is trained in one order only, in the order that was trained (n2d, d2n) and
    in the other (`bico_ds.data.prepare.facts`). Files of an `evaluation.folder`, and others of the user, are not read.
    """
    spec, facts = recipe.evaluation, recipe.data.facts
    if spec.folder is None:
        persons = {"n2d": facts.name_first, "d2n": facts.description_first}
        counts = {
            task: persons.get(task.removesuffix("_reverse"), 0) * facts.test_prompts
            for task in spec.reversal_tasks
        }
        source = "the embedded task"
    else:
        counts, source = dict.fromkeys(spec.reversal_tasks, spec.limit or ASSUMED_PROMPTS), "assumed"
    if spec.limit is not None:
        counts, source = (
            {task: min(count, spec.limit) for task, count in counts.items()},
            "evaluation.limit at most",
        )
    for own in spec.question_files:
        limit = own.limit or spec.limit
        counts |= dict.fromkeys(own.task_names, limit or ASSUMED_PROMPTS)
        source = (source if spec.reversal_tasks else "limit at most") if limit else "assumed"
    return counts, source


def _forward_pass(
    recipe: Recipe, architecture: Architecture, deployment: Deployment
) -> tuple[Range, Range, str]:
    """Seconds of one forward pass of a batch of single tokens, seconds before the first one, and how they come about.

    A pass reads all weights from memory once. Under ZeRO-3 a replica's weights are gathered at the start; a larger model
    gathers all of them in every pass (`bico_ds.training.evaluator`).
    """
    size = _model_bytes(recipe, architecture)
    bandwidth = deployment.device.memory_bandwidth
    read = Range(size / bandwidth / MEMORY_EFFICIENCY.high, size / bandwidth / MEMORY_EFFICIENCY.low)
    each = read + LAYER_SECONDS.times(architecture.layers)
    if deployment.zero.stage < 3 or deployment.ranks == 1:
        return each, Range.exactly(0), "every rank has all weights"
    gathering = gather_all_weights(recipe.model, architecture, deployment)
    if architecture.parameters <= REPLICA_PARAMETERS:
        return each, gathering.seconds, f"weights are gathered once, {size / 1e9:.3g} GB"
    return (
        each + gathering.seconds,
        Range.exactly(0),
        f"each gathers all weights of the partitioned model, {size / 1e9:.3g} GB",
    )


def _model_bytes(recipe: Recipe, architecture: Architecture) -> float:
    return float(architecture.parameters * ELEMENT_BYTES[recipe.model.dtype])


def _writings(
    recipe: Recipe, architecture: Architecture, deployment: Deployment, disk_bandwidth: Range
) -> list[_Stop]:
    """Checkpoints, read once more for their checksums at most, and the export at the end."""
    spec, size = recipe.checkpoint, checkpoint_bytes(recipe, architecture, deployment.zero)
    stops = [
        _Stop(
            name="checkpoint",
            seconds=Range(size / disk_bandwidth.high, 2 * size / disk_bandwidth.low),
            every=spec.every_steps,
            how=f"{size / 1e9:.3g} GB, written, and read again for checksums where the system has not kept them",
        )
    ]
    if spec.export:
        size = export_bytes(recipe, architecture)
        seconds = Range(size / disk_bandwidth.high, size / disk_bandwidth.low)
        stops.append(
            _Stop(name="export", seconds=seconds, every=None, how=f"{size / 1e9:.3g} GB, at the end")
        )
    return stops
