"""What the batch script asks before and after a start of a run; light, no torch.

    attempt.py begin RUN --restarts N --limit M         0: go on; 1: too often restarted, in vain, or to be stopped
    attempt.py end RUN --code C --restarts N --limit M  0: done; 75: requeue; 76: used up; 77: to be stopped; else failed

`--code` is what srun returned; the run's state file decides, and where this start never wrote one, `--stopped`: the script
was asked to stop. RUN/stop is the wish not to be started again.
"""

from __future__ import annotations

import argparse

from bico_ds.cluster.attempts import begin, end
from bico_ds.config.arguments import local_path
from bico_ds.runtime.launch_environment import slurm_job


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("run", type=local_path, help="run folder")
    parser.add_argument("--code", type=int, default=0, help="exit code of srun")
    parser.add_argument("--stopped", action="store_true", help="the script was asked to stop")
    parser.add_argument("--restarts", type=int, required=True, help="restarts of this job so far")
    parser.add_argument("--limit", type=int, required=True, help="restarts allowed")
    arguments = parser.parse_args()
    job = slurm_job()
    run, restarts, limit = arguments.run, arguments.restarts, arguments.limit
    if arguments.moment == "begin":
        verdict = begin(run, job=job, restarts=restarts, limit=limit)
    else:
        code, stopped = arguments.code, arguments.stopped
        verdict = end(run, srun_code=code, stopped=stopped, restarts=restarts, limit=limit)
    print(verdict.why, flush=True)
    return verdict.exit_code
