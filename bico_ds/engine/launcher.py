"""A rank follows its launcher. No torch here: it begins before the heavy imports."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time

import psutil

from bico_ds.engine.signals import StopFlag

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 1.0


def follow_launcher(stop: StopFlag) -> None:
    """End this rank when its launcher vanishes; stop in good order when only the command above the launcher does.

    The `deepspeed` command exits 0 and leaves its ranks running when its per-node launcher is killed (its runner looks
    at positive return codes only), and leaves launcher and ranks running when it is ended itself. An orphan would go
    on writing. On Linux the kernel tells; elsewhere a thread looks.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = psutil.Process(os.getppid())
    threading.Thread(
        target=_watch, args=(launcher, launcher.ppid(), stop), name="launcher-watch", daemon=True
    ).start()


def _watch(launcher: psutil.Process, command: int, stop: StopFlag) -> None:
    while os.getppid() == launcher.pid:
        with contextlib.suppress(psutil.NoSuchProcess):
            if launcher.ppid() != command:
                stop.set("the launching command is gone")
        time.sleep(_POLL_SECONDS)
    os._exit(1)
