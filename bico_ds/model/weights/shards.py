"""The weights of a Hugging Face folder, written shard by shard, with their checksums."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bico_ds.common.errors import UserError
from bico_ds.common.files import checksum

CHECKSUMS = "checksums.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def refuse_existing(folder: Path, *, overwrite: bool = False) -> None:
    """Raise `UserError` where an export would change something that is there; an empty folder may be there."""
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' exists and is not empty; name another folder, or remove it first")


class ShardWriter:
    """Writes named tensors into `model-0000i-of-0000n.safetensors` and an index, or one `model.safetensors`.

    They must be added in the order of `shapes`. At most one shard is held in memory: `max_shard_bytes`, or a single larger
    tensor of the model.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, torch.Size],
        dtype: torch.dtype,
        *,
        max_shard_bytes: int = 4 * 10**9,
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._shard_of, self._shards = _assign(shapes, dtype.itemsize, max_shard_bytes)
        self._total_bytes = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        self._total_parameters = sum(shape.numel() for shape in shapes.values())
        self._open: dict[str, Tensor] = {}
        self._written: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of `tensor` in the export's dtype; write its shard when it is the shard's last."""
        self._open[name] = tensor.detach().to(device="cpu", dtype=self._dtype, copy=True).contiguous()
        shard = self._shard_of[name]
        if all(other in self._open for other in self._shards[shard]):
            path = self._folder / self._file(shard)
            save_file(self._open, path, metadata={"format": "pt"})
            path.chmod(0o644)  # safetensors makes it private, a model is for others to read
            self._written.update(self._open)
            self._open.clear()

    def close(self) -> None:
        """Write the index; every announced tensor must have been added."""
        missing = self._shard_of.keys() - self._written
        assert not missing, f"never written: {sorted(missing)}"
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": self._total_bytes, "total_parameters": self._total_parameters},
                "weight_map": {name: self._file(shard) for name, shard in self._shard_of.items()},
            }
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _file(self, shard: int) -> str:
        if len(self._shards) == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"


def write_checksums(folder: Path) -> None:
    """Write size and SHA-256 of every file that is in `folder` now into its `checksums.json`."""
    sums = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": checksum(path, "sha256"),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")


def _assign(
    shapes: dict[str, torch.Size], itemsize: int, max_shard_bytes: int
) -> tuple[dict[str, int], list[list[str]]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = shape.numel() * itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return {name: index for index, names in enumerate(shards) for name in names}, shards
