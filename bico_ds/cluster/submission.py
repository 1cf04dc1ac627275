"""From a recipe to a batch script in the run folder, and to SLURM. No torch here.

The script is the common part of launch/slurm/train.sbatch below a head of its own: the #SBATCH lines and the variables are
written anew, so what is edited in the template's head serves only jobs that are submitted by hand. It reads a copy of the
resolved recipe in the run folder: later changes to recipes/ do not reach a job that waits or is requeued; another submission
into the same folder does.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bico_ds.cluster.run_status import print_watch
from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.common.json_files import append_object
from bico_ds.common.numbered_names import NumberedName
from bico_ds.config.load import dump_recipe
from bico_ds.config.paths import LocalPath
from bico_ds.config.resources import BATCH_SCRIPT, CHECKOUT
from bico_ds.config.schema import Recipe
from bico_ds.runtime.lock import living_locks
from bico_ds.runtime.run_folder import RunFolder

_SCRIPT = NumberedName("job-", ".sbatch")
COMMON_PART = "# ---- The rest is the same for every run\n"
_TIME = re.compile(r"(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})")  # sbatch(1), --time


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What SLURM is asked for; it warns `signal_seconds` before the end of `time`.

    Raises `UserError` where these two do not fit.
    """

    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    time: str
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal_seconds: int = 300
    more: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not _TIME.fullmatch(self.time):
            raise UserError(f"--time '{self.time}': SLURM reads MINUTES, HH:MM:SS, or DAYS-HH:MM:SS")
        if 0 < seconds(self.time) <= self.signal_seconds:  # 0: no limit
            raise UserError(
                f"--signal-seconds {self.signal_seconds}: the warning must come before --time {self.time} "
                f"({seconds(self.time)} s) is over, and after some training; give a smaller one, or more time"
            )

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The values of the script's variables. `bind`, `python` and `native_ops` are paths of the nodes, expanded there."""

    container: str | None = None
    bind: Sequence[LocalPath] = ()
    max_requeues: int = 20
    network_interface: str | None = None
    python: LocalPath = LocalPath(sys.executable)  # noqa: RUF009
    native_ops: LocalPath | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One batch script: a run, or an array of them."""

    name: str
    folder: Path  # where the script and the job's own output go
    runs: dict[Path, Recipe] = field(repr=False)
    resources: Resources
    settings: Settings
    max_parallel: int | None = None

    @property
    def is_array(self) -> bool:
        return len(self.runs) > 1


def seconds(time_limit: str) -> int:
    """Seconds of a time as sbatch(1) reads it: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`."""
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, rest_seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest_seconds


def render_batch_script(job: Job) -> str:
    """The batch script."""
    common = BATCH_SCRIPT.read_text(encoding="utf-8").partition(COMMON_PART)
    assert common[1], f"{BATCH_SCRIPT} has lost the line that its common part begins with"
    head = "\n".join(["#!/bin/bash", *_sbatch_lines(job), "", *_variables(job)])
    return f"{head}\n\n{COMMON_PART}{common[2]}"


def stop_signal(recipe: Recipe) -> str:
    """The first of the recipe's signals that is free for this: SLURM and the shell use the others.

    Raises `UserError` where there is none.
    """
    for name in recipe.distributed.preempt_signals:
        if name in ("SIGUSR1", "SIGUSR2"):
            return name.removeprefix("SIG")
    raise UserError("distributed.preempt_signals: SLURM's warning needs SIGUSR1 or SIGUSR2 among them")


def refuse_if_alive(runs: Iterable[Path]) -> None:
    """Raise `UserError` where another process trains into one of these folders."""
    try:
        living = living_locks((RunFolder(run).lock.path for run in runs), on_watch=print_watch)
    except OSError as error:  # a file where the folder should be, or somebody else's folder
        raise UserError(
            f"--output-dir: cannot read '{error.filename}': {error.strerror}; choose another folder"
        ) from None
    for path, lock in living.items():
        where = f"job {lock.job} on {lock.host}" if lock.job else f"process {lock.pid} on {lock.host}"
        raise UserError(
            f"--output-dir: '{path.parent}' is in use by {where}; stop it first, or choose another folder"
        )


def write_batch_script(job: Job) -> Path:
    """Write the script, and the recipe into each run's slurm/ (it replaces an earlier one); return the script.

    Earlier scripts stay. Raises `UserError` where a folder cannot be written.
    """
    try:
        return _write(job)
    except OSError as error:
        raise UserError(
            f"--output-dir: cannot write '{error.filename or job.folder}': {error.strerror}; choose another folder"
        ) from None


def _write(job: Job) -> Path:
    for run, recipe in job.runs.items():
        (run / "slurm").mkdir(parents=True, exist_ok=True)
        (run / "logs").mkdir(exist_ok=True)
        write_atomically(run / "slurm" / "recipe.yaml", dump_recipe(recipe))
    job.folder.mkdir(parents=True, exist_ok=True)
    numbers = [number for number, _ in _SCRIPT.in_folder(job.folder)]
    script = job.folder / _SCRIPT.of(1 + max(numbers, default=0))
    script.write_text(render_batch_script(job), encoding="utf-8")
    script.chmod(0o755)
    return script


def submit(script: Path, job: Job) -> str:
    """Give the script to SLURM; return the job id. Raises `UserError` with SLURM's own message."""
    if shutil.which("sbatch") is None:
        raise UserError(
            f"no `sbatch` on this machine; the script is ready: on a login node run  sbatch {script}"
        )
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}")
    job_id = done.stdout.strip().split(";")[0]
    for index, run in enumerate(job.runs):
        line = {
            "job": f"{job_id}_{index}" if job.is_array else job_id,
            "script": str(script),
            "time": time.time(),
        }
        append_object(run / "slurm" / "jobs.jsonl", line)
    return job_id


def _sbatch_lines(job: Job) -> list[str]:
    asked = job.resources
    first = next(iter(job.runs.values()))
    array = f"0-{len(job.runs) - 1}" + (f"%{job.max_parallel}" if job.max_parallel else "")
    options = {
        "job-name": job.name,
        "nodes": asked.nodes,
        "ntasks-per-node": asked.ranks_per_node,
        "gpus-per-node": asked.gpus_per_node or None,
        "cpus-per-task": asked.cpus_per_task,
        "time": asked.time,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "array": array if job.is_array else None,
        "chdir": Path.cwd(),
        "output": job.folder / ("job-%A_%a.out" if job.is_array else "job-%j.out"),
        "open-mode": "append",
        "signal": f"B:{stop_signal(first)}@{asked.signal_seconds}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    return [*lines, "#SBATCH --requeue", *(f"#SBATCH {option}" for option in asked.more)]


def _variables(job: Job) -> list[str]:
    runs, settings = list(job.runs), job.settings
    project = [] if CHECKOUT is None else [CHECKOUT]
    ours = [shlex.quote(str(path)) for path in (*project, Path.cwd(), *runs)]
    bind = ",".join(dict.fromkeys([*ours, *(path.in_shell() for path in settings.bind)]))
    lines = [f"PROJECT={shlex.quote(str(CHECKOUT or ''))}"]
    if job.is_array:
        names = "\n".join(f"    {shlex.quote(str(run))}" for run in runs)
        lines += [f"runs=(\n{names}\n)", "RUN=${runs[$SLURM_ARRAY_TASK_ID]}"]
    else:
        lines += [f"RUN={shlex.quote(str(runs[0]))}"]
    lines += [
        "RECIPE=$RUN/slurm/recipe.yaml # resolved when this script was written",
        "OVERRIDES=()",
        f"PYTHON={settings.python.in_shell()}",
        f"CONTAINER={shlex.quote(settings.container or '')}",
        f"BIND={bind}",
        f"MAX_REQUEUES={settings.max_requeues}",
        f"STOP_SIGNAL={stop_signal(next(iter(job.runs.values())))}",
        f"NETWORK_INTERFACE={shlex.quote(settings.network_interface or '')}",
    ]
    if settings.native_ops is not None:
        lines.append(f"export TORCH_EXTENSIONS_DIR={settings.native_ops.in_shell()}")
    return lines
