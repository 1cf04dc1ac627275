"""Weights from a Hugging Face folder: each rank reads its own slices, and 1/world-size of the files again to verify.

Of several files in a folder those are read that transformers reads (`weight_files`). Wrong file names, sizes, names,
shapes and dtypes are found from headers, before a weight is read; a stored tied head that differs from the embedding only
afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.config.paths import FolderOrHub, HubName
from bico_ds.model.model_folder import one_line, readable, warn_once
from bico_ds.model.weights.checksums import add_over_ranks, parameter_checksums, slice_checksum
from bico_ds.model.weights.materialize import full_shape
from bico_ds.model.weights.safetensors_header import read_header

SAFETENSORS = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What a base has for whoever passes on what is made from it: an export carries them.
_PAPERS = (
    "README.md",
    "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*",
    "[Nn][Oo][Tt][Ii][Cc][Ee]*",
    "COPYING*",
    "*[Uu][Ss][Ee]_[Pp][Oo][Ll][Ii][Cc][Yy]*",
)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# A buffer that old Llama checkpoints carry; it follows from the config.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
_LONGEST_NAME = 255  # bytes, on the file systems of Linux
_VERIFY_CHUNK = 1 << 22  # elements read at a time


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Where a tensor is stored: `data` is the byte at which it begins in `file`."""

    file: Path
    dtype: torch.dtype
    shape: torch.Size
    data: int


class SafetensorsFolder:
    """A `WeightSource` over safetensors files.

    Raises `UserError` where a shard is missing or cut short, and where two of them differ in a tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        for file in weight_files(folder):
            for name, entry in _entries(file):
                if (other := self._entries.get(name)) is not None and not _are_same(entry, other):
                    raise UserError(
                        f"model.path: tensor '{name}' is in '{other.file}' and, with other values, in '{file}'; "
                        "remove the file that is not of this model, and its name from the index"
                    )
                self._entries[name] = entry
        self._open: dict[Path, Any] = {}

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor; only the rows around them are read."""
        entry = self._entries[name]
        if entry.file not in self._open:
            self._open[entry.file] = safe_open(entry.file, framework="pt")
        row = shape[1:].numel()
        first, last = start // row, -(-stop // row)
        rows = self._open[entry.file].get_slice(name)[first:last]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def checksum(self, name: str, dtype: torch.dtype) -> int:
        """The tensor's checksum as `dtype`, straight from the file's bytes and not by way of `read`."""
        return _stored_checksum(self._entries[name], dtype)


class PickledFolder:
    """A `WeightSource` over `pytorch_model*.bin`, memory-mapped, tensors only (`weights_only`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, Tensor] = {}
        for file in weight_files(folder, _PICKLED):
            self._tensors |= _unpickled(file)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        return self._tensors[name].reshape(-1)[start:stop]

    def checksum(self, name: str, dtype: torch.dtype) -> int:
        """The tensor's checksum as `dtype`."""
        return slice_checksum(self._tensors[name].reshape(-1).to(dtype), 0)


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each raise their own
        raise UserError(
            f"model.path: '{file}' cannot be read as pickled tensors ({one_line(error):.200}): copy it again, or "
            "convert it to safetensors"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise UserError(f"model.path: '{file}' does not hold tensors by name: give the model's state dict")
    return dict(content)


WeightFolder = SafetensorsFolder | PickledFolder


def open_weights(path: FolderOrHub, *, allow_pickle: bool = False) -> WeightFolder:
    """Open the weights in a folder, or of a hub name after a download.

    Raises `UserError` on what is missing, truncated or quantized, on adapters beside the weights, on pickles without
    `allow_pickle`, and where the download fails.
    """
    folder = path if isinstance(path, Path) else _download(path, allow_pickle)
    with readable(folder, where="model.path: "):
        if not folder.is_dir():
            raise UserError(f"model.path: the folder '{path}' does not exist")
        refuse_adapters(folder)
        if _names_safetensors(folder):
            return SafetensorsFolder(folder)
        if not any(folder.glob("pytorch_model*.bin")):
            if any(folder.glob("*.safetensors")):
                weight_files(folder)  # refuses: they have other names
            raise UserError(f"model.path: '{path}' holds no weights (*.safetensors)")
        if not allow_pickle:
            raise UserError(
                f"model.path: '{path}' holds pickled weights only (*.bin), and pickles can run code when loaded: "
                "convert them to safetensors, or set 'model.allow_pickle: true' if you trust their origin"
            )
        return PickledFolder(folder)


def holds_weights(path: FolderOrHub) -> bool:
    """Whether weights lie in a folder of this machine, complete or not; a hub name is not looked up."""
    if not isinstance(path, Path) or not path.is_dir():
        return False
    return _names_safetensors(path) or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))


