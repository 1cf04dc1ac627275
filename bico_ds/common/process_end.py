"""How a process ends that has joined a process group. No torch here: commands import it before their heavy imports."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End the process with this exit code, after threads that are not daemons have ended and the exit handlers have run.

    This is all that an interpreter does at its end, except that it is not taken down itself.

    A process group leaves native threads behind: `destroy_process_group` joins gloo's only when nobody else holds the
    group, and DeepSpeed does. One of them that needs Python while the interpreter is taken down aborts the process
    (SIGABRT, "terminate called without an active exception", pytorch#179291): a finished run would count as a failed
    one, and its job would be started again. The same end as multiprocessing gives its forked processes.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # Python has it, its stub has not
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader is gone, or it is closed
            stream.flush()
    os._exit(code)
