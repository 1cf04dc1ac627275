"""The text of a batch script, made of a job. No torch here.

It is the common part of launch/slurm/train.sbatch below a head of its own: the #SBATCH lines and the variables are written
anew, so what is edited in the template's head serves only jobs that are submitted by hand.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from bico_ds.cluster.batch_words import literal_pattern, sbatch_line, sbatch_line_of
from bico_ds.cluster.code import Code
from bico_ds.cluster.job import Job
from bico_ds.common.errors import UserError
from bico_ds.config.resources import BATCH_SCRIPT
from bico_ds.config.schema import Recipe

COMMON_PART = "# ---- The rest is the same for every run\n"


def render_batch_script(job: Job, code: Code) -> str:
    """The batch script of a job that runs `code`."""
    common = BATCH_SCRIPT.read_text(encoding="utf-8").partition(COMMON_PART)
    assert common[1], f"{BATCH_SCRIPT} has lost the line that its common part begins with"
    head = "\n".join(["#!/bin/bash", *_sbatch_lines(job), "", *_variables(job, code)])
    prologue = job.settings.prologue
    own = "" if prologue is None else f"{prologue.in_script()}\n"
    return f"{head}\n\n{own}{COMMON_PART}{common[2]}"


def stop_signal(recipe: Recipe) -> str:
    """The first of the recipe's signals that is free for this: SLURM and the shell use the others.

    Raises `UserError` where there is none.
    """
    for name in recipe.distributed.preempt_signals:
        if name in ("SIGUSR1", "SIGUSR2"):
            return name.removeprefix("SIG")
    raise UserError("distributed.preempt_signals: SLURM's warning needs SIGUSR1 or SIGUSR2 among them")


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


def _no_option(path: str) -> str:
    """The path, so that no command takes it for an option."""
    return f"./{path}" if path.startswith("-") else path


def _variables(job: Job, code: Code) -> list[str]:
    runs, settings = list(job.runs), job.settings
    own = '"$RUN"' if job.is_array else shlex.quote(str(runs[0]))
    ours = [*(shlex.quote(str(path)) for path in job.shared), own]
    bind = ",".join(dict.fromkeys([*ours, *(path.in_shell() for path in settings.bind)]))
    lines = [f"PROJECT={shlex.quote(str(code.checkout or ''))}"]
    if job.is_array:
        names = "\n".join(f"    {shlex.quote(str(run))}" for run in runs)
        lines += [f"runs=(\n{names}\n)", "RUN=${runs[$SLURM_ARRAY_TASK_ID]}"]
    else:
        lines += [f"RUN={shlex.quote(str(runs[0]))}"]
    lines += [
        f"SUBMITTED_CODE={shlex.quote(code.fingerprint)}",
        "RECIPE=$RUN/slurm/recipe.yaml # resolved when this script was written",
        "OVERRIDES=()",
        f"SUBMITTED_CODE={shlex.quote(code.fingerprint)}",
        f"PYTHON={settings.python.in_shell()}",
        f"CONTAINER={shlex.quote(_no_option(settings.container or ''))}",
        f"CONTAINER_RUNTIME={settings.container_runtime}",
        f"BIND={bind}",
        f"MAX_REQUEUES={settings.max_requeues}",
        f"MAX_EXCLUDED={settings.max_excluded}",
        f"STOP_SIGNAL={stop_signal(next(iter(job.runs.values())))}",
        f"NETWORK_INTERFACE={shlex.quote(settings.network_interface or '')}",
    ]
    if settings.offline:
        lines.append("export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1")
    lines += [f"export {name}={shlex.quote(str(path))}" for name, path in settings.caches.items()]
    if settings.native_ops is not None:
        lines.append(f"export TORCH_EXTENSIONS_DIR={settings.native_ops.in_shell()}")
    return lines
