"""The command `bico-ds`: it finds every command, and imports only the one that is asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module

import pytest

from bico_ds import __version__
from bico_ds.__main__ import COMMANDS, describe_commands
from bico_ds.common.command_line import Command
from tests import ROOT

INTERNAL = {"slurm.attempt", "slurm.native_ops"}  # for the batch script


def bico_ds(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bico_ds", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_every_command_has_a_name_and_a_line_of_help():
    folder = ROOT / "bico_ds" / "commands"
    files = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py")]
    modules = {".".join(file.parts) for file in files if file.name != "__init__"}
    assert set(COMMANDS.values()) == modules - INTERNAL
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*\.$", describe_commands(), re.MULTILINE), name


@pytest.mark.parametrize("module", sorted({*COMMANDS.values(), *INTERNAL}))
def test_every_command_has_the_one_frame_and_its_own_example(module):
    found = import_module(f"bico_ds.commands.{module}")
    assert isinstance(found.main, Command)
    assert found.main.description == found.__doc__
    assert "\n    " in found.__doc__


def test_a_name_that_is_none_is_refused_with_a_similar_one():
    done = bico_ds("trian", "--recipe", "tiny_base")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command 'trian' (did you mean 'train'?)")


def test_the_version_is_the_package_s_own():
    assert bico_ds("--version").stdout == f"bico_ds {__version__}\n"


def test_a_command_names_itself_and_keeps_its_exit_code():
    done = bico_ds("train")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bico-ds train ")
    assert bico_ds("compare", "no-such-run").returncode == 2


@pytest.mark.parametrize(
    "words", [["--help"], ["compare", "--help"], ["train", "--help"], ["submit", "--help"]]
)
def test_help_imports_no_torch(words):
    code = (
        "import sys, atexit; from bico_ds.__main__ import main;"
        "atexit.register(lambda: print('heavy', sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules))));"
        "main()"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("usage: bico-ds")
    assert done.stdout.endswith("heavy []\n"), done.stderr


SHIMS = [*sorted((ROOT / "launch").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]


@pytest.mark.parametrize("path", SHIMS, ids=lambda path: path.stem)
def test_a_script_takes_the_package_of_its_own_checkout(path, tmp_path):
    """Whichever is installed, and whatever comes first on PYTHONPATH."""
    other = tmp_path / "bico_ds"
    other.mkdir()
    (other / "__init__.py").write_text("raise SystemExit('another package was imported')")
    done = subprocess.run(
        [sys.executable, str(path), "--help"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout[:7]) == (0, "usage: "), done.stderr
