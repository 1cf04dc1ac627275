"""What a plan helps to decide: the change that would fit, the largest micro-batch, other nodes, other ZeRO variants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from bico_ds.config.paths import LocalPath
from bico_ds.config.resources import DS_CONFIGS
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.model import LoraSpec
from bico_ds.planner.items import Item
from bico_ds.planner.memory import device_memory
from bico_ds.planner.plan import Plan
from bico_ds.planner.workload import micro_batches

# An evaluation or checkpoint that takes more of the run than this is worth a warning.
NOTABLE_SHARE = 0.05
# Rows of logits at a time that take little memory beside a layer, and are not yet slow.
_FEW_LOSS_ROWS = 128
_MOST_NODES = 1024
_MOST_MICRO_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something of a run that may be changed: `words`, options of `bico-ds plan` that do it, and the plan with it."""

    words: tuple[str, ...]
    plan: Plan


Step = Callable[[Plan], Change | None]
"""A kind of change, made as far as it has to be for the plan to fit; None where there is nothing to change."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """`micro_batch`: the most bins that fit at once, 0 where one does not. `variants`: by the names of ds_configs/."""

    micro_batch: int
    change: Change | None
    nodes: tuple[Plan, ...]
    variants: dict[str, Plan]


def decide(plan: Plan) -> Decisions:
    """All decisions; a change is looked for where the plan does not fit."""
    return Decisions(
        micro_batch=largest_micro_batch(plan),
        change=find_change(plan),
        nodes=over_nodes(plan),
        variants=over_variants(plan),
    )


def largest_item(plan: Plan) -> Item:
    """What takes most of the device's memory at the peak."""
    return max(plan.memory.peak.items, key=lambda item: item.bytes.high)


def largest_micro_batch(plan: Plan) -> int:
    """The most bins of a micro-batch whose upper bound fits, the global batch growing with it; 0: not even one does.

    By false position: memory grows about in proportion to the bins, so that few are tried.
    """
    recipe = plan.recipe

    def left(bins: int) -> float:
        batch = bins * plan.deployment.ranks
        changed = with_values(recipe, "training", micro_batch_bins=bins, global_batch_bins=batch)
        batches = micro_batches(changed, plan.texts, fullest=True)
        memory = device_memory(changed, plan.architecture, plan.deployment, batches)
        return memory.available - memory.peak.bytes.high

    low, high = 1, most_micro_batch(recipe)
    left_low, left_high = left(low), left(high)
    if left_low < 0 or left_high >= 0:
        return 0 if left_low < 0 else high
    while high - low > 1:
        guess = low + int((high - low) * left_low / (left_low - left_high))
        guess = min(max(guess, low + 1), high - 1)
        if (found := left(guess)) >= 0:
            low, left_low = guess, found
        else:
            high, left_high = guess, found
    return low


