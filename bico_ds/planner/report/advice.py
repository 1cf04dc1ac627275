"""What would make a run faster, each change with what it saves: by the planner, which plans the changed recipe, or measured.

Of each kind of change the one that saves most is advised, where it fits into the memory and nothing refuses it. A planned
saving is a range, as both plans are: at the lowest efficiencies that the planner assumes, and at the highest. One that is
less than `LEAST_SAVED` at either end is not advised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bico_ds.config.resources import DS_CONFIGS
from bico_ds.config.sections.model import LOW_PRECISION_CHUNKS
from bico_ds.planner.decisions import with_ds_config, with_values
from bico_ds.planner.flops import head_repeats_logits
from bico_ds.planner.plan import Plan
from bico_ds.planner.ranges import Range
from bico_ds.planner.report.text import MOST_RANKS_IN_BF16

LEAST_SAVED = 0.02
"""Of the time; what saves less is not worth a line."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change of the recipe: `override` as `--set` takes it, and the share of the time per token that it `saves`.

    `middle`: of the middles of the planned times. Of a measured saving: the most that can be saved.
    """

    override: str
    why: str
    saves: Range
    middle: float
    is_measured: bool = False


Changed = tuple[str, Plan]
"""An override, and the plan with it."""


def advise(plan: Plan, *, is_allowed: Callable[[str], bool]) -> list[Advice]:
    """What the planner knows to make a run faster, from what saves most on.

    `is_allowed`: whether a run with this override would begin. Raises `UserError` as `make_plan` does.
    """
    found = (_best(why, plan, changes(plan), is_allowed) for why, changes in _KINDS.items())
    return sorted(filter(None, found), key=lambda advice: -advice.middle)


def of_data_wait(plan: Plan, share: float) -> Advice | None:
    """More threads that build batches, for a step that waits for them for this `share` of its time; None for a small one."""
    if share < LEAST_SAVED:
        return None
    return Advice(
        override=f"data.workers={max(1, 2 * plan.recipe.data.workers)}",
        why="the step waits for its batches, and more threads build them",
        saves=Range(0.0, share),
        middle=share,
        is_measured=True,
    )


def _best(
    why: str, plan: Plan, changes: Iterator[Changed], is_allowed: Callable[[str], bool]
) -> Advice | None:
    advices = [_planned(why, plan, *change) for change in changes if change[1].memory.fits]
    worthy = [advice for advice in advices if advice.saves.low >= LEAST_SAVED]
    worthy.sort(key=lambda advice: -advice.middle)
    return next((advice for advice in worthy if is_allowed(advice.override)), None)


def _planned(why: str, before: Plan, override: str, after: Plan) -> Advice:
    old, new = _seconds_per_token(before), _seconds_per_token(after)
    ends = 1 - new.low / old.low, 1 - new.high / old.high
    saves = Range(min(ends), max(ends))
    return Advice(override=override, why=why, saves=saves, middle=1 - new.middle / old.middle)


def _seconds_per_token(plan: Plan) -> Range:
    """Of a device, and a token of the texts."""
    rate = plan.represented_per_second
    return Range(1 / rate.high, 1 / rate.low)


def _less_recomputation(plan: Plan) -> Iterator[Changed]:
    now = plan.recipe.model.activation_checkpointing
    for every in (0, 8, 4, 3, 2):
        if now and (every == 0 or every > now):
            recipe = with_values(plan.recipe, "model", activation_checkpointing=every)
            yield f"model.activation_checkpointing={every}", plan.changed(recipe)


def _larger_micro_batches(plan: Plan) -> Iterator[Changed]:
    training = plan.recipe.training
    of_rank = training.global_batch_bins // plan.deployment.ranks
    for bins in range(training.micro_batch_bins + 1, of_rank + 1):
        if of_rank % bins == 0:
            recipe = with_values(plan.recipe, "training", micro_batch_bins=bins)
            yield f"training.micro_batch_bins={bins}", plan.changed(recipe)


def _larger_loss_chunks(plan: Plan) -> Iterator[Changed]:
    model, rows = plan.recipe.model, max(batch.head_rows for batch in plan.batches)
    if head_repeats_logits(model, rows):
        chunk = 1 << int(rows / LOW_PRECISION_CHUNKS).bit_length()
        recipe = with_values(plan.recipe, "model", loss_chunk_rows=chunk)
        yield f"model.loss_chunk_rows={chunk}", plan.changed(recipe)


def _other_backend(plan: Plan) -> Iterator[Changed]:
    if plan.recipe.model.attention_backend != "auto":
        recipe = with_values(plan.recipe, "model", attention_backend="auto")
        yield "model.attention_backend=auto", plan.changed(recipe)


def _other_ds_config(plan: Plan) -> Iterator[Changed]:
    """But for those that offload what this one does not: the host's own memory is no faster, wherever the ranks are."""
    for file in sorted(DS_CONFIGS.glob("*.json")):
        if file.stem != str(plan.recipe.deepspeed.config):
            changed = plan.changed(with_ds_config(plan.recipe, file.stem))
            if changed.deployment.zero.offload_optimizer in ("none", plan.deployment.zero.offload_optimizer):
                yield f"deepspeed.config={file.stem}", changed


def _gradients_sent_in_bf16(plan: Plan) -> Iterator[Changed]:
    recipe, deployment = plan.recipe, plan.deployment
    is_in_fp32 = deployment.zero.communication_bytes == 4 and recipe.model.dtype == "bf16"
    if is_in_fp32 and deployment.ranks <= MOST_RANKS_IN_BF16:
        overrides = {**recipe.deepspeed.overrides, "communication_data_type": "bf16"}
        changed = plan.changed(with_values(recipe, "deepspeed", overrides=overrides))
        yield "deepspeed.overrides.communication_data_type=bf16", changed


_KINDS: dict[str, Callable[[Plan], Iterator[Changed]]] = {
    "fewer layers are computed a second time, and it still fits": _less_recomputation,
    "fewer passes: weights are gathered and gradients reduced less often": _larger_micro_batches,
    "logits are computed once": _larger_loss_chunks,
    "the kernels that are chosen by themselves do less": _other_backend,
    "less is sent, or copied to the host and back": _other_ds_config,
    "half as much of gradients is sent (error: docs/benchmarks/communication.md)": _gradients_sent_in_bf16,
}
