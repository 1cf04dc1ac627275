"""DeepSpeed's universal checkpoint: the form that any number of ranks can load.

Rank 0 converts before the process group starts: for a large model it takes longer than any timeout of a collective.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bico_ds.checkpoint import manifest
from bico_ds.checkpoint.disk import in_units, lack_of_room
from bico_ds.checkpoint.manifest import FoundCheckpoint
from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_folder, remove
from bico_ds.optim.state import drop_tensors

_WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))
_POLL_SECONDS = 0.5
_SECONDS_BETWEEN_REPORTS = 10.0
# The converter writes every rank's fragments, then joins them: for a time both are there.
_PEAK = 2.0


def folder_of(checkpoint: Path) -> Path:
    """Where the universal form of a checkpoint is kept; it is deleted together with it."""
    return checkpoint / "universal"


def convert(found: FoundCheckpoint, layout: dict[str, Any], report: Callable[[str], None]) -> None:
    """Write the universal form of a checkpoint, unless a complete one is there. Reports what it takes.

    Raises `UserError` where DeepSpeed cannot convert, or the disk has no room.
    """
    _check_convertible(found.layout, layout)
    target = folder_of(found.path)
    if target.exists():
        with contextlib.suppress(UserError):
            manifest.verify(target)
            report(f"universal form found: {target}")
            return
        remove(target)  # whatever somebody may have put there
    if lack := lack_of_room(found.path, int(_PEAK * found.bytes)):
        raise UserError(
            f"no room to convert the checkpoint: {lack}; free some, or resume with {found.layout['ranks']} ranks"
        )
    report(
        f"converting it to DeepSpeed's universal form: {in_units(found.bytes)} to read, "
        f"{in_units(_PEAK * found.bytes)} of disk meanwhile and {in_units(found.bytes)} afterwards"
    )
    started = time.monotonic()
    try:
        with atomic_folder(target, replace=True) as partial:
            _run_converter(found, partial, report)
            files = [path for path in partial.rglob("*") if path.is_file()]
            manifest.write_manifest(
                partial, {"step": found.step, "files": manifest.file_table(partial, files)}
            )
    finally:
        (found.path / "latest_universal").unlink(missing_ok=True)  # DeepSpeed leaves it; nothing reads it
    report(f"converted in {time.monotonic() - started:.1f} s: {target}")


def _check_convertible(was: dict[str, Any], now: dict[str, Any]) -> None:
    if was["zero_stage"] != now["zero_stage"]:
        raise UserError(
            f"deepspeed: the checkpoint is of ZeRO stage {was['zero_stage']}, the recipe has {now['zero_stage']}; "
            "DeepSpeed cannot change the stage of a training state. Go on with the former, or train from its export"
        )
    for key in ("offload_optimizer", "offload_param"):
        if "nvme" in (was[key], now[key]):
            raise UserError(
                f"deepspeed.overrides.zero_optimization.{key}: DeepSpeed cannot convert a state that is offloaded to "
                f"NVMe; resume with {was['ranks']} ranks and {key} {was[key]}"
            )


def _run_converter(found: FoundCheckpoint, partial: Path, report: Callable[[str], None]) -> None:
    """Convert in a fresh process: DeepSpeed's converter forks workers, which a process full of threads must not."""
    process = multiprocessing.get_context("spawn").Process(
        target=_convert, args=(str(found.path), str(partial))
    )
    process.start()
    started = reported = time.monotonic()
    try:
        while process.is_alive():
            process.join(_POLL_SECONDS)
            if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                report(f"converting, {reported - started:.0f} s: {in_units(_size(partial))} written")
    finally:
        if process.is_alive():  # a signal came
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
        process.join()
    if process.exitcode != 0:
        raise UserError(f"DeepSpeed's converter failed on {found.path}; see above")


def _convert(source: str, target: str) -> None:
    """In the fresh process: the leader of a group, so that its workers end with it, and all with rank 0."""
    os.setsid()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    from deepspeed.checkpoint import ds_to_universal

    # It prints much, and shows bars that count files. An exception leaves this block, and is shown.
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        ds_to_universal.main(
            Namespace(
                input_folder=source, output_folder=target, num_extract_workers=_WORKERS, num_merge_workers=_WORKERS,
                keep_temp_folder=False, strict=True, inject_missing_state=True,
            )
        )  # fmt: skip
    _drop_first_ranks_tensors(Path(target) / "zero" / "optimizer_state.pt")


def _drop_first_ranks_tensors(path: Path) -> None:
    """Keep of the common state what a load reads. DeepSpeed leaves all of rank 0's share in it, for every rank to read."""
    state = torch.load(path, weights_only=False)
    drop_tensors(state)
    torch.save(state, path)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _size(folder: Path) -> int:
    """Bytes of its files, of those that are there: the converter removes what it has merged."""
    total = 0
    for at, _, names in os.walk(folder):  # unlike `rglob` it passes over folders that are gone
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(Path(at, name)).st_size
    return total
