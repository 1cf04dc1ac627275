"""The package as a wheel, made from a source distribution, in a fresh environment outside of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from bico_ds import __version__
from bico_ds.cluster.preflight.inputs import code_fingerprint
from bico_ds.config.load import list_recipes
from tests import ROOT

SOURCES = (
    "bico_ds", "recipes", "ds_configs", "launch", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE",
)  # fmt: skip
BUILD_SDIST = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
BUILD_WHEEL = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip


def check(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def copy_sources(folder: Path) -> Path:
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """The bin/ of an environment with the wheel. All other packages are those of the running one, but for its own
    bico_ds: a path in a .pth file does not load the .pth files that lie there, so no editable installation either.
    """
    folder = tmp_path_factory.mktemp("wheel")
    check(sys.executable, "-c", BUILD_SDIST, folder, cwd=copy_sources(folder / "source"))
    (sdist,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--quiet")
    check(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    check(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    python = environment / "bin" / "python"
    check(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def test_it_is_the_wheel_that_is_imported(programs, tmp_path):
    imported = check(programs / "python", "-c", "import bico_ds; print(bico_ds.__file__)", cwd=tmp_path)
    assert Path(imported.strip()).is_relative_to(programs.parent)
    assert check(programs / "bico-ds", "--version", cwd=tmp_path) == f"bico_ds {__version__}\n"


def test_it_carries_what_the_checkout_has(programs, tmp_path):
    """Recipes and their descriptions, and the same program by the pre-flight's fingerprint; no commit is recorded."""
    code = (
        "import json\nfrom bico_ds.cluster.preflight.inputs import code_fingerprint\n"
        "from bico_ds.config.load import list_recipes\nfrom bico_ds.config.resources import DS_CONFIGS\n"
        "from bico_ds.runtime.run_folder import provenance\n"
        "configs = sorted(path.name for path in DS_CONFIGS.iterdir())\n"
        "print(json.dumps([list_recipes(), configs, code_fingerprint(), provenance()['commit']]))"
    )
    found = json.loads(check(programs / "python", "-c", code, cwd=tmp_path).splitlines()[-1])
    configs = sorted(path.name for path in (ROOT / "ds_configs").iterdir())
    assert found == [list_recipes(), configs, code_fingerprint(), None]


def test_a_dry_run_needs_no_checkout(programs, tmp_path):
    words = ("train", "--recipe", "llama70b_bico", "--dry-run", "--print-recipe")
    shown = check(programs / "bico-ds", *words, cwd=tmp_path)
    assert "name: llama70b_bico" in shown
    assert "70,553,706,496" in shown  # parameters


def test_a_batch_script_needs_no_checkout(programs, tmp_path):
    script = check(
        programs / "bico-ds", "submit", "--recipe", "llama70b_bico", "--nodes", "2", "--gpus-per-node", "8",
        "--time", "1:00:00", "--set", "distributed.world_size=16", "--dry-run", cwd=tmp_path,
    )  # fmt: skip
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=llama70b_bico\n#SBATCH --nodes=2\n")
    assert f"\nPROJECT=''\nRUN={tmp_path}/runs/llama70b_bico\n" in script
    assert f"\nPYTHON={programs}/python\n" in script
    assert f"\nBIND={tmp_path},{tmp_path}/runs/llama70b_bico\n" in script
    assert str(ROOT) not in script


@pytest.mark.parametrize(
    "words", [["gpu-proof", "--rehearse"], ["preflight", "--recipe", "tiny_base", "--proof"]]
)
def test_the_proof_says_that_it_needs_a_checkout(programs, tmp_path, words):
    done = subprocess.run(
        [programs / "bico-ds", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: the measuring tools (tools/bench/) are not part of the installed package"
    )
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_was_removed_since_an_earlier_build_is_not_in_the_next_wheel(tmp_path):
    source = copy_sources(tmp_path / "source")
    removed = [Path("bico_ds/gone.py"), Path("recipes/gone.yaml")]
    for file in removed:
        (source / file).touch()
    check(sys.executable, "-c", BUILD_WHEEL, tmp_path / "first", cwd=source)
    for file in removed:
        (source / file).unlink()
    check(sys.executable, "-c", BUILD_WHEEL, tmp_path / "second", cwd=source)
    first, second = (names_in_wheel(tmp_path / name) for name in ("first", "second"))
    assert first - second == {"bico_ds/gone.py", "bico_ds/resources/recipes/gone.yaml"}
    assert second < first


def names_in_wheel(folder: Path) -> set[str]:
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())
