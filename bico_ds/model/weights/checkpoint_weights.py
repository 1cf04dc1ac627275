"""Weights out of a DeepSpeed checkpoint of any ZeRO stage and world size, one parameter at a time.

Up to ZeRO-2 rank 0's model file holds them undivided, in the training's dtype; the fp32 masters are not read. ZeRO-3's
files (as `deepspeed.utils.zero_to_fp32` reads them, DeepSpeed 0.19): every rank's optimizer file holds the fp32 master
weights of its partitions, all parameters one after the other in the order of `param_shapes`, each cut into world-size
pieces of equal length, the last one padded. Files are memory-mapped, so only what is read is in memory.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bico_ds.common.errors import UserError
from bico_ds.optim.state import flat_masters

PREFIX = "causal_lm."
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_([0-9]{1,9})_mp_rank_00_optim_states\.pt")


class Zero3Checkpoint:
    """fp32 master weights of the trained parameters, by their names in the causal LM.

    Raises `UserError` where a rank's file is missing, or has another size than the shapes require.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # What somebody has put beside DeepSpeed's files is not unpickled.
        files = sorted((file for file in folder.iterdir() if _OPTIMIZER_FILE.fullmatch(file.name)), key=_rank)
        masters = [flat_masters(_load(file)) for file in files]
        self._flat, expected = [flats for flats, _ in masters], masters[0][1]
        if len(files) != expected or [_rank(file) for file in files] != list(range(expected)):
            raise UserError(f"'{folder}' has the optimizer states of {len(files)} ranks, it needs {expected}")
        states = _load(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        self.shapes: dict[str, torch.Size] = {
            name.removeprefix(PREFIX): shape
            for group in states["param_shapes"]
            for name, shape in group.items()
        }

    @cached_property
    def _offsets(self) -> dict[str, int]:
        """Where each parameter begins within a rank's states."""
        offsets, position = {}, 0
        for name, shape in self.shapes.items():
            offsets[name] = position
            position += self._piece(shape)
        held = {sum(flat.numel() for flat in flats) for flats in self._flat}
        if held != {position}:
            raise UserError(f"'{self.folder}': ranks hold {sorted(held)} elements, {position} by the shapes")
        return offsets

    def read(self, name: str) -> Tensor:
        """The parameter, fp32."""
        shape, offset = self.shapes[name], self._offsets[name]
        pieces = [_take(flats, offset, self._piece(shape)) for flats in self._flat]
        return torch.cat(pieces)[: shape.numel()].view(shape)

    def _piece(self, shape: torch.Size) -> int:
        return -(-shape.numel() // len(self._flat))


class UndividedCheckpoint:
    """The weights of a ZeRO-1 or 2 checkpoint: in one file, in the training's dtype."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        states = _load(folder / "mp_rank_00_model_states.pt")["module"]
        self._tensors = {name.removeprefix(PREFIX): tensor for name, tensor in states.items()}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The parameter, in the training's dtype."""
        return self._tensors[name]


CheckpointWeights = Zero3Checkpoint | UndividedCheckpoint


def open_checkpoint(folder: Path) -> CheckpointWeights:
    """Open a DeepSpeed checkpoint folder. The files are pickles: open none that you would not run.

    Raises `UserError` where it is not one, or a file cannot be read.
    """
    if (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").is_file():
        return Zero3Checkpoint(folder)
    if (folder / "mp_rank_00_model_states.pt").is_file():
        return UndividedCheckpoint(folder)
    raise UserError(f"'{folder}' is no DeepSpeed checkpoint: it has no *_model_states.pt")


def _load(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"cannot read '{file}': {error}") from error


def _rank(file: Path) -> int:
    match = _OPTIMIZER_FILE.fullmatch(file.name)
    assert match is not None
    return int(match[1])


def _take(flats: list[Tensor], offset: int, count: int) -> Tensor:
    """Elements [offset, offset + count) of the concatenated tensors."""
    pieces = []
    for flat in flats:
        if offset < flat.numel() and count > 0:
            pieces.append(flat[offset : offset + count])
            count -= pieces[-1].numel()
        offset = max(0, offset - flat.numel())
    return torch.cat(pieces) if len(pieces) != 1 else pieces[0]