def _names_safetensors(folder: Path) -> bool:
    """Whether a folder has the single file or the index, be it a link to nowhere."""
    return os.path.lexists(folder / SAFETENSORS) or os.path.lexists(folder / f"{SAFETENSORS}.index.json")


def refuse_adapters(folder: Path) -> None:
    """Raise `UserError` where adapters lie beside the weights."""
    if adapter := next((name for name in _ADAPTERS if (folder / name).exists()), None):
        raise UserError(
            f"model.path: '{folder}' holds an adapter ({adapter}), which transformers would add to these weights, or to "
            "others, and training would leave out: merge it into the weights (peft's merge_and_unload), or move "
            "it to another folder"
        )


def check_names_and_shapes(
    expected: Mapping[str, torch.Size], weights: WeightFolder, *, tied_head: bool
) -> None:
    """Raise `UserError` unless the folder holds exactly the `expected` tensors, each of its shape.

    With a `tied_head` a stored `lm_head.weight` is allowed: `verify_loaded` checks that it equals the embedding.
    """
    found = {name: shape for name, shape in weights.shapes.items() if not name.endswith(_IGNORED_SUFFIX)}
    if tied_head and "lm_head.weight" not in expected:
        found.pop("lm_head.weight", None)
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"not in the model: {name}" for name in found if name not in expected]
    problems += [
        f"{name}: {tuple(found[name])} in the file, {tuple(shape)} in the model"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"the weights in '{weights.folder}' do not fit the model:\n  " + "\n  ".join(problems[:8]) + more
        )


def verify_loaded(named: Iterable[tuple[str, nn.Parameter]], weights: WeightFolder) -> dict[str, int]:
    """Compare every loaded parameter with the file, by checksum; each rank reads its part of the files for it.

    `named`: names as in the folder. Returns the checksums, by these names. Collective, where there is a process group.
    Raises `RuntimeError` naming the first wrong parameters, and `UserError` where a stored tied head is not the embedding.
    """
    parameters = dict(named)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = _my_share({name: full_shape(p).numel() for name, p in parameters.items()}, rank, world_size)
    in_file = torch.tensor(
        [weights.checksum(name, p.dtype) if name in mine else 0 for name, p in parameters.items()],
        dtype=torch.int64,
    )
    expected = dict(zip(parameters, add_over_ranks(in_file).tolist(), strict=True))
    loaded = parameter_checksums(parameters.items())
    wrong = [name for name in parameters if loaded[name] != expected[name]]
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(parameters)} parameters differ from '{weights.folder}' after loading: "
            f"{wrong[:5]}"
        )
    _check_stored_tied_head(parameters, weights, expected)
    return expected


def _check_stored_tied_head(
    parameters: Mapping[str, nn.Parameter], weights: WeightFolder, expected: Mapping[str, int]
) -> None:
    if "lm_head.weight" in parameters or "lm_head.weight" not in weights.shapes:
        return
    embedding = "model.embed_tokens.weight"
    if weights.checksum("lm_head.weight", parameters[embedding].dtype) != expected[embedding]:
        raise UserError(
            f"'{weights.folder}' stores an lm_head.weight that differs from the embedding, but its config "
            "ties them: set 'tie_word_embeddings: false' in its config.json"
        )


def _my_share(sizes: Mapping[str, int], rank: int, world_size: int) -> set[str]:
    """Names that this rank checks: assigned from the largest on, each to the rank with the least so far."""
    load, share = [0] * world_size, set()
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        owner = load.index(min(load))
        load[owner] += size
        if owner == rank:
            share.add(name)
    return share


