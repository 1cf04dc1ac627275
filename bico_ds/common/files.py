"""Files and folders that appear complete or not at all, and the checksums of files.

What is written lies first under a temporary name beside its final one, goes to the disk, and is then renamed. A killed
process can leave such a temporary file or folder: a hidden one, whose name ends in `.incomplete`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

# Of a disk that is full, over its quota, read-only, or broken: no bug of this program.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_FOLDER = (
    getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
)  # O_PATH (Linux): needs no right to read it
_DIGITS = 12  # of the random part of a temporary name


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file, in UTF-8 for text: a reader, or a crash, sees the old content or the new, never a part.

    Raises OSError; the old content is then still there, except where the folder's last flush failed.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def overwrite(path: Path, content: str, *, only_if: Callable[[bytes], bool]) -> bool:
    """Put new content into a small file that is there, in its place on the disk: a full one has no room for a new file.

    `only_if` gets the old content, and says whether to; whoever puts another file there meanwhile loses nothing. Returns
    whether it was done. Not atomic: a crash may leave a part. Spaces before the last line's end keep the length, where the
    old content was longer. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        old = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        if not only_if(old):
            return False
        new = content.encode()
        new = new.removesuffix(b"\n").ljust(len(old) - 1) + b"\n"
        if os.pwrite(descriptor, new, 0) < len(new):  # it is longer than the old one, and takes another block
            os.pwrite(descriptor, old, 0)
            os.ftruncate(descriptor, len(old))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which replaces `path` when the block ends without an error.

    Where that fails nothing is left, also if its folder was renamed meanwhile.
    """
    temporary = temporary_sibling(path)
    folder = os.open(path.parent, _FOLDER)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary.name, dir_fd=folder)
        raise
    finally:
        os.close(folder)
    sync_names(path.parent)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder to fill, which becomes `folder` when the block ends without an error.

    Without `replace` several processes may write the same `folder`: the first one wins, the others get an OSError, as where
    something is there already. With `replace` the caller must be its only writer: what is there goes when the new folder is
    complete, and what killed writers left goes at once. Of a symbolic link the folder that it names is replaced.
    """
    folder = folder.resolve()
    if replace:
        recover_folder(folder)
    temporary = incomplete_folder(folder)
    try:
        yield temporary
        flush_folder(temporary)
        publish_folder(temporary, folder, replace=replace)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_sibling(path: Path) -> Path:
    """A temporary name beside `path` that no other process has; nothing is made there."""
    return path.with_name(_temporary_name(path.name, uuid.uuid4().hex[:_DIGITS]))


def incomplete_folder(folder: Path) -> Path:
    """Make an empty folder beside `folder`, for `publish_folder`, under a name that no other process has."""
    temporary = temporary_sibling(folder)
    temporary.mkdir(parents=True)
    return temporary


def publish_folder(complete: Path, folder: Path, *, replace: bool = False) -> None:
    """Rename the folder `complete`, which is flushed already (`flush_folder`), to `folder`, which lies beside it.

    With `replace` what was there is removed after the new one is in place, and put back where that fails. Without, raises
    OSError where something is there, but for an empty folder.
    """
    previous = _previous(folder)
    replaces = replace and folder.exists()
    if replaces:
        remove(previous)
        folder.rename(previous)
    try:
        complete.rename(folder)
    except OSError:
        if replaces:
            previous.rename(folder)
        raise
    sync_names(folder.parent)
    if replace:
        remove(previous)


def recover_folder(folder: Path) -> None:
    """Tidy up after killed writers of `folder`; only for its one writer.

    Puts the former folder back where a writer was killed before the new one took its place, and removes incomplete ones.
    """
    previous = _previous(folder)
    if previous.exists() and not folder.exists():
        previous.rename(folder)
    remove(previous)
    remove_incomplete(folder.parent, glob.escape(folder.name))


def remove_incomplete(parent: Path, names: str = "*") -> None:
    """Remove from `parent` what killed writers left; only for the one writer of these names, a glob pattern.

    Files and folders; what cannot be removed stays.
    """
    for left in parent.glob(_temporary_name(names, "?" * _DIGITS)):
        with contextlib.suppress(OSError):
            remove(left)


def checksum(path: Path, algorithm: Literal["sha256", "blake2b"]) -> str:
    """Checksum of a file's content in hexadecimal digits: SHA-256, or BLAKE2b of 128 bits. Raises OSError."""
    new = functools.partial(hashlib.blake2b, digest_size=16) if algorithm == "blake2b" else hashlib.sha256
    with open(path, "rb") as file:
        return hashlib.file_digest(file, new).hexdigest()


def sync(path: Path) -> None:
    """Wait until the content of a file is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Wait until all that a folder holds is on the disk. Raises OSError."""
    for path in folder.iterdir():
        if path.is_dir():
            flush_folder(path)
        else:
            sync(path)
    sync_names(folder)


def sync_names(folder: Path) -> None:
    """Flush the names in a folder, where its file system and its permissions let it be done: some know no such flush."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM):
            raise


def remove(path: Path) -> None:
    """Remove a file, a link (not what it names), or a folder with all that it holds, as far as that can be done."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _temporary_name(name: str, unique: str) -> str:
    return f".{name}.{unique}.incomplete"


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")
