"""Open TensorBoard on runs, each under the name of its folder.

    bico-ds tensorboard
    bico-ds tensorboard runs/tiny_bico runs/tiny_ntp --port 6007
    bico-ds tensorboard runs --bind-all

All runs below each FOLDER are shown, those that begin later too, and event files of other programs; what a later start set
aside (replaced-N/) is not. What follows `--` goes to tensorboard as it is. Ctrl-C ends it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.config.arguments import local_path, not_negative
from bico_ds.config.unique_names import unique_names
from bico_ds.runtime.run_folder import ASIDE, RunFolder

_RUN = RunFolder("")
# Folders of a run that hold many files, and no event file.
_WITHOUT_EVENTS = {
    folder.name for folder in (_RUN.checkpoints, _RUN.export, _RUN.logs, _RUN.tokenizer, _RUN.evaluation)
}
_EVENTS = "tfevents"  # is in the name of every event file
_SECONDS = 2.0  # between two looks for new files; TensorBoard itself looks every 5
_MOST_OF_TIME = 0.02  # that looking may take: network file systems are slow
_SECONDS_TO_END = 10.0
_MOST_NAMES = 8
_LAST_PORT = 65535
_LOOKS_LIKE = str.maketrans({'"': "\N{RIGHT DOUBLE QUOTATION MARK}", "\\": "\N{FULLWIDTH REVERSE SOLIDUS}"})


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        type=local_path,
        default=[Path("runs")],
        help="a run folder, or what holds some at any depth (default: runs)",
    )
    parser.add_argument(
        "--port", metavar="N", type=not_negative, help="default: 6006, or the next that is free; 0: any"
    )
    parser.add_argument("--host", metavar="NAME", help="the address to listen at (default: localhost)")
    parser.add_argument(
        "--bind-all",
        "--bind_all",
        action="store_true",
        help="listen at all addresses of this machine: whoever reaches it can read the runs",
    )


def show(options: Namespace) -> int:
    """Serve until TensorBoard ends, or is ended; returns 1 where it failed, and 0 also where the user ended it."""
    for folder in options.folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; name the one that holds your runs: bico-ds tensorboard FOLDER"
            )
    if options.port is not None and options.port > _LAST_PORT:
        raise UserError(f"--port {options.port}: the last one is {_LAST_PORT}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="bico-ds-tensorboard-") as temporary:
        links = RunLinks(options.folders, Path(temporary))
        links.refresh()
        print(_found(links.names, options.folders), flush=True)
        return _serve(links, _options_of_tensorboard(options))


def _options_of_tensorboard(options: Namespace) -> list[str]:
    port = [] if options.port is None else ["--port", str(options.port)]
    host = [] if options.host is None else ["--host", options.host]
    everywhere = ["--bind_all"] if options.bind_all else []
    return [*port, *host, *everywhere, *options.passed_on]


def _found(names: Sequence[str], folders: Sequence[Path]) -> str:
    where = ", ".join(map(str, folders))
    if not names:
        return f"no run is in {where} yet; TensorBoard shows them as they begin"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (
        f"{len(names)} run(s) in {where}: {', '.join(names[:_MOST_NAMES])}{more}\n"
        "Curves are smoothed at first: /?smoothing=0 behind the address shows the points as they are."
    )


def _serve(links: RunLinks, options: Sequence[str]) -> int:
    # -P: a folder tensorboard/ here, as a run has one, is not the program.
    command = [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", str(links.folder), *options]
    server = subprocess.Popen(command)
    try:
        pause = _SECONDS
        while True:
            try:
                return int(server.wait(timeout=pause) != 0)
            except subprocess.TimeoutExpired:
                started = time.perf_counter()
                links.refresh()
                pause = max(_SECONDS, (time.perf_counter() - started) / _MOST_OF_TIME)
    except KeyboardInterrupt:
        return 0
    finally:
        server.terminate()
        try:
            server.wait(timeout=_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            server.kill()


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


class RunLinks:
    """A folder that holds, for each run, links to its event files in a folder of the run's name.

    TensorBoard names a run by the folder of its event files, which is `RUN/tensorboard`. With several `folders` the name of
    each begins those of the runs below it.
    """

    def __init__(self, folders: Sequence[Path], folder: Path) -> None:
        self.folder = folder
        roots = [path.resolve() for path in folders]
        titles = unique_names(_run_of(root).name for root in roots)
        self._roots = dict(zip(titles, roots, strict=True))
        self.names: list[str] = []

    def refresh(self) -> None:
        """Link what is there now, and nothing else."""
        wanted: dict[Path, Path] = {}
        seen: set[tuple[int, int]] = set()
        for title, root in self._roots.items():
            for file in _event_files(root, seen):
                wanted[self.folder / self._name(title, root, file) / file.name] = file
        self.names = sorted({str(link.parent.relative_to(self.folder)) for link in wanted})
        for link in [path for path in self.folder.rglob("*") if path.is_symlink()]:
            if link not in wanted:
                link.unlink()
        for link, file in wanted.items():
            if not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)

    def _name(self, title: str, root: Path, file: Path) -> Path:
        run = _run_of(file.parent)
        below = run.relative_to(root) if run.is_relative_to(root) else Path()
        named = Path(title) / below if len(self._roots) > 1 or below == Path() else below
        return Path(_shown(str(named)))


def _run_of(folder: Path) -> Path:
    return folder.parent if folder.name == _RUN.tensorboard.name else folder


def _shown(name: str) -> str:
    """Without what JSON escapes, and what is no text: TensorBoard shows no picture of a run whose name has such."""
    shown = (character if character.isprintable() else "\ufffd" for character in name)
    return "".join(shown).translate(_LOOKS_LIKE)


def _event_files(root: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """The event files below a folder, through links, but for what runs set aside and where they have none.

    `seen`: the folders that were looked into, which grows; none is looked into twice.
    """
    for at, folders, names in os.walk(root, followlinks=True):
        try:
            status = os.stat(at)
        except OSError:  # a start has moved it meanwhile
            continue
        if (status.st_dev, status.st_ino) in seen:  # a link, or another name, led here, too
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(
            name for name in folders if name not in _WITHOUT_EVENTS and ASIDE.number_in(name) is None
        )
        yield from (Path(at, name) for name in sorted(names) if _EVENTS in name and not name.startswith("."))


main = Command(description=__doc__, add_options=add_options, run=show, passes_on=True)


if __name__ == "__main__":
    main.start()
