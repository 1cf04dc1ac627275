"""A batch job as it was asked for: checked texts and numbers, before a script is made of them. No torch here."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bico_ds.cluster.batch_words import literal_pattern, refuse_control_characters, sbatch_line_of
from bico_ds.cluster.prologue import Prologue
from bico_ds.common.errors import UserError
from bico_ds.config.paths import LocalPath
from bico_ds.config.resources import CHECKOUT
from bico_ds.config.schema import Recipe

_TIME = re.compile(r"(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})")  # sbatch(1), --time


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What SLURM is asked for; it warns `signal_seconds` before the end of `time`. `more`: further options of `sbatch`.

    Raises `UserError` where these two do not fit, and for texts that have no place in a batch script.
    """

    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    time: str
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal_seconds: int = 300
    more: Sequence[str] = ()

    def __post_init__(self) -> None:
        for option in ("partition", "account", "qos", "constraint"):
            if (text := getattr(self, option)) is not None:
                _check_text(text, f"--{option}")
        for text in self.more:
            _check_text(text, "--sbatch")
            sbatch_line_of(text)  # refuses what is no option
        if not _TIME.fullmatch(self.time):
            raise UserError(f"--time '{self.time}': SLURM reads MINUTES, HH:MM:SS, or DAYS-HH:MM:SS")
        if 0 < seconds(self.time) <= self.signal_seconds:  # 0: no limit
            raise UserError(
                f"--signal-seconds {self.signal_seconds}: the warning must come before --time {self.time} "
                f"({seconds(self.time)} s) is over, and after some training; give a smaller one, or more time"
            )

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


ContainerRuntime = Literal["apptainer", "pyxis"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The values of the script's variables. `bind`, `python` and `native_ops` are paths of the nodes, expanded there.

    `container`: of apptainer an image file; of pyxis (enroot under SLURM's srun) a .sqsh file, or an image of a registry.
    `offline`: Hugging Face's libraries read their cache alone, which is where `caches` says, by its variable. Raises
    `UserError` for texts that have no place in a batch script.
    """

    container: str | None = None
    container_runtime: ContainerRuntime = "apptainer"
    bind: Sequence[LocalPath] = ()
    offline: bool = False
    caches: Mapping[str, Path] = field(default_factory=dict)
    prologue: Prologue | None = None
    max_requeues: int = 20
    max_excluded: int = 2
    network_interface: str | None = None
    python: LocalPath = LocalPath(sys.executable)  # noqa: RUF009
    native_ops: LocalPath | None = None

    def __post_init__(self) -> None:
        given = [
            ("--container", self.container),
            ("--network-interface", self.network_interface),
            ("--python", self.python.text),
            ("--native-ops", None if self.native_ops is None else self.native_ops.text),
            *(("--bind", path.text) for path in self.bind),
        ]
        for option, text in given:
            if text is not None:
                _check_text(text, option)
        for path in self.bind if self.container_runtime == "pyxis" else ():
            if set(path.text) & set(",:"):
                raise UserError(
                    f"--bind {path}: of pyxis the path of one folder, which is bound under its own name"
                )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One batch script: a run, or an array of them.

    `copies_code`: the job runs a copy of this checkout, which lies beside the script. Raises `UserError` for a folder that
    has no place in a batch script.
    """

    name: str
    folder: Path  # where the script and the job's own output go
    runs: dict[Path, Recipe] = field(repr=False)
    resources: Resources
    settings: Settings
    max_parallel: int | None = None
    copies_code: bool = False

    def __post_init__(self) -> None:
        for run in self.runs:
            refuse_control_characters(str(run), "output_dir (--output-dir)")
        literal_pattern(self.folder, "output_dir (--output-dir)")
        refuse_control_characters(str(Path.cwd()), "the working directory")
        if self.settings.container is not None:
            for path in self.bound:
                if set(path) & set(",:"):
                    raise UserError(
                        f"--container: {self.settings.container_runtime} cannot bind '{path}', for it holds a comma or colon"
                    )
        if self.copies_code and ":" in str(self.folder):
            raise UserError(f"--copy-code: Python finds no code below '{self.folder}', for it holds a colon")

    @property
    def is_array(self) -> bool:
        return len(self.runs) > 1

    @property
    def bound(self) -> list[str]:
        """The folders of the login node that a container sees, too; of the runs each sees its own."""
        return [*map(str, self.shared), *map(str, self.runs)]

    @property
    def shared(self) -> list[Path]:
        """Those folders of the login node that all runs see."""
        code = [self.folder] if self.copies_code else [CHECKOUT] if CHECKOUT is not None else []
        cache = [path for path in self.settings.caches.values() if path.is_dir()]
        return [*code, Path.cwd(), *cache]


def _check_text(text: str, option: str) -> None:
    if not text.strip():
        raise UserError(f"{option}: must not be empty; leave it out instead")
    refuse_control_characters(text, option)


def seconds(time_limit: str) -> int:
    """Seconds of a time as sbatch(1) reads it: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`."""
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, rest_seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest_seconds
