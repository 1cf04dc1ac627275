"""The DeepSpeed operations that are compiled at first use: compiled before the ranks start, by one process per node.

Ranks that compile wait for one another by a lock file (torch's `FileBaton`), without end where the process that made the
lock was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from bico_ds.common.errors import UserError
from bico_ds.common.private_folder import open_private_folder
from bico_ds.config.schema import Recipe
from bico_ds.optim.table import kind_of
from bico_ds.runtime.ds_config import merged_ds_config

logger = logging.getLogger(__name__)

FOLDER = "TORCH_EXTENSIONS_DIR"
ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"
_READABLE = re.compile(r"\d+\.\d+(\+PTX)?")  # all that DeepSpeed's builder takes for an architecture
# A rank that only loads what is compiled holds the lock for a moment, and no one else compiles during `build`.
_ABANDONED_SECONDS = 60.0


def build(recipe: Recipe) -> None:
    """Compile what `recipe` needs into TORCH_EXTENSIONS_DIR. Raises `UserError`."""
    root = os.environ.get(FOLDER)
    if not root:
        raise UserError(f"{FOLDER} is not set: it names the folder for compiled operations")
    if problem := _obstacle(Path(root)):
        raise UserError(f"{FOLDER}: {problem}; name another folder, or unset it")
    with open(Path(root, ".building"), "w", encoding="utf-8") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        release_abandoned_locks()
        prefer_own_ninja()
        write_readable_architectures()
        for name in needed(recipe, on_cuda=get_accelerator().device_name() == "cuda"):
            _build_one(name)


def choose_folder(spare: Path) -> Path | None:
    """Let operations be compiled where they can be: where the user or torch wants them, else in `spare`, which is said.

    What the user has not named must be his own: from a folder that others can write, code of theirs would be loaded. Sets
    TORCH_EXTENSIONS_DIR. Returns `spare` where it is taken, to be made by `open_spare_folder`.
    """
    named = os.environ.get(FOLDER)
    root = Path(named or cpp_extension.get_default_build_root())
    problem = _obstacle(root) or (None if named else _stranger(root))
    if problem is None:
        if named is not None:
            os.environ[FOLDER] = str(root.absolute())
        return None
    logger.warning(
        "%s%s: DeepSpeed's operations are compiled into %s", f"{FOLDER}: " * bool(named), problem, spare
    )
    os.environ[FOLDER] = str(spare.absolute())
    return spare


def open_spare_folder(spare: Path, *, alone: bool) -> None:
    """Make the folder that `choose_folder` took, for this user alone. Raises `UserError`.

    `alone`: no other rank uses it yet, so that what others could have put there is removed.
    """
    try:
        if not open_private_folder(spare) and alone:
            for path in spare.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise UserError(
            f"no folder for DeepSpeed's compiled operations: {error}; name one that can be written by {FOLDER}"
        ) from None


def _obstacle(root: Path) -> str | None:
    """Why nothing can be compiled into a folder, which is made where it is missing; None where it can."""
    try:
        if root.exists():
            with tempfile.TemporaryFile(dir=root):
                pass
        else:
            open_private_folder(root)
        closed = next((path for path in _operations(root) if not os.access(path, os.W_OK | os.X_OK)), None)
    except OSError as error:
        return f"cannot write into '{root}' ({error.strerror or error})"
    return f"cannot write into '{closed}'" if closed else None


def _stranger(root: Path) -> str | None:
    for path in (root, *_operations(root)):
        status = path.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
            return f"'{path}' belongs to another user, or anybody can write into it"
    return None


def _operations(root: Path) -> list[Path]:
    """Folders of compiled operations: beside one another where TORCH_EXTENSIONS_DIR is set, else below Python's version."""
    return [path for path in (*root.glob("*"), *root.glob("*/*")) if path.is_dir()]


def _build_one(name: str) -> None:
    builder = get_accelerator().create_op_builder(name)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        print(f"{name}: not available here", flush=True)
        return
    started = time.perf_counter()
    try:
        builder.load(verbose=False)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"DeepSpeed's {name} does not compile here: {error}") from error
    print(f"{name}: ready after {time.perf_counter() - started:.1f} s", flush=True)


