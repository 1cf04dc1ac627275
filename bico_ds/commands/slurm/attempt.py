"""Decide for the batch script, before and after a start of a run, whether to go on. No torch here.

    attempt.py begin RUN --restarts N --limit M         0 start; 1 restarted too often, without progress, or to be stopped
    attempt.py suspect RUN … --max-excluded N           0, and prints the node to leave out of the next start, if any
    attempt.py end RUN --code C --restarts N --limit M  0 done; 75 requeue; 76 no restart left; 77 to be stopped; else failed

`--code` is what srun returned. The run's state file decides; where this start never wrote one, `--stopped` does: the
script was asked to stop. A file RUN/stop asks that the run is not started again. `--exclude NODE`: the suspect, which SLURM
can do without; then a start that has gained nothing is worth another one, too. `--submitted-code`: `begin` warns where the
code is another by now.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bico_ds.cluster import bad_nodes
from bico_ds.cluster.attempts import TRY_AGAIN, begin, end, read_attempts
from bico_ds.cluster.code import change_since
from bico_ds.common.command_line import Command
from bico_ds.common.json_files import JsonError
from bico_ds.config.arguments import local_path, not_negative
from bico_ds.runtime.launch_environment import slurm_job


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("moment", choices=("begin", "suspect", "end"), help="before or after a start")
    parser.add_argument("run", type=local_path, help="run folder")
    parser.add_argument("--code", metavar="C", type=not_negative, default=0, help="exit code of srun")
    parser.add_argument("--stopped", action="store_true", help="the script was asked to stop")
    parser.add_argument(
        "--restarts", metavar="N", type=not_negative, required=True, help="restarts of this job so far"
    )
    parser.add_argument("--limit", metavar="M", type=not_negative, required=True, help="restarts allowed")
    parser.add_argument(
        "--max-excluded", metavar="N", type=not_negative, default=0, help="nodes that a job may leave out"
    )
    parser.add_argument(
        "--submitted-code", metavar="DIGEST", default="", help="of the code at the submission"
    )
    parser.add_argument("--exclude", metavar="NODE", default="", help="the suspect, to be left out")


def judge(options: Namespace) -> int:
    job = slurm_job()
    run, restarts, limit = options.run, options.restarts, options.limit
    if options.moment == "suspect":
        print(node_to_leave_out(options, job), end="", flush=True)
        return 0
    if options.moment == "begin":
        if options.submitted_code and (warning := change_since(options.submitted_code)) is not None:
            print(warning, flush=True)
        verdict = begin(run, job=job, restarts=restarts, limit=limit)
    else:
        found = last_suspect(options, job)
        excluded = options.exclude if found is not None and found.host == options.exclude else ""
        verdict = end(
            run,
            srun_code=options.code,
            stopped=options.stopped,
            restarts=restarts,
            limit=limit,
            excluded=excluded,
        )
        if found is not None:
            is_excluded = bool(excluded) and verdict.exit_code == TRY_AGAIN
            keep(run, found, job, is_excluded=is_excluded)
    print(verdict.why, flush=True)
    return verdict.exit_code


def last_suspect(options: Namespace, job: str) -> bad_nodes.Suspect | None:
    try:
        attempts = read_attempts(options.run)
    except JsonError:  # `end` says so
        return None
    return bad_nodes.suspect(options.run, job=job, before=attempts[-1]["run_id"]) if attempts else None


def keep(run: Path, found: bad_nodes.Suspect, job: str, *, is_excluded: bool) -> None:
    try:
        bad_nodes.note(run, found, job=job, is_excluded=is_excluded)
    except OSError as error:  # the verdict counts more
        print(f"'{bad_nodes.excluded_file(run)}' is not written: {error.strerror}", file=sys.stderr)


def node_to_leave_out(options: Namespace, job: str) -> str:
    """Its name; empty where there is none. What speaks against a node goes to stderr."""
    found = last_suspect(options, job)
    if found is None or not found.why:
        return ""
    excluded = bad_nodes.excluded_nodes(options.run, job)
    print(f"node {found.host} may be bad: {found.why}", file=sys.stderr, flush=True)
    if found.host in excluded or len(excluded) >= options.max_excluded:
        left_out = ", ".join(excluded) or "none"
        print(
            f"it is not excluded: {options.max_excluded} nodes may be (--max-excluded), {left_out} already",
            file=sys.stderr,
            flush=True,
        )
        return ""
    return found.host


main = Command(description=__doc__, add_options=add_options, run=judge)


if __name__ == "__main__":
    main.start()