def weight_files(folder: Path, single: str = SAFETENSORS) -> list[Path]:
    """The files with weights that transformers 4 and 5 read of a folder: `single`, else those that its index names.

    Other files are leftovers to them. Warns where there are both. Raises `UserError` where there is neither, for an index
    that is none or names files that are not of the folder, and where files are missing or cannot be looked at.
    """
    index = folder / f"{single}.index.json"
    with readable(folder, where="model.path: "):
        if (folder / single).is_file():
            if index.exists():
                warn_once(f"'{folder}': {single} is read, as by transformers; {index.name} beside it is not")
            return [folder / single]
        if (folder / single).is_symlink():
            raise UserError(
                f"model.path: '{folder / single}' is a link to a file that is not there: copy the file itself"
            )
        if not os.path.lexists(index):
            raise UserError(f"model.path: '{folder}' has neither {single} nor {index.name}")
        names = _named_files(index)
        missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"model.path: {len(missing)} of {len(names)} shards are missing in '{folder}': {missing[:5]!s:.500}"
        )
    return [folder / name for name in names]


def _named_files(index: Path) -> list[str]:
    """The files that a weights index names, each once; a link in the folder may lead out of it, as in the hub's cache."""
    try:
        weight_map = read_object(index).get("weight_map")
    except JsonError as error:
        raise UserError(
            f"model.path: '{index}' is not a weights index ({error.reason}): copy it again"
        ) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"model.path: '{index}' is not a weights index (it has no weight_map): copy it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise UserError(
                f"model.path: '{index}' is not a weights index (no file's name at {tensor!r:.100}): copy it again"
            )
        if not _is_inside(name):
            raise UserError(
                f"model.path: '{index}' names the file {name!r:.200}, which is not one of this folder: an index names files "
                "beside it. Get the model again, from where you trust it"
            )
    return sorted(set(weight_map.values()))


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file in a folder or below it."""
    return bool(
        name.isprintable()
        and "\\" not in name
        and name[:1] != "/"
        and all(
            part not in ("", ".", "..") and len(part.encode()) <= _LONGEST_NAME for part in name.split("/")
        )
    )


def _are_same(entry: _Entry, other: _Entry) -> bool:
    return (entry.dtype, entry.shape) == (other.dtype, other.shape) and _stored_checksum(
        entry, entry.dtype
    ) == _stored_checksum(other, other.dtype)


def _stored_checksum(entry: _Entry, dtype: torch.dtype) -> int:
    """The checksum of a tensor as `dtype`, from the bytes of its file."""
    total, numel, itemsize = 0, entry.shape.numel(), entry.dtype.itemsize
    with entry.file.open("rb") as file:
        file.seek(entry.data)
        for start in range(0, numel, _VERIFY_CHUNK):
            raw = bytearray(file.read(min(_VERIFY_CHUNK, numel - start) * itemsize))
            total += slice_checksum(torch.frombuffer(raw, dtype=entry.dtype).to(dtype), start)
    return _wrapped(total)


def _entries(file: Path) -> list[tuple[str, _Entry]]:
    """The tensors of a file, by name. Raises `UserError` as `read_header`, and for dtypes that are not trained from."""
    stored = read_header(file)
    for tensor in stored:
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"model.path: tensor '{tensor.name}' in '{file}' is {tensor.dtype}; training needs BF16, F16 or F32 weights"
            )
    return [
        (
            tensor.name,
            _Entry(file=file, dtype=_DTYPES[tensor.dtype], shape=torch.Size(tensor.shape), data=tensor.begin),
        )
        for tensor in stored
    ]


def _download(name: HubName, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", *(["*.bin"] if allow_pickle else []), *_PAPERS]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise UserError(f"model.path: cannot download '{name}': {error}") from error


def _wrapped(value: int) -> int:
    """`value` as a signed 64-bit integer, as torch sums wrap."""
    return (value + 2**63) % 2**64 - 2**63
