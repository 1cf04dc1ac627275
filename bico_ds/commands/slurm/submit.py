"""Submit a recipe, or a sweep of recipes and seeds, to SLURM.

    bico-ds submit --recipe llama70b_bico --nodes 8 --gpus-per-node 8 --time 24:00:00 --partition gpu
    bico-ds submit --recipe tiny_base --grid seed=1,2,3 --nodes 1 --gpus-per-node 0 --ranks-per-node 2 --time 60
    bico-ds submit … --dry-run                    print the script, write and submit nothing

Checks the recipe first, writes the batch script into the run folder (slurm/job-N.sbatch: readable, usable by itself
with `sbatch`), submits it, and prints how to follow it. Several recipes or seeds make a job array: each run has a folder
of its own below --output-dir, and the script is in slurm/ beside them. Last comes what the planner finds for the recipe's
distributed.gpu on these nodes (`bico-ds plan` says more); it refuses nothing. A dry run needs no weights, no tokenizer and
no data: notes name what is missing, and what could not be checked without. Exit codes: 0 submitted (or printed), 2 wrong
usage or input, or refused by SLURM.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

from bico_ds.cluster.attempts import stop_file
from bico_ds.cluster.batch_script import stop_signal
from bico_ds.cluster.batch_words import refuse_control_characters
from bico_ds.cluster.code import refuse_copy
from bico_ds.cluster.job import ContainerRuntime, Job, Resources, Settings
from bico_ds.cluster.offline import caches
from bico_ds.cluster.preflight.inputs import missing_inputs
from bico_ds.cluster.prologue import read_prologue
from bico_ds.cluster.submission import preview, refuse_if_alive, submit, write_batch_script
from bico_ds.cluster.sweep import is_done, list_sweep, refuse_changed, sweep_folder, write_sweep
from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.common.secrets import secret_keys, text_without_secrets, word_without_secrets
from bico_ds.config.arguments import (
    add_grid_option,
    add_recipe_options,
    add_run_folder_option,
    local_path,
    not_negative,
    path_text,
    positive,
    seed,
    written_path,
)
from bico_ds.config.load import dump_recipe, load_recipe
from bico_ds.config.paths import LocalPath
from bico_ds.config.resources import CHECKOUT
from bico_ds.config.schema import Recipe
from bico_ds.data.planned_texts import texts_of
from bico_ds.planner.devices import Device
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.runtime.run_folder import folder_of_run

_MOST_NAMED = 3


def add_options(parser: ArgumentParser) -> None:
    add_run_options(parser.add_argument_group("what to run"))
    add_slurm_options(parser.add_argument_group("what to ask SLURM for"))
    add_start_options(parser.add_argument_group("how"))


def add_run_options(what: _ArgumentGroup) -> None:
    add_recipe_options(what, several=True)
    what.add_argument(
        "--seeds", nargs="+", type=seed, metavar="N", help="one run of each recipe for each seed"
    )
    add_grid_option(what)
    add_run_folder_option(what, several=True)


def add_slurm_options(asked: _ArgumentGroup) -> None:
    asked.add_argument("--nodes", metavar="N", type=positive, required=True, help="nodes of each run")
    asked.add_argument(
        "--gpus-per-node",
        metavar="N",
        type=not_negative,
        required=True,
        help="GPUs of each node; 0: train on CPUs",
    )
    asked.add_argument(
        "--ranks-per-node", metavar="N", type=positive, help="ranks on each node (default: one per GPU)"
    )
    asked.add_argument("--cpus-per-task", metavar="N", type=positive, help="CPU cores of each rank")
    asked.add_argument(
        "--time",
        metavar="LIMIT",
        required=True,
        help="MINUTES, HH:MM:SS or DAYS-HH:MM:SS; when it is over, the job saves, and is requeued",
    )
    asked.add_argument("--partition", metavar="NAME", help="SLURM's partition (default: the cluster's own)")
    asked.add_argument("--account", metavar="NAME", help="the account that is charged")
    asked.add_argument("--qos", metavar="NAME", help="quality of service")
    asked.add_argument(
        "--constraint", metavar="FEATURES", help="features that the nodes must have, as in h100"
    )
    asked.add_argument(
        "--max-parallel", metavar="N", type=positive, help="of a job array: runs at the same time, at most"
    )
    asked.add_argument(
        "--signal-seconds",
        metavar="N",
        type=positive,
        default=300,
        help="warning before the end of --time (default: %(default)s)",
    )
    asked.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="=--OPTION",
        help="any further option of sbatch, as in --sbatch=--exclusive (repeatable)",
    )


def add_start_options(how: _ArgumentGroup) -> None:
    how.add_argument(
        "--container",
        type=path_text,
        metavar="IMAGE",
        help="image whose `python` has this project's packages; for pyxis also one of a registry",
    )
    how.add_argument(
        "--container-runtime",
        choices=get_args(ContainerRuntime),
        default="apptainer",
        help="what starts it: apptainer, or pyxis (enroot) as a plugin of srun (default: %(default)s)",
    )
    how.add_argument(
        "--bind",
        nargs="+",
        type=written_path,
        default=[],
        metavar="DIR",
        help="further folders that the container sees",
    )
    how.add_argument(
        "--python",
        type=written_path,
        metavar="PATH",
        help="Python on the nodes (default: this one; in a container `python`)",
    )
    how.add_argument(
        "--native-ops",
        type=written_path,
        metavar="DIR",
        help="keep compiled operations here (default: in the run folder)",
    )
    how.add_argument(
        "--network-interface", metavar="NAME", help="for communication, where nodes have several"
    )
    how.add_argument(
        "--max-requeues",
        metavar="N",
        type=not_negative,
        default=20,
        help="restarts of one job (default: %(default)s)",
    )
    how.add_argument(
        "--max-excluded",
        metavar="N",
        type=not_negative,
        default=2,
        help="bad nodes that a job leaves out when it is requeued; 0: none (default: %(default)s)",
    )
    how.add_argument(
        "--prologue",
        type=local_path,
        metavar="FILE",
        help="lines for bash that the job runs before all else: module loads, variables of NCCL; copied into the script",
    )
    how.add_argument(
        "--offline",
        action="store_true",
        help="the nodes have no network: hub names are read from the cache, where they must be already",
    )
    how.add_argument(
        "--copy-code",
        action="store_true",
        help="the job runs a copy of this checkout, made now; without it each start says where the code has changed since",
    )
    how.add_argument("--dry-run", action="store_true", help="print the script, write and submit nothing")


def run(options: Namespace) -> None:
    job = make_job(options)
    verdict = plan_lines(job)
    if options.dry_run:
        print(preview(job), end="", flush=True)
        print(*verdict, sep="\n", file=sys.stderr)
        return
    script = write_batch_script(job)
    if options.grid:
        runs = list_sweep(options.recipe, options.overrides, options.grid)
        write_sweep(next(iter(job.runs)).parent, runs)
    explain(submit(script, job), script, job)
    print(*verdict, sep="\n")


def make_job(options: Namespace) -> Job:
    """The checked job. Raises `UserError` for everything that can be known before a node is asked for.

    A dry run is made without weights and data too.
    """
    ranks = options.ranks_per_node or options.gpus_per_node
    if not ranks:
        raise UserError("--gpus-per-node 0 trains on CPUs: give the ranks per node with --ranks-per-node")
    resources = Resources(
        nodes=options.nodes, gpus_per_node=options.gpus_per_node, ranks_per_node=ranks,
        time=options.time,
        cpus_per_task=options.cpus_per_task, partition=options.partition, account=options.account,
        qos=options.qos, constraint=options.constraint, signal_seconds=options.signal_seconds,
        more=options.sbatch,
    )  # fmt: skip
    refuse_secrets(options)
    runs = list_runs(options)
    check_presence(runs.values(), options)
    for run, recipe in runs.items():
        check(run, recipe, resources, dry_run=options.dry_run)
    refuse_if_alive(runs)
    if options.copy_code:
        refuse_copy()
    settings = Settings(
        container=_container(options), container_runtime=options.container_runtime, bind=options.bind,
        max_requeues=options.max_requeues, max_excluded=options.max_excluded, offline=options.offline,
        caches=caches() if options.offline else {},
        prologue=None if options.prologue is None else read_prologue(options.prologue),
        network_interface=options.network_interface, native_ops=options.native_ops,
        python=options.python or LocalPath("python" if options.container else sys.executable),
    )  # fmt: skip
    only = next(iter(runs))
    folder = only / "slurm" if len(runs) == 1 else only.parent / "slurm"
    return Job(
        name=only.name if len(runs) == 1 else only.parent.name, folder=folder, runs=runs, resources=resources,
        settings=settings, max_parallel=options.max_parallel, copies_code=options.copy_code,
    )  # fmt: skip


def list_runs(options: Namespace) -> dict[Path, Recipe]:
    """Run folder and recipe of each run. Raises `UserError`."""
    if options.grid:
        return _list_grid(options)
    seeds = [[]] if options.seeds is None else [[f"seed={seed}"] for seed in options.seeds]
    chosen = [load_recipe(name, [*options.overrides, *seed]) for name in options.recipe for seed in seeds]
    if len(chosen) == 1:
        return {_run_folder(folder_of_run(chosen[0], options.output_dir)): chosen[0]}
    parent = _run_folder(options.output_dir or Path("runs", f"sweep-{chosen[0].name}"))
    names = [r.name if options.seeds is None else f"{r.name}-seed-{r.seed}" for r in chosen]
    if len(set(names)) < len(names):
        raise UserError("--recipe, --seeds: two runs of this array would have the same folder")
    return {parent / name: recipe for name, recipe in zip(names, chosen, strict=True)}


def _list_grid(options: Namespace) -> dict[Path, Recipe]:
    """The runs of `bico-ds sweep`, in the same folders."""
    if options.seeds is not None:
        seeds = ",".join(map(str, options.seeds))
        raise UserError(f"--seeds: with --grid write the seeds as one more of it: --grid seed={seeds}")
    runs = list_sweep(options.recipe, options.overrides, options.grid)
    folder = _run_folder(sweep_folder(options.output_dir, runs))
    refuse_changed(folder, runs)
    waiting = {folder / run.name: run.recipe for run in runs if not is_done(folder / run.name)}
    if not waiting:
        raise UserError(
            f"--grid: all {len(runs)} runs in '{folder}' are done; add values, or choose another --output-dir"
        )
    if done := len(runs) - len(waiting):
        print(f"note: {done} of {len(runs)} runs are done already, and left out", file=sys.stderr)
    return waiting


def _run_folder(path: Path) -> Path:
    """The folder as the script names it. Raises `UserError` where the nodes would read its name otherwise."""
    where = "output_dir (--output-dir)"
    refuse_control_characters(str(path), where)
    resolved = path.resolve()
    if LocalPath(str(resolved), where=where).in_shell() != shlex.quote(str(resolved)):
        raise UserError(f"{where}: the nodes would expand the $ in '{resolved}'; choose a folder without it")
    return resolved


def check_presence(recipes: Iterable[Recipe], options: Namespace) -> None:
    """Raise `UserError` for the first input, or the container, that is not here; a dry run prints a note for each."""
    missing = [
        problem
        for recipe in recipes
        for problem in (*missing_inputs(recipe, offline=options.offline), *secrets_in(recipe))
    ]
    if (image := options.container) is not None and not Path(image).exists() and _is_file(image, options):
        missing.append(f"--container: '{image}' is not there")
    for problem in dict.fromkeys(missing):
        if not options.dry_run:
            raise UserError(problem)
        print(f"note: submitting would be refused: {text_without_secrets(problem)}", file=sys.stderr)


def _is_file(image: str, options: Namespace) -> bool:
    """Whether a file of this machine is meant, not an image of a registry, which pyxis takes too."""
    return (
        options.container_runtime == "apptainer"
        or image.startswith(("/", ".", "~"))
        or image.endswith(".sqsh")
    )


def _container(options: Namespace) -> str | None:
    """The image as its runtime reads it: pyxis takes a path for one of a registry unless it begins with a slash or dot."""
    image = options.container
    is_path = image is not None and options.container_runtime == "pyxis" and _is_file(image, options)
    return str(Path(image).absolute()) if is_path else image


def secrets_in(recipe: Recipe) -> Iterator[str]:
    """What a job would miss in the recipe that is kept for it, as a message that begins with the key."""
    for key in secret_keys(recipe.model_dump(mode="json")):
        if key != "description":
            yield (
                f"{key}: a secret, and the recipe that a job reads in the run folder keeps none; let the code that needs it "
                "read the environment, which sbatch hands to the job, or write ${NAME} where it is part of a path"
            )


def refuse_secrets(options: Namespace) -> None:
    """Raise `UserError` for an option whose value the script would show to whoever reads it."""
    written = {"--sbatch": options.sbatch, "--bind": options.bind}
    written |= {
        f"--{name.replace('_', '-')}": [getattr(options, name)]
        for name in ("container", "python", "native_ops")
    }
    for option, values in written.items():
        for value in values:
            if value is not None and (shown := word_without_secrets(str(value))) != str(value):
                raise UserError(
                    f"{option} '{shown}': the batch script would show a secret; set it in the environment of this command, "
                    "which sbatch hands to the job"
                )


def check(run: Path, recipe: Recipe, resources: Resources, *, dry_run: bool = False) -> None:
    """Check what can be known before a node is asked for. Raises `UserError`.

    Ranks and batch sizes divide, the schedule fits (where the recipe counts steps), the model is known: to a dry run by
    `model.config` too, and without that a note says so.
    """
    stop_signal(recipe)
    with without_accelerator():
        from bico_ds.data.replay.source import check_sampled
        from bico_ds.training.checks import check_recipe, without_missing_model

        planned, problem = without_missing_model(recipe) if dry_run else (recipe, None)
        if problem is not None:
            print(f"note: what depends on the model was not checked: {problem}", file=sys.stderr)
        check_recipe(
            planned,
            world_size=resources.world_size,
            on_cuda=resources.gpus_per_node > 0,
            run_folder=run,
            ranks_per_node=resources.ranks_per_node,
            runs_here=False,
        )
        if problem is None:
            check_sampled(recipe)


def plan_lines(job: Job) -> list[str]:
    """What the planner finds for each recipe on these nodes; it refuses nothing. Raises `UserError` for an unknown GPU."""
    if not job.resources.gpus_per_node:
        return ["plan: trains on CPUs; whether the nodes' memory is enough is checked at the start"]
    with without_accelerator():
        from bico_ds.training.planning import verdict_lines
    found: dict[str, tuple[str, ...]] = {}
    runs_of: dict[tuple[str, ...], list[str]] = {}
    for run, recipe in job.runs.items():
        planned = dump_recipe(recipe.model_copy(update={"seed": 0}))  # seeds change nothing here
        if planned not in found:
            found[planned] = tuple(verdict_lines(recipe, partial(plan_on, recipe, job.resources)))
        runs_of.setdefault(found[planned], []).append(run.name)
    if len(runs_of) <= len({recipe.name for recipe in job.runs.values()}):  # the lines name their recipe
        return [line for lines in runs_of for line in lines]
    return [line for lines, runs in runs_of.items() for line in (_of_runs(runs), *lines)]


def _of_runs(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return f"of {', '.join(names[:_MOST_NAMED])}{f' and {more} more' if more > 0 else ''}:"


def plan_on(recipe: Recipe, resources: Resources, device: Device) -> Plan:
    """The plan. Raises `UserError` as `make_plan` does, and at once where the model is not to be found."""
    with without_accelerator():
        from bico_ds.training.checks import without_missing_model
    _, problem = without_missing_model(recipe)
    if problem is not None:
        raise UserError(problem)
    return make_plan(
        recipe,
        device,
        nodes=resources.nodes,
        ranks_per_node=resources.ranks_per_node,
        texts=texts_of(recipe),
    )


@contextmanager
def without_accelerator() -> Iterator[None]:
    """Keep DeepSpeed from warning on a login node that it has no GPU.

    Only inside of this context: sbatch hands the environment to the job, whose ranks would stay on the CPU.
    """
    if "DS_ACCELERATOR" in os.environ:
        yield
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        del os.environ["DS_ACCELERATOR"]


def explain(job_id: str, script: Path, job: Job) -> None:
    """Print where the job is, and how to follow and stop it."""
    output = shlex.quote(str(script.parent)) + (
        f"/job-{job_id}_*.out" if job.is_array else f"/job-{job_id}.out"
    )
    first = next(iter(job.runs))
    watched = shlex.quote(str(first.parent if job.is_array else first))
    print(f"job {job_id}: {len(job.runs)} run(s), {job.resources.world_size} ranks each; script {script}")
    status, curves = "bico-ds status", "bico-ds tensorboard"
    if CHECKOUT is not None:
        status = f"python {shlex.quote(f'{CHECKOUT}/launch/slurm/status.py')}"
        curves = f"python {shlex.quote(f'{CHECKOUT}/tools/show_tensorboard.py')}"
    print(f"  state    {status} {watched}")
    print(f"  output   tail -F {output}")
    print(f"  ranks    tail -F {watched}/{'*/' if job.is_array else ''}logs/train-*.log")
    print(f"  curves   {curves} {watched}")
    print(f"  queue    squeue --job {job_id}")
    print(f"  stop     {stop_command(job_id, job)}      (saves a checkpoint; submit again to go on)")


def stop_command(job_id: str, job: Job) -> str:
    """The command that saves a checkpoint, however long that takes, and ends the job: "Stop" in docs/cluster.md."""
    files = " ".join(shlex.quote(str(stop_file(run))) for run in job.runs)
    signal = stop_signal(next(iter(job.runs.values())))
    waiting = f"scancel --state=PENDING {job_id}; " if job.is_array else ""
    return f"{waiting}touch {files} && scancel --signal={signal} --batch {job_id}"


main = Command(
    description=__doc__, add_options=add_options, run=run, only_shows=lambda options: options.dry_run
)


if __name__ == "__main__":
    main.start()
