"""The compiled library is loaded only from where nobody else can have put it. A real compiler, a small library."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bico_ds.common.private_folder import NotPrivateError
from bico_ds.native import library
from tests import ROOT

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of the library, not made so far."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(library, "_SOURCES", [source])
    monkeypatch.setattr(library, "_HEADERS", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bico_ds"


def build() -> bytes:
    """What would be loaded."""
    descriptor = library._built(COMPILER)
    with open(descriptor, "rb") as file:
        return file.read()


def test_a_library_is_built_once_into_a_folder_of_this_user_alone(cache):
    built = build()
    (file,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    written = file.stat().st_mtime_ns
    assert build() == built == file.read_bytes() and file.stat().st_mtime_ns == written


BUILT_ANEW = """
import os, shutil
from bico_ds.native import library
first = library.native_refusal()
folder = library.Path(os.environ["XDG_CACHE_HOME"]) / "bico_ds"
for file in folder.glob("*.so"):
    other = shutil.copy(file, f"{file}.other")
    os.chmod(other, 0o700)
    os.replace(other, file)
kept = os.open(os.devnull, os.O_RDONLY)  # the loader knows a library again by its name, a descriptor's number
library.native_refusal.cache_clear()
print([first, library.native_refusal()])
"""


@pytest.mark.skipif(library.native_refusal() is not None, reason=f"the kernels {library.native_refusal()}")
def test_a_library_that_another_process_has_built_anew_is_not_loaded_again(tmp_path):
    of_user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bico_ds"
    shutil.copytree(of_user, tmp_path / "bico_ds")
    (tmp_path / "bico_ds").chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", BUILT_ANEW],
        cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[None, None]\n"), done.stderr


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o755, 0o750])
def test_what_lay_in_a_folder_that_others_could_enter_is_built_anew(cache, mode):
    built = build()
    (file,) = cache.iterdir()
    file.write_bytes(b"planted")
    cache.chmod(mode)
    assert build() == built
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def plant_writable(file: Path, built: bytes) -> None:
    file.write_bytes(b"planted")
    file.chmod(0o666)


def plant_link(file: Path, built: bytes) -> None:
    other = file.with_name("other")
    other.write_bytes(b"planted")
    file.unlink()
    file.symlink_to(other)


def plant_pipe(file: Path, built: bytes) -> None:
    file.unlink()
    os.mkfifo(file)


def plant_of_another(file: Path, built: bytes) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    file.write_bytes(b"planted")
    os.chown(file, 12345, 12345)


@pytest.mark.parametrize("plant", [plant_writable, plant_link, plant_pipe, plant_of_another])
def test_a_file_that_another_can_have_written_is_built_anew(cache, plant):
    built = build()
    (file,) = cache.iterdir()
    plant(file, built)
    assert build() == built


def test_a_folder_behind_a_link_or_of_another_user_is_passed_over_and_the_reason_said(cache, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(elsewhere)
    with pytest.raises(NotPrivateError, match="is a symbolic link"):
        build()
    assert not list(elsewhere.iterdir())
    if os.geteuid() == 0:
        cache.unlink()
        cache.mkdir()
        os.chown(cache, 12345, 12345)
        with pytest.raises(NotPrivateError, match=r"belongs to another user \(id 12345\)"):
            build()