def most_micro_batch(recipe: Recipe) -> int:
    """Bins beyond which no micro-batch is tried; a batch's rows have to be numbered in 32 bits, too."""
    return max(1, min(_MOST_MICRO_BATCH, (2**31 - 1) // recipe.data.capacity))


def over_nodes(plan: Plan) -> tuple[Plan, ...]:
    """The plan on 1, 2, 4 … nodes, and on its own number, as far as the global batch divides over their ranks."""
    counts = {2**power for power in range(_MOST_NODES.bit_length())} | {plan.deployment.nodes}
    return tuple(
        plan if nodes == plan.deployment.nodes else plan.changed(plan.recipe, nodes=nodes)
        for nodes in sorted(counts)
        if _divides(plan, nodes * plan.deployment.ranks_per_node)
    )


def over_variants(plan: Plan) -> dict[str, Plan]:
    """The plan with each file of ds_configs/, and with its own."""
    own = str(plan.recipe.deepspeed.config)
    names = sorted({own, *(file.stem for file in DS_CONFIGS.glob("*.json"))})
    return {name: plan if name == own else plan.changed(with_ds_config(plan.recipe, name)) for name in names}


def suggest(plan: Plan) -> str | None:
    """The cheapest change with which the plan fits, as a sentence; None where it fits, or nothing known makes it fit."""
    change = find_change(plan)
    return None if change is None else f"{' '.join(change.words)} would fit"


def find_change(plan: Plan) -> Change | None:
    """The cheapest change with which the plan fits: one alone, else as few as do together; None as for `suggest`.

    From what costs only time to what changes the training: recompute layers, fewer bins at once, fewer rows of logits at
    once, weights divided too, more GPUs, the optimizer in host memory, adapters alone.
    """
    if plan.memory.fits:
        return None
    tried = _Tried(plan)
    together = (_STEPS[:count] for count in range(2, len(_STEPS) + 1))
    for steps in chain(((step,) for step in _STEPS), together):
        if _fits(tried.after(steps)):
            return tried.after(_needed(tried, steps))
    return None


class _Tried:
    """Changes of one plan, each planned once: what steps lead to, by the words that led there."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.made: dict[tuple[tuple[str, ...], Step], Change | None] = {}

    def after(self, steps: Sequence[Step]) -> Change | None:
        """One step after the other, as far as there is something to change; None where there is nothing."""
        now = Change(words=(), plan=self.plan)
        for step in steps:
            if (now.words, step) not in self.made:
                self.made[now.words, step] = step(now.plan)
            if (change := self.made[now.words, step]) is not None:
                now = Change(words=(*now.words, *change.words), plan=change.plan)
        return now if now.words else None


def _needed(tried: _Tried, steps: Sequence[Step]) -> Sequence[Step]:
    """Of steps that fit together those without which they do not; the dearest are left out first."""
    for step in reversed(steps):
        rest = [other for other in steps if other is not step]
        if _fits(tried.after(rest)):
            steps = rest
    return steps


def _fits(change: Change | None) -> bool:
    return change is not None and change.plan.memory.fits


def _recomputing(plan: Plan) -> Change | None:
    if plan.recipe.model.activation_checkpointing == 1:
        return None
    recipe = with_values(plan.recipe, "model", activation_checkpointing=1)
    return _set("model.activation_checkpointing=1", plan.changed(recipe))


def _smaller_micro_batch(plan: Plan) -> Change | None:
    """The largest divisor that fits, else one bin."""
    bins = plan.recipe.training.micro_batch_bins
    return _first_that_fits(
        _set(
            f"training.micro_batch_bins={number}",
            plan.changed(with_values(plan.recipe, "training", micro_batch_bins=number)),
        )
        for number in range(bins - 1, 0, -1)
        if bins % number == 0
    )


def _fewer_loss_rows(plan: Plan) -> Change | None:
    if plan.recipe.model.loss_chunk_rows <= _FEW_LOSS_ROWS:
        return None
    recipe = with_values(plan.recipe, "model", loss_chunk_rows=_FEW_LOSS_ROWS)
    return _set(f"model.loss_chunk_rows={_FEW_LOSS_ROWS}", plan.changed(recipe))


def _divided_weights(plan: Plan) -> Change | None:
    zero = plan.deployment.zero
    if zero.stage == 3 and zero.secondary_ranks is None:
        return None
    return _set("deepspeed.config=zero3_bf16", plan.changed(with_ds_config(plan.recipe, "zero3_bf16")))


def _more_devices(plan: Plan) -> Change | None:
    """Fuller nodes, then more of them: the first that fits, else the most over whose ranks the global batch divides."""
    nodes, per_node = plan.deployment.nodes, plan.deployment.ranks_per_node
    usual = max(per_node, plan.deployment.device.per_node)
    on_gpus = plan.deployment.device.kind == "cuda"
    fuller = ((nodes, ranks) for ranks in range(per_node + 1, usual + 1))
    more = ((more, usual) for more in range(nodes + 1, _MOST_NODES + 1))
    return _first_that_fits(
        Change(
            words=(f"--nodes {n} --gpus-per-node {ranks}" if on_gpus else f"{n} nodes of {ranks} ranks",),
            plan=plan.changed(plan.recipe, nodes=n, ranks_per_node=ranks),
        )
        for n, ranks in chain(fuller, more)
        if _divides(plan, n * ranks)
    )


def _offloaded(plan: Plan) -> Change | None:
    if plan.deployment.device.kind == "cpu" or plan.deployment.zero.offload_optimizer != "none":
        return None
    changed = plan.changed(with_ds_config(plan.recipe, "zero3_offload_cpu"))
    return _set("deepspeed.config=zero3_offload_cpu", changed)


def _adapters_alone(plan: Plan) -> Change | None:
    if plan.recipe.model.lora is not None:
        return None
    return _set("model.lora={}", plan.changed(with_values(plan.recipe, "model", lora=LoraSpec())))


_STEPS: tuple[Step, ...] = (
    _recomputing,
    _smaller_micro_batch,
    _fewer_loss_rows,
    _divided_weights,
    _more_devices,
    _offloaded,
    _adapters_alone,
)


def _first_that_fits(changes: Iterable[Change]) -> Change | None:
    """Of changes from the cheapest on; the last where none fits, None where there is none."""
    change = None
    for change in changes:
        if change.plan.memory.fits:
            break
    return change


def _set(override: str, plan: Plan) -> Change:
    return Change(words=(f"--set {override}",), plan=plan)


def _divides(plan: Plan, ranks: int) -> bool:
    training = plan.recipe.training
    return training.global_batch_bins % (training.micro_batch_bins * ranks) == 0


def with_ds_config(recipe: Recipe, name: str) -> Recipe:
    """The recipe with another file of ds_configs/."""
    return with_values(recipe, "deepspeed", config=LocalPath(name))


def with_values(recipe: Recipe, section: str, **values: object) -> Recipe:
    """The recipe with other values in one section."""
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
