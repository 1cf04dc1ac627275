"""From a recipe to a batch script in the run folder, and to SLURM. No torch here.

The script is the common part of launch/slurm/train.sbatch below a head of its own: the #SBATCH lines and the variables are
written anew, so what is edited in the template's head serves only jobs that are submitted by hand. It reads a copy of the
resolved recipe in the run folder: later changes to recipes/ do not reach a job that waits or is requeued; another submission
into the same folder does.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bico_ds.cluster.batch_words import (
    literal_pattern,
    refuse_control_characters,
    sbatch_line,
    sbatch_line_of,
)
from bico_ds.cluster.run_status import print_watch
from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.config.load import dump_recipe
from bico_ds.config.paths import LocalPath
from bico_ds.config.resources import BATCH_SCRIPT, CHECKOUT
from bico_ds.config.schema import Recipe
from bico_ds.runtime.lock import living_locks
from bico_ds.runtime.run_folder import RunFolder

COMMON_PART = "# ---- The rest is the same for every run\n"
_TIME = re.compile(r"(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})")  # sbatch(1), --time


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What SLURM is asked for; it warns `signal_seconds` before the end of `time`. `more`: further options of `sbatch`.

    Raises `UserError` where these two do not fit, and for texts that have no place in a batch script.
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
        for option in ("partition", "account", "qos", "constraint"):
            if (text := getattr(self, option)) is not None:
                _check_text(text, f"--{option}")
        for text in self.more:
            _check_text(text, "--sbatch")
            sbatch_line_of(text)  # refuses what is no option
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
    """The values of the script's variables. `bind`, `python` and `native_ops` are paths of the nodes, expanded there.

    Raises `UserError` for texts that have no place in a batch script.
    """

    container: str | None = None
    bind: Sequence[LocalPath] = ()
    max_requeues: int = 20
    max_excluded: int = 2
    network_interface: str | None = None
    python: LocalPath = LocalPath(sys.executable)  # noqa: RUF009
    native_ops: LocalPath | None = None

    def __post_init__(self) -> None:
        given = [
            ("--container", self.container),
            ("--network-interface", self.network_interface),
            ("--python", self.python.text),
            ("--native-ops", None if self.native_ops is None else self.native_ops.text),
            *(("--bind", path.text) for path in self.bind),
        ]
        for option, text in given:
            if text is not None:
                _check_text(text, option)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One batch script: a run, or an array of them.

    Raises `UserError` for a folder that has no place in a batch script.
    """

    name: str
    folder: Path  # where the script and the job's own output go
    runs: dict[Path, Recipe] = field(repr=False)
    resources: Resources
    settings: Settings
    max_parallel: int | None = None

    def __post_init__(self) -> None:
        for run in self.runs:
            refuse_control_characters(str(run), "output_dir (--output-dir)")
        literal_pattern(self.folder, "output_dir (--output-dir)")
        refuse_control_characters(str(Path.cwd()), "the working directory")
        if self.settings.container is not None:
            for path in _bound(self):
                if set(path) & set(",:"):
                    raise UserError(
                        f"--container: apptainer cannot bind '{path}', for it holds a comma or colon"
                    )

    @property
    def is_array(self) -> bool:
        return len(self.runs) > 1


def _check_text(text: str, option: str) -> None:
    if not text.strip():
        raise UserError(f"{option}: must not be empty; leave it out instead")
    refuse_control_characters(text, option)


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
    number = 1 + sum(1 for _ in job.folder.glob("job-*.sbatch"))
    script = job.folder / f"job-{number}.sbatch"
    script.write_text(render_batch_script(job), encoding="utf-8")
    script.chmod(0o755)
    return script


def submit(script: Path, job: Job) -> str:
    """Give the script to SLURM; return the job id. Raises `UserError` with SLURM's own message."""
    if shutil.which("sbatch") is None:
        raise UserError(
            f"no `sbatch` on this machine; the script is ready: on a login node run  sbatch {shlex.quote(str(script))}"
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
        with open(run / "slurm" / "jobs.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return job_id


def _sbatch_lines(job: Job) -> list[str]:
    asked = job.resources
    first = next(iter(job.runs.values()))
    folder = literal_pattern(job.folder, "output_dir")
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
        "output": f"{folder}/{'job-%A_%a.out' if job.is_array else 'job-%j.out'}",
        "open-mode": "append",
        "signal": f"B:{stop_signal(first)}@{asked.signal_seconds}",
    }
    lines = [sbatch_line(f"--{name}", value) for name, value in options.items() if value is not None]
    return [*lines, sbatch_line("--requeue"), *map(sbatch_line_of, asked.more)]


def _bound(job: Job) -> list[str]:
    """The folders of the login node that a container sees, too."""
    project = [] if CHECKOUT is None else [CHECKOUT]
    return [str(path) for path in (*project, Path.cwd(), *job.runs)]


def _no_option(path: str) -> str:
    """The path, so that no command takes it for an option."""
    return f"./{path}" if path.startswith("-") else path


def _variables(job: Job) -> list[str]:
    runs, settings = list(job.runs), job.settings
    ours = [shlex.quote(path) for path in _bound(job)]
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
        f"CONTAINER={shlex.quote(_no_option(settings.container or ''))}",
        f"BIND={bind}",
        f"MAX_REQUEUES={settings.max_requeues}",
        f"MAX_EXCLUDED={settings.max_excluded}",
        f"STOP_SIGNAL={stop_signal(next(iter(job.runs.values())))}",
        f"NETWORK_INTERFACE={shlex.quote(settings.network_interface or '')}",
    ]
    if settings.native_ops is not None:
        lines.append(f"export TORCH_EXTENSIONS_DIR={settings.native_ops.in_shell()}")
    return lines