def prefer_own_ninja() -> None:
    """Let torch find the ninja beside this Python: two versions take turns to recompile what the other one built."""
    path = os.environ.get("PATH", "")
    own = str(Path(sys.executable).parent)
    if own not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([own, path])


def write_readable_architectures() -> None:
    """Write TORCH_CUDA_ARCH_LIST anew where DeepSpeed cannot read it, as it cannot `9.0a` or `Hopper`, which torch reads.

    The letter asks for instructions of one architecture alone, for which DeepSpeed's builder has no way to ask. What torch
    does not know either stays as it is: the compilation says so.
    """
    asked = os.environ.get(ARCHITECTURES, "")
    found = readable_architectures(asked)
    if found != asked:
        os.environ[ARCHITECTURES] = found
        logger.info("%s: %s, as DeepSpeed cannot read '%s'", ARCHITECTURES, found, asked)


def readable_architectures(asked: str) -> str:
    """A list that DeepSpeed's builder can read; unchanged where it can read all of it, or torch cannot."""
    entries = re.split(r"[;\s]+", asked.strip("; \t\n"))
    numbers = [re.sub(r"(?<=\d)[a-z](?=\+PTX$|$)", "", entry) for entry in entries]
    if not asked or all(map(_READABLE.fullmatch, entries)):
        return asked
    if not all(map(_READABLE.fullmatch, numbers)):
        numbers = _named_architectures(numbers)
    return ";".join(dict.fromkeys(numbers)) or asked


def _named_architectures(entries: list[str]) -> list[str]:
    """What torch makes of names of architectures; empty where it does not know one of them."""
    asked = os.environ.get(ARCHITECTURES)
    os.environ[ARCHITECTURES] = ";".join(entries)
    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except (ValueError, IndexError):  # an unknown name; "native" without a GPU
        return []
    finally:
        del os.environ[ARCHITECTURES]
        if asked is not None:
            os.environ[ARCHITECTURES] = asked
    found = re.findall(r"arch=compute_(\d+)(\d)[a-z]?,code=(compute|sm)_", " ".join(flags))
    kinds: dict[str, set[str]] = {}
    for major, minor, kind in found:
        kinds.setdefault(f"{major}.{minor}", set()).add(kind)
    return [f"{number}{'+PTX' * ('compute' in kind)}" for number, kind in kinds.items()]


def release_abandoned_locks() -> None:
    """Remove the locks of compilations that were killed, before a rank waits for one without end."""
    root = Path(os.environ.get(FOLDER) or cpp_extension.get_default_build_root())
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        _remove_abandoned(lock)


def _remove_abandoned(lock: Path) -> None:
    """Wait until a lock is released; remove one that no process here holds, and that is too old for another node's."""
    while lock.exists() and not _is_held_here(lock):
        try:
            age = time.time() - lock.stat().st_mtime
            if age > _ABANDONED_SECONDS:
                lock.unlink()
        except FileNotFoundError:
            return
        time.sleep(0.5)


def _is_held_here(lock: Path) -> bool:
    """Whether a process of this machine has the lock open, as torch's `FileBaton` has while it compiles (Linux)."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == str(lock):
                return True
    return False


def needed(recipe: Recipe, *, on_cuda: bool) -> list[str]:
    """Names of DeepSpeed's builders: on a CPU the communication operation, the optimizer, and what NVMe needs."""
    offloads = [_offload_device(recipe, part) for part in ("optimizer", "param")]
    names = [] if on_cuda else ["ShareMemCommBuilder"]
    offloaded = offloads[0] in ("cpu", "nvme")
    if builder := kind_of(recipe.optimizer).ds_builder(offloaded=offloaded, on_cuda=on_cuda):
        names.append(builder)
    if "nvme" in offloads:
        names.append("AsyncIOBuilder")
    return names


def _offload_device(recipe: Recipe, part: str) -> str:
    zero = merged_ds_config(recipe).get("zero_optimization", {})
    return (zero.get(f"offload_{part}") or {}).get("device", "none")
