"""The code that a job runs: this checkout, a copy of it beside the job's script, or what is installed. No torch here.

A job waits, and is requeued for days, while somebody works in the checkout. Each start compares its code with that of the
submission.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from bico_ds import __version__
from bico_ds.cluster.preflight.inputs import PACKAGE, files_digest
from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_folder
from bico_ds.config.resources import CHECKOUT, DS_CONFIGS
from bico_ds.runtime.provenance import COMMIT_FILE, git_commit

_COPIED = ("bico_ds", "recipes", "ds_configs", "launch", "tools", "pyproject.toml", "LICENSE")
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc")
_SUFFIXES = (".py", ".cpp", ".h", ".json")


@dataclass(frozen=True, kw_only=True)
class Code:
    """`checkout`: where it is; None where it is installed. `fingerprint`: a digest of what a job runs and reads of it."""

    checkout: Path | None
    fingerprint: str

    def in_words(self) -> dict[str, str | None]:
        """For the record of a submission."""
        return {"code": self.fingerprint, "version": __version__, "commit": git_commit()}


def code_of_this_program() -> Code:
    """The code that this process runs."""
    return Code(checkout=CHECKOUT, fingerprint=fingerprint_of(PACKAGE, DS_CONFIGS))


def fingerprint_of(package: Path, ds_configs: Path) -> str:
    """A digest of a package's sources and of DeepSpeed's configurations, which a run reads when it starts."""
    files = sorted(path for path in package.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    configs = sorted(ds_configs.glob("*.json"))
    return f"{files_digest(files, root=package)}-{files_digest(configs, root=ds_configs)}"


def refuse_copy() -> None:
    """Raise `UserError` where there is no checkout to copy."""
    if CHECKOUT is None:
        raise UserError(
            f"--copy-code: bico_ds {__version__} is installed, not a checkout, and only another installation changes it; "
            "leave the option out"
        )


def copy_code(to: Path) -> Code:
    """Copy this checkout, as far as a job needs it, to a new folder. Raises OSError."""
    assert CHECKOUT is not None, "refuse_copy was asked first"
    with atomic_folder(to) as folder:
        for name in _COPIED:
            source = CHECKOUT / name
            if source.is_dir():
                # An editor's lock on a file is a link to nowhere.
                shutil.copytree(source, folder / name, ignore=_NOT_COPIED, ignore_dangling_symlinks=True)
            elif source.is_file():
                shutil.copy2(source, folder / name)
        if (commit := git_commit()) is not None:
            (folder / COMMIT_FILE).write_text(f"{commit}\n", encoding="utf-8")
    return Code(checkout=to, fingerprint=fingerprint_of(to / "bico_ds", to / "ds_configs"))


def change_since(submitted: str) -> str | None:
    """A warning where this program's code is not that of the submission."""
    now = code_of_this_program()
    if now.fingerprint == submitted:
        return None
    where = f"'{now.checkout}'" if now.checkout is not None else f"the installed bico_ds {__version__}"
    return (
        f"WARNING: the code in {where} is not that of the submission (then {submitted}, now {now.fingerprint}, commit "
        f"{git_commit() or 'unknown'}); this start runs today's. submit --copy-code keeps a copy for the job"
    )
