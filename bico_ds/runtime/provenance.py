"""What it takes to run the same again, for run.json: versions, commit, host and command line. No torch here."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

from bico_ds import __version__
from bico_ds.common.secrets import words_without_secrets
from bico_ds.config.resources import CHECKOUT
from bico_ds.runtime.launch_environment import slurm_job

COMMIT_FILE = "copied-commit"  # in a job's copy of a checkout


def provenance() -> dict[str, Any]:
    """Versions, commit, host and command line: what it takes to run the same again. No environment: it has secrets."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": words_without_secrets(sys.argv),
        "host": socket.gethostname(),
        "job": slurm_job(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": git_commit(),
    }


def versions() -> dict[str, str]:
    """The versions of this package, and of those that a run's numbers depend on, as far as they are installed."""
    packages = (
        "torch",
        "deepspeed",
        "transformers",
        "datasets",
        "peft",
        "flash-attn",
        "liger-kernel",
        "numpy",
    )
    found = {"bico_ds": __version__}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit() -> str | None:
    """The commit of this checkout, with `-dirty` where it has changes; None where there is none to be found.

    Of a job's copy that of the checkout when it was copied. A repository around it has another project's.
    """
    if CHECKOUT is None:
        return None
    try:
        return (CHECKOUT / COMMIT_FILE).read_text(encoding="utf-8").strip()
    except OSError:  # no copy
        pass
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=CHECKOUT, capture_output=True, text=True, timeout=10, check=True,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(CHECKOUT.parent)},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
