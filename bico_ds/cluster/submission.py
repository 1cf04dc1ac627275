"""A job's script and what it reads go into the run folder, and the script to SLURM. No torch here.

The script reads a copy of the resolved recipe in the run folder: later changes to recipes/ do not reach a job that waits or
is requeued; another submission into the same folder does.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bico_ds.cluster.batch_script import render_batch_script
from bico_ds.cluster.code import code_of_this_program, copy_code
from bico_ds.cluster.job import Job
from bico_ds.cluster.run_status import print_watch
from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.common.json_files import append_object
from bico_ds.common.numbered_names import NumberedName
from bico_ds.config.load import dump_recipe
from bico_ds.runtime.lock import living_locks
from bico_ds.runtime.run_folder import RunFolder

SCRIPT = NumberedName("job-", ".sbatch")
CODE = NumberedName("code-")
_SECONDS_FOR_SBATCH = 120.0


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

    With `job.copies_code` this checkout's code, too, beside the script. Earlier scripts stay. Raises `UserError` where a
    folder cannot be written.
    """
    try:
        return _write(job)
    except shutil.Error as error:
        raise UserError(f"--copy-code: cannot copy '{error.args[0][0][0]}': {error.args[0][0][2]}") from None
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
    number = next_number(job)
    code = copy_code(job.folder / CODE.of(number)) if job.copies_code else code_of_this_program()
    script = job.folder / SCRIPT.of(number)
    script.write_text(render_batch_script(job, code), encoding="utf-8")
    script.chmod(0o755)
    return script


def next_number(job: Job) -> int:
    """That of the next script in the job's folder, and of what lies beside it."""
    numbers = [number for name in (SCRIPT, CODE) for number, _ in name.in_folder(job.folder)]
    return 1 + max(numbers, default=0)


def preview(job: Job) -> str:
    """The script as it would be written. Writes nothing."""
    code = code_of_this_program()
    if job.copies_code:
        code = replace(code, checkout=job.folder / CODE.of(next_number(job)))
    return render_batch_script(job, code)


def submit(script: Path, job: Job) -> str:
    """Give the script to SLURM, and show what it warns of; return the job id.

    Raises `UserError` with SLURM's own message, or where it does not answer.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            f"no `sbatch` on this machine; the script is ready: on a login node run  sbatch {shlex.quote(str(script))}"
        )
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            capture_output=True, text=True, timeout=_SECONDS_FOR_SBATCH, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch has not answered within {_SECONDS_FOR_SBATCH:.0f} s, and may have taken the job: look with squeue; "
            f"where it is not, submit {script} with sbatch"
        ) from None
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}")
    print(done.stderr, end="", file=sys.stderr)
    job_id, code = done.stdout.strip().split(";")[0], code_of_this_program().in_words()
    for index, run in enumerate(job.runs):
        line = {
            "job": f"{job_id}_{index}" if job.is_array else job_id,
            "script": str(script),
            "time": time.time(),
            **code,
        }
        append_object(run / "slurm" / "jobs.jsonl", line)
    return job_id
