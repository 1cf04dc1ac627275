"""Show a micro-batch of a run as the model gets it.

What is shown: tokens, placeholders, positions, predictions, and which tokens see which.

    bico-ds inspect --recipe tiny_bico --step 3
    bico-ds inspect --recipe tiny_bico --objective bico --png visibility.png

It is the batch that training would build, of any step of the run and any rank.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.arguments import add_recipe_options, local_path, not_negative, positive
from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.load import load_recipe

if TYPE_CHECKING:
    from bico_ds.batch import PackedBatch
    from bico_ds.data.loading.batch_view import Decode
    from bico_ds.data.loading.sample_order import StreamReport
    from bico_ds.objectives.schedule import ObjectiveSchedule


_BLOCK = 1 << 16  # steps that are drawn at once
_MOST_DRAWN, _MOST_EPOCHS = 10_000_000, 1000


def add_options(parser: ArgumentParser) -> None:
    add_recipe_options(parser)
    parser.add_argument(
        "--step",
        type=not_negative,
        metavar="N",
        default=0,
        help="optimizer step, from 0 (default: %(default)s)",
    )
    parser.add_argument(
        "--objective", metavar="NAME", help="the first step from --step on that has this objective"
    )
    parser.add_argument(
        "--rank", type=not_negative, metavar="N", default=0, help="whose batch (default: %(default)s)"
    )
    parser.add_argument(
        "--world-size", type=positive, metavar="N", default=1, help="ranks of the run (default: %(default)s)"
    )
    parser.add_argument(
        "--micro-batch", type=not_negative, metavar="N", default=0, help="of the step (default: %(default)s)"
    )
    parser.add_argument(
        "--documents",
        type=not_negative,
        metavar="N",
        default=6,
        help="documents shown (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=not_negative,
        metavar="N",
        default=64,
        help="tokens shown of each (default: %(default)s)",
    )
    parser.add_argument(
        "--png",
        metavar="FILE",
        type=picture,
        help="write the visibility matrix of the batch's shortest document",
    )


def picture(text: str) -> Path:
    """The type of an argument: a path that ends in .png."""
    if not text.lower().endswith(".png"):
        raise ArgumentTypeError(f"'{text}' must end in .png")
    return local_path(text)


def step_with(schedule: ObjectiveSchedule, name: str | None, first: int, total: int) -> int:
    """Return the first step from `first` on, of `total`, that has the objective. Raises `UserError` where there is none."""
    names = [objective.name for objective in schedule.objectives]
    if name is None:
        return first
    if name not in names:
        raise UserError(f"--objective {name}: the recipe has {', '.join(names)}{did_you_mean(name, names)}")
    for start in range(first, total, _BLOCK):
        drawn = schedule.indices(start, min(start + _BLOCK, total))
        if (is_it := drawn == names.index(name)).any():
            return start + int(is_it.argmax())
    raise UserError(f"--objective {name}: none of the run's {total:,} steps from step {first:,} on has it")


def check_reach(step: int, total: int, streams: Sequence[StreamReport], global_batch_bins: int) -> None:
    """Raise `UserError` for a step that the run of `total` steps does not have, or that would not be found in seconds.

    Where a stream of bins stands at a step is counted: with several by drawing the objectives of all steps before it, and
    where data epochs differ by mixing all those before it.
    """
    if step >= total:
        raise UserError(
            f"--step {step}: the run has {total:,} steps, from 0 to {total - 1}; to see what a longer one would read, "
            "give it more training.steps, or training.epochs"
        )
    if len(streams) > 1 and step > _MOST_DRAWN:
        raise UserError(
            f"--step {step}: the objectives of all steps before it would have to be drawn; give at most {_MOST_DRAWN}"
        )
    for stream in streams:
        if any(not passes.is_integer() for passes in stream.passes.values()):
            most = _MOST_EPOCHS * stream.bins // global_batch_bins
            if step > most:
                raise UserError(
                    f"--step {step}: all data epochs before it would have to be mixed, since each is another; give at most "
                    f"{most}"
                )


def inspect(options: Namespace) -> None:
    """Build the step's micro-batch of that rank, print it, and draw it on request."""
    from bico_ds.data.loading.batch_view import print_batch, shown_text
    from bico_ds.data.loading.loader import RankShare
    from bico_ds.training import assembly

    recipe = load_recipe(options.recipe, [*options.overrides, "data.workers=0"])
    if options.rank >= options.world_size:
        raise UserError(
            f"--rank {options.rank}: ranks count from 0, and --world-size is {options.world_size}"
        )
    global_bins, micro_bins = recipe.training.global_batch_bins, recipe.training.micro_batch_bins
    micro_batches_per_rank(global_bins, micro_bins, options.world_size)
    inputs = assembly.open_inputs(recipe, weights_needed=False)
    share = RankShare(rank=options.rank, world_size=options.world_size, micro_batch_bins=micro_bins)
    loader = assembly.build_loader(recipe, inputs, share)
    steps = assembly.total_steps(recipe, loader)
    check_reach(options.step, steps, loader.report(), global_bins)
    step = step_with(loader.schedule, options.objective, options.step, steps)
    check_reach(step, steps, loader.report(), global_bins)
    rank_step = loader.step(step)
    if options.micro_batch >= len(rank_step.batches):
        raise UserError(
            f"--micro-batch {options.micro_batch}: a step has {len(rank_step.batches)} of them per rank"
        )
    batch = rank_step.batches[options.micro_batch]
    decode = shown_text(inputs.tokenizer)
    terminal = sys.stdout.isatty()
    console = Console(soft_wrap=not terminal, width=None if terminal else 160, markup=False)
    console.print(
        f"step {step} of {steps}, objective {rank_step.objective}, "
        f"rank {options.rank} of {options.world_size}, micro-batch {options.micro_batch} of {len(rank_step.batches)}"
    )
    print_batch(
        console,
        batch,
        decode,
        source_names=loader.source_names,
        taken=rank_step.room_taken[options.micro_batch],
        room=recipe.data.capacity * micro_bins,
        most_documents=options.documents,
        most_tokens=options.tokens,
    )
    if options.png is not None:
        draw(batch, decode, options.png, console)
    # Last: a batch without a target shows why a run would be refused.
    for warning in loader.check_targets():
        console.print(f"warning: {warning}", highlight=False)


def draw(batch: PackedBatch, decode: Decode, file: Path, console: Console) -> None:
    """Draw which tokens see which in the shortest document that has more than one token."""
    from bico_ds.data.loading.batch_view import plot_visibility, view_batch

    views = sorted((v for v in view_batch(batch) if len(v.tokens) > 1), key=lambda v: len(v.tokens))
    if not views:
        raise UserError("--png: no document of the batch has two tokens, so no token sees another")
    if len(views[0].tokens) > 200:
        raise UserError(
            f"--png: the shortest document has {len(views[0].tokens)} tokens, too many for a picture"
        )
    try:
        plot_visibility(views[0], batch.plan.mode, decode, file)
    except OSError as error:
        raise UserError(f"--png: cannot write '{file}': {error.strerror}") from error
    console.print(f"visibility of document {views[0].id}: {file}")


main = Command(
    description=__doc__, add_options=add_options, run=inspect, only_shows=lambda options: options.png is None
)


if __name__ == "__main__":
    main.start()
