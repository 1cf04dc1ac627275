"""A rank follows its launcher. No torch here: it begins before the heavy imports."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import psutil

from bico_ds.runtime.signals import StopFlag

_POLL_SECONDS = 0.5
_DEEPSPEED_LAUNCHER = "deepspeed.launcher.launch"  # on its command line, behind -m


def follow_launcher(stop: StopFlag) -> None:
    """End this rank when its launcher vanishes; stop in good order when only the `deepspeed` command above it does.

    The `deepspeed` command exits 0 and leaves its ranks running when its per-node launcher is killed (its runner looks
    at positive return codes only), and leaves launcher and ranks running when it is ended itself. An orphan would go
    on writing. It is not the kernel that ends it (PR_SET_PDEATHSIG): a terminal that closes takes the launcher at once,
    and its ranks, which got SIGHUP, too, have to save. What is above another launcher (torchrun under nohup: the login
    shell) may end and mean nothing. A rank whose parent is outside of its container sees none.
    """
    if os.getppid() == 0:
        return
    parent = os.getppid()
    threading.Thread(
        target=_watch, args=(parent, _command_above(parent), stop), name="launcher-watch", daemon=True
    ).start()


def _command_above(parent: int) -> int | None:
    """The process of the `deepspeed` command, where `parent` is its per-node launcher."""
    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process(parent)
        if any(_DEEPSPEED_LAUNCHER in word for word in launcher.cmdline()):
            return launcher.ppid()
    return None


def _watch(parent: int, command: int | None, stop: StopFlag) -> None:
    while os.getppid() == parent:
        with contextlib.suppress(psutil.Error):
            if command is not None and psutil.Process(parent).ppid() != command:
                stop.set("the launching command is gone")
        time.sleep(_POLL_SECONDS)
    time.sleep(_POLL_SECONDS)  # the SIGHUP that took the launcher may not have been noted here yet
    if not stop.is_hung_up():
        os._exit(1)
