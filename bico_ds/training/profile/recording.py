"""What torch's profiler records of one step, with the names that `bico_ds.training.profile.names` knows."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile, record_function

from bico_ds.named_parts import recording, step_part
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.training.profile.names import DEEPSPEED, NAMED, STEP

_SILENT = "6"  # torch's recorder, Kineto, else writes two lines to the terminal at each step


class StepRecording:
    """Records from `start` to `stop`; `write` then gives a Chrome trace. `begin` to `end` is the step in it."""

    def __init__(self, device: torch.device) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
        cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
        self._names, self._step = ExitStack(), ExitStack()

    def start(self) -> None:
        self._profile.start()
        for names in (recording(_named), _deepspeed_names(), _waits_named()):
            self._names.enter_context(names)

    def begin(self, step: int) -> None:
        self._step.enter_context(record_function(f"{STEP} {step}"))

    def end(self) -> None:
        self._step.close()

    def stop(self) -> None:
        self._step.close()
        self._names.close()
        self._profile.stop()

    def write(self, path: Path) -> None:
        """Raises OSError or `RuntimeError`."""
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # torch changes characters of a folder's name, and writes others into the JSON as they are.
            self._profile.export_chrome_trace(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
        if not path.exists():  # torch only logs what went wrong
            raise RuntimeError(f"torch could not write its trace into '{path.parent}'; is the disk full?")


def _named(name: str) -> record_function:
    return record_function(NAMED + name)


@contextmanager
def _deepspeed_names() -> Iterator[None]:
    """DeepSpeed tells its accelerator what it does (its `instrument_w_nvtx`); inside, the profiler is told, too."""
    accelerator: Any = get_accelerator()
    push, pop = accelerator.range_push, accelerator.range_pop
    running = threading.local()

    def begin(name: str, *arguments: Any, **options: Any) -> Any:
        ranges = running.__dict__.setdefault("ranges", [])
        ranges.append(record_function(DEEPSPEED + name))
        ranges[-1].__enter__()
        return push(name, *arguments, **options)

    def end(*arguments: Any, **options: Any) -> Any:
        if ranges := running.__dict__.get("ranges"):  # none of what began before this
            ranges.pop().__exit__(None, None, None)
        return pop(*arguments, **options)

    accelerator.range_push, accelerator.range_pop = begin, end
    try:
        yield
    finally:
        del accelerator.range_push, accelerator.range_pop


@contextmanager
def _waits_named() -> Iterator[None]:
    """Waits for collectives, which end in `Work.wait`."""
    original: Any = Work.wait

    def wait(work: Work, *arguments: Any, **options: Any) -> Any:
        with step_part(StepPart.COMMUNICATION.value):
            return original(work, *arguments, **options)

    Work.wait = wait  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Work.wait = original  # type: ignore[method-assign]
