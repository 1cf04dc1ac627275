"""How the process of a command ends: its output written, its exit code kept. No torch here: light commands end so too."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End the process with this exit code, after threads that are not daemons have ended and the exit handlers have run.

    This is all that an interpreter does at its end, except that it is not taken down itself. Where output cannot be
    written, a message on stderr gives the reason, and 1 takes the place of exit code 0; a closed pipe is no such case,
    since its reader has seen enough.

    A process group leaves native threads behind: `destroy_process_group` joins gloo's only when nobody else holds the
    group, and DeepSpeed does. One of them that needs Python while the interpreter is taken down aborts the process
    (SIGABRT, "terminate called without an active exception", pytorch#179291): a finished run would count as a failed
    one, and its job would be started again. The same end as multiprocessing gives its forked processes.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # Python has it, its stub has not
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BrokenPipeError:
            pass
        except OSError as error:
            code = code or 1
            with contextlib.suppress(OSError):
                print(f"error: cannot write the output: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(code)
