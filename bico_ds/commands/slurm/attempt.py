"""Decide for the batch script, before and after a start of a run, whether to go on. No torch here.

    attempt.py begin RUN --restarts N --limit M         0 start; 1 restarted too often, without progress, or to be stopped
    attempt.py end RUN --code C --restarts N --limit M  0 done; 75 requeue; 76 no restart left; 77 to be stopped; else failed

`--code` is what srun returned. The run's state file decides; where this start never wrote one, `--stopped` does: the
script was asked to stop. A file RUN/stop asks that the run is not started again.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from bico_ds.cluster.attempts import begin, end
from bico_ds.common.command_line import Command
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
    parser.add_argument("--exclude", metavar="NODE", default="", help="the suspect, to be left out")


def judge(options: Namespace) -> int:
    job = slurm_job()
    run, restarts, limit = options.run, options.restarts, options.limit
    if options.moment == "begin":
        verdict = begin(run, job=job, restarts=restarts, limit=limit)
    else:
        code, stopped = options.code, options.stopped
        verdict = end(run, srun_code=code, stopped=stopped, restarts=restarts, limit=limit)
    print(verdict.why, flush=True)
    return verdict.exit_code


main = Command(description=__doc__, add_options=add_options, run=judge)


if __name__ == "__main__":
    main.start()
