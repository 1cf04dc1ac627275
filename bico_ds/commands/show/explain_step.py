"""Show where a step of a recipe goes on this machine, beside what the planner says of it, and what would make it faster.

    bico-ds explain-step tiny_bico --ranks 2
    bico-ds explain-step --run runs/tiny_bico       a profile that `bico-ds train --profile` made; trains nothing

Without --run it trains a few steps in a temporary folder; a store of its data is cached, as a run's. A step by its parts,
for each objective: seconds while it was recorded, which takes time of its own, most of all on a CPU. An advice is a change
of the recipe that saves 2 % of the time or more: by the planner, which plans the changed recipe for the same devices, or
measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bico_ds.commands.demo import launched, training_program
from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, is_number
from bico_ds.config.arguments import RECIPE_HELP, add_overrides_option, local_path, path_text, positive
from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.data.planned_texts import texts_of
from bico_ds.planner.devices import DEVICES, Device, cpu_device
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.ranges import Range
from bico_ds.planner.report.advice import Advice, advise, of_data_wait
from bico_ds.planner.report.quantities import percent, time
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.planner.step_time import StepTime
from bico_ds.runtime.launch_environment import is_launched
from bico_ds.runtime.run_folder import RunFolder, read_starts
from bico_ds.training.profile.short_run import MOST_RECORDED, profile_recipe, short_overrides
from bico_ds.training.profile.table import Profile, StepTable, read_profile

WIDTH = 80
_NOT_PLANNED = (StepPart.DATA, StepPart.HOST_WAITS, StepPart.OTHER)
_STEPS = 10
_NOTABLY_LONGER = 1.5


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", type=path_text, help=RECIPE_HELP)
    parser.add_argument(
        "--run", metavar="RUN", type=local_path, help="a run folder with a profile, instead of RECIPE"
    )
    add_overrides_option(parser)
    parser.add_argument(
        "--ranks", metavar="N", type=positive, help="processes on this machine to train with (default: 1)"
    )
    parser.add_argument(
        "--steps", metavar="N", type=positive,
        help=f"steps to record, after as many others (default: {_STEPS}; at most {MOST_RECORDED})",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def contradiction(options: Namespace) -> str | None:
    if (options.recipe is None) == (options.run is None):
        return "give either RECIPE, which is trained for some steps, or --run RUN, whose profile is shown"
    if options.run is not None and (options.overrides or options.ranks or options.steps):
        return "--set, --ranks and --steps are for RECIPE: the profile of --run is there already"
    if options.steps is not None and options.steps > MOST_RECORDED:
        return f"--steps {options.steps}: at most {MOST_RECORDED} steps are recorded"
    return None


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A profile, and the plan of the same run; where there is none, `notes` say why, beside whatever else is to be known."""

    name: str
    profile: Profile
    plan: Plan | None
    advice: Sequence[Advice]
    notes: Sequence[str]

    @property
    def has_times(self) -> bool:
        """Whether the planner knows how long a step takes on these devices."""
        return self.plan is not None and math.isfinite(self.plan.run.mean_step_seconds.high)

    def planned(self, objective: str) -> StepTime | None:
        steps = self.plan.steps if self.plan is not None and self.has_times else ()
        return next((step for step in steps if step.objective == objective), None)


def run(options: Namespace) -> None:
    explained = explain_run(options.run) if options.run is not None else explain_recipe(options)
    if options.json:
        print(json.dumps(as_json(explained)))
    else:
        width = None if sys.stdout.isatty() else WIDTH
        show(explained, Console(width=width, markup=False, highlight=False))


def explain_recipe(options: Namespace) -> Explained:
    """Train some steps of the recipe here. Raises `UserError` and `RunError` as the training does."""
    if is_launched():
        raise UserError("explain-step starts its ranks itself: give --ranks N, without a launcher before it")
    ranks, steps, overrides, notes = options.ranks or 1, options.steps or _STEPS, [*options.overrides], []
    recipe = load_recipe(options.recipe, overrides)
    if (planned := _checks().without_missing_weights(recipe)) is not recipe:
        overrides.append("model.path=null")
        notes.append(f"model.path '{recipe.model.path}' is not on this machine: random weights take as long")
    _check(options.recipe, short_overrides(overrides, steps=steps), ranks)
    print(f"training {2 * steps} steps on {ranks} rank{'s' * (ranks > 1)} …", file=sys.stderr, flush=True)
    try:
        profile = profile_recipe(_program(ranks), options.recipe, overrides, steps=steps)
    except UserError as error:
        raise UserError("\n".join([str(error), *(f"note: {note}" for note in notes)])) from None
    return _explained(
        options.recipe, overrides, planned, profile, lambda: (_device_here(planned, ranks), 1, ranks), notes
    )


