"""The last collectives of this rank, as torch's flight recorder keeps them, on file for whoever asks why a run stood still.

torch keeps them in a ring (`TORCH_FR_BUFFER_SIZE`). Where one times out NCCL's process group writes them by itself, to
`TORCH_FR_DUMP_TEMP_FILE` with the rank behind it: launch/slurm/train.sbatch names the same files.
"""

from __future__ import annotations

import contextlib
import faulthandler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FOLDER = "flight_recorder"


def write_flight_record(logs: Path, rank: int, *, seconds: float) -> None:
    """Write `flight_recorder/rank-N` into `logs`, for `python -m torch.distributed.flight_recorder.fr_trace`.

    Nothing before the ranks are joined; what cannot be written is left out. Without stacks, for which torch imports its
    compiler: seconds, in a process that is about to end. The recorder asks CUDA which collectives are done, and no other
    thread of Python's runs meanwhile: if that takes longer than `seconds`, the process ends with code 1.
    """
    if not dist.is_initialized():
        return
    of_torch: Any = torch._C._distributed_c10d  # whose stub does not know them
    # NCCL's collectives have a recorder of their own.
    dump = of_torch._dump_nccl_trace if dist.get_backend() == "nccl" else of_torch._dump_fr_trace
    with contextlib.suppress(OSError, RuntimeError):
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            record = dump(includeStackTraces=False)
        finally:
            faulthandler.cancel_dump_traceback_later()
        (logs / FOLDER).mkdir(exist_ok=True)
        (logs / FOLDER / f"rank-{rank}").write_bytes(record)