def explain_run(folder: Path) -> Explained:
    """The profile that is in a run folder. Raises `UserError` where there is none."""
    profile, name = read_profile(folder), str(RunFolder(folder).recipe_file)
    return _explained(
        name, [], load_recipe(name), profile, lambda: _devices_of_run(folder, profile.ranks), []
    )


def _check(name: str, overrides: Sequence[str], ranks: int) -> None:
    """Refuse what the training would refuse, before its start, which takes longer."""
    from bico_ds.runtime.distributed import read_ranks

    _checks().check_recipe(
        load_recipe(name, overrides),
        world_size=ranks,
        on_cuda=read_ranks().device.type == "cuda",
        run_folder=Path("runs"),
        ranks_per_node=ranks,
    )


def _program(ranks: int) -> list[str]:
    if ranks > 1:
        return launched(ranks)
    return [sys.executable, *(word.replace("--module", "-m") for word in training_program())]


def _device_here(recipe: Recipe, ranks: int) -> Device:
    from bico_ds.runtime.distributed import read_ranks
    from bico_ds.training.planning import device_here

    return device_here(read_ranks().device, recipe.model.dtype, ranks_per_node=ranks)


def _devices_of_run(folder: Path, ranks: int) -> tuple[Device, int, int]:
    """What the run's last start that was planned ran on: the device of a rank, nodes, and ranks of each.

    Raises `UserError` where its run.json does not say.
    """
    try:
        starts = [
            start for start in read_starts(RunFolder(folder).run_file) if isinstance(start.get("plan"), dict)
        ]
    except JsonError as error:
        raise UserError(str(error)) from None
    if not starts:
        raise UserError("run.json does not say which devices the run had")
    planned, hosts = starts[-1]["plan"], starts[-1].get("hosts") or [""] * ranks
    nodes, title, peak = len(Counter(hosts)), planned.get("device"), planned.get("peak_flops")
    known = next((device for device in DEVICES.values() if device.title == title), None)
    if known is None and is_number(peak):  # of a CPU, which was measured
        from bico_ds.runtime import host_memory

        known = cpu_device(host_memory.memory_limit(), peak, ranks // nodes)
    if known is None:
        raise UserError(f"no data sheet of '{title}' is known")
    return known, nodes, ranks // nodes


def _explained(
    name: str,
    overrides: Sequence[str],
    recipe: Recipe,
    profile: Profile,
    devices: Callable[[], tuple[Device, int, int]],
    notes: list[str],
) -> Explained:
    """With a plan, and advice, as far as there can be one."""
    try:
        device, nodes, per_node = devices()
        plan = make_plan(recipe, device, nodes=nodes, ranks_per_node=per_node, texts=texts_of(recipe))
    except UserError as error:
        return Explained(
            name=recipe.name, profile=profile, plan=None, advice=[], notes=[*notes, f"no plan: {error}"]
        )
    explained = Explained(
        name=recipe.name, profile=profile, plan=plan, advice=list(_of_data(plan, profile)), notes=notes
    )
    if not explained.has_times:
        return replace(
            explained, notes=[*notes, f"no data sheet of {device.name} is known: times are not planned"]
        )
    found = advise(plan, is_allowed=lambda override: _is_allowed(name, [*overrides, override], plan))
    return replace(explained, advice=[*explained.advice, *found])


def _of_data(plan: Plan, profile: Profile) -> Iterator[Advice]:
    """Of the steps of all objectives, as often as each was recorded."""
    weighted = [(len(table.steps), table) for table in profile.tables]
    waited = sum(count * _mean(table, StepPart.DATA) for count, table in weighted)
    found = of_data_wait(plan, waited / sum(count * table.seconds for count, table in weighted))
    return iter([] if found is None else [found])


def _mean(table: StepTable, part: StepPart) -> float:
    return table.parts[part].mean if part in table.parts else 0.0


def _is_allowed(name: str, overrides: Sequence[str], plan: Plan) -> bool:
    checks, deployment = _checks(), plan.deployment
    try:
        checks.check_recipe(
            checks.without_missing_weights(load_recipe(name, overrides)),
            world_size=deployment.ranks,
            on_cuda=deployment.device.kind == "cuda",
            run_folder=Path("runs"),
            ranks_per_node=deployment.ranks_per_node,
            runs_here=False,
        )
    except UserError:
        return False
    return True


def _checks() -> Any:
    """`bico_ds.training.checks`, which imports DeepSpeed: what that logs to stdout would stand among the tables."""
    with contextlib.redirect_stdout(io.StringIO()):
        from bico_ds.training import checks
    return checks


def show(explained: Explained, console: Console) -> None:
    """A table per objective, then the advice."""
    say = console.print
    for table in explained.profile.tables:
        planned = explained.planned(table.objective)
        say(f"\n{_headline(table, planned)}", style="bold")
        say(_table(table, planned))
    for line in _advice_lines(explained.advice) if explained.advice or explained.has_times else ():
        say(line)
    for note in filter(None, [_beyond_plan(explained), *explained.notes]):
        say(f"note: {note}")


def _headline(table: StepTable, planned: StepTime | None) -> str:
    recorded = f"{_one(table.seconds)} recorded (mean of {len(table.steps)})"
    usual = "" if table.ordinary is None else f"{_one(table.ordinary)} a step, "
    line = f"{table.objective}: {usual}{recorded}"
    return line if planned is None else f"{line}, planned {time(planned.seconds)}"


def _table(table: StepTable, planned: StepTime | None) -> Table:
    found = Table(box=SIMPLE_HEAD, pad_edge=False)
    found.add_column("part", no_wrap=True)
    for column in ("recorded", "share", *(() if planned is None else ("planned", "share"))):
        found.add_column(column, justify="right")
    for part, recorded, expected in _rows(table, planned):
        cells = [_one(recorded), f"{recorded / table.seconds:.1%}"]
        if planned is not None:
            cells += ["not planned", ""] if expected is None else _planned_cells(expected, planned)
        found.add_row(part.value, *cells)
    whole = [_one(table.seconds), "100%", *(() if planned is None else (time(planned.seconds), "100%"))]
    found.add_row("the step", *whole, style="bold")
    return found


def _rows(table: StepTable, planned: StepTime | None) -> Iterator[tuple[StepPart, float, Range | None]]:
    """The parts that take time, recorded or planned; None of what the planner does not plan."""
    parts = {} if planned is None else planned.parts
    for part in StepPart:
        if part in table.parts or part in parts:
            expected = None if part in _NOT_PLANNED else parts.get(part, Range.exactly(0))
            yield part, _mean(table, part), expected


def _planned_cells(expected: Range, planned: StepTime) -> list[str]:
    if not expected.high:
        return ["0", ""]
    return [time(expected), f"{expected.middle / planned.seconds.middle:.1%}"]


def _one(seconds: float) -> str:
    return time(Range.exactly(seconds))


def _advice_lines(advice: Sequence[Advice]) -> Iterator[str]:
    if not advice:
        yield "No change that is known saves 2 % of the time and fits into the memory."
        return
    yield "What saves time, each change alone:"
    for one in advice:
        saved = f"{percent(one.saves)} of the planned time"
        if one.is_measured:
            saved = f"at most {percent(Range.exactly(one.middle))} of the time, as measured"
        yield f"  --set {one.override}\n    saves {saved}:\n    {one.why}"


def _beyond_plan(explained: Explained) -> str | None:
    """A line where steps take longer than the planner knows why."""
    times = [
        table.ordinary / planned.seconds.high
        for table in explained.profile.tables
        if table.ordinary is not None and (planned := explained.planned(table.objective)) is not None
    ]
    if max(times, default=0.0) < _NOTABLY_LONGER:
        return None
    return (
        f"steps take up to {max(times):.1f} times as long as is planned at most: the planner knows the work of the device, "
        "and not the host's (Python, launches of kernels), from which the changes save nothing"
    )


def as_json(explained: Explained) -> dict[str, Any]:
    """The object of `--json`. Seconds, and shares of the time; a range is {"low", "high"}.

    recipe, device (cpu or cuda), ranks, notes[]; steps[]: objective, steps (their numbers), recorded, ordinary (or null),
    planned (a range, or null), parts[]: {"name", "recorded", "planned": range or null}; advice[]: override, saves (a range),
    middle, is_measured, why.
    """
    profile = explained.profile
    return {
        "recipe": explained.name,
        "device": profile.device,
        "ranks": profile.ranks,
        "notes": list(explained.notes),
        "steps": [_step_as_json(table, explained.planned(table.objective)) for table in profile.tables],
        "advice": [
            {
                "override": advice.override,
                "saves": _range(advice.saves),
                "middle": advice.middle,
                "is_measured": advice.is_measured,
                "why": advice.why,
            }
            for advice in explained.advice
        ],
    }


def _step_as_json(table: StepTable, planned: StepTime | None) -> dict[str, Any]:
    return {
        "objective": table.objective,
        "steps": list(table.steps),
        "recorded": table.seconds,
        "ordinary": table.ordinary,
        "planned": None if planned is None else _range(planned.seconds),
        "parts": [
            {"name": part.value, "recorded": recorded, "planned": expected and _range(expected)}
            for part, recorded, expected in _rows(table, planned)
        ],
    }


def _range(found: Range) -> dict[str, float]:
    return {"low": found.low, "high": found.high}


main = Command(
    description=__doc__,
    add_options=add_options,
    contradiction=contradiction,
    run=run,
    only_shows=lambda options: True,
)


if __name__ == "__main__":
    main.start()
