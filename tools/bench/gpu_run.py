#!/usr/bin/env python
"""A real run on this GPU: train, checkpoint, SIGKILL, resume, evaluate, export; its losses beside those of a CPU.

    python tools/bench/gpu_run.py [--out DIR] [--rehearse] [--json]
    python tools/bench/gpu_run.py --write-reference        on a CPU, after a change of what the recipe computes

`launch/train.py` trains recipe tiny_bico from random weights, without network or data from outside, twice at once: to the
end, and killed after its first checkpoint, then resumed. Plain transformers reads the export. --rehearse: all on a CPU.
--out keeps what the runs print, straight.log and killed.log, also where this command is killed.
Exit code 1 if a start fails, or a number is not what it must be.

gpu_run_reference.json beside this file holds the losses on a CPU, in fp32 and in bf16. A GPU trains in bf16, and rounds
elsewhere: its loss may differ from fp32's by `TIMES` what bf16 itself changed up to that step on the CPU. A CPU computes the
same operations in fp32, up to the order of sums (`CPU_LIMIT`).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import this_checkout  # noqa: F401  first on sys.path
import torch

from bico_ds.common.command_line import Command
from bico_ds.common.errors import RunError, UserError
from bico_ds.common.files import write_atomically
from bico_ds.config.arguments import local_path
from bico_ds.config.resources import CHECKOUT
from bico_ds.proof.findings import Findings
from bico_ds.proof.parts import TORCH_ADAM
from bico_ds.runtime.launch_environment import without_launcher

REFERENCE = Path(__file__).with_name("gpu_run_reference.json")
STEPS, EVERY = 24, 8  # of a run, and between two checkpoints
COMPARED = 16  # first losses that are compared with the CPU's: rounding grows from step to step
TIMES = 5
CPU_LIMIT = 2e-3
EXPORT_LIMIT = 0.5  # of the loss on all texts beside that of the last steps, each on a part of them
SETTINGS = (
    "model.path=null", "model.config.vocab_size=51", "data.facts.name_first=3", "data.facts.description_first=3",
    "data.facts.both=6", "data.facts.test_prompts=1", "monitor.every_steps=1", "schedule.warmup_steps=4",
    "schedule.decay_steps=4", f"training.steps={STEPS}", "evaluation.max_new_tokens=4", f"evaluation.every_steps={STEPS}",
    TORCH_ADAM,
)  # fmt: skip
STRAIGHT = ("evaluation.tasks=[]", "checkpoint.export=false")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in fp32")
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="where the logs of the runs stay (default: nowhere)"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument(
        "--write-reference", action="store_true", help="write the CPU's losses anew, and nothing else"
    )


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of this machine, each in a folder below `folder`; their logs below `logs`, by default there, too."""

    folder: Path
    logs: Path | None = None
    on_cuda: bool
    dtype: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *changes: str) -> subprocess.Popen[bytes]:
        """Start a run, or go on with it, in a process group of its own; what it prints goes to NAME.log."""
        assert CHECKOUT is not None
        settings = [
            f"model.dtype={self.dtype}",
            f"data.cache_dir={self.folder / f'data-{name}'}",
            *SETTINGS,
            *changes,
        ]
        command = [sys.executable, str(CHECKOUT / "launch" / "train.py"), "--recipe", "tiny_bico"]
        command += ["--output-dir", str(self.folder / name), *(w for key in settings for w in ("--set", key))]
        hidden = {} if self.on_cuda else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        with open(self.log(name), "ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, env={**without_launcher(), **hidden},
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no run behind where one of them has failed."""
        for process in self.started:
            kill(process)

    def log(self, name: str) -> Path:
        return (self.logs or self.folder) / f"{name}.log"

    def finish(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Wait for a run's end. Raises `RunError`, with the last lines of what it printed, where it failed."""
        if process.wait() or self.state(name) != "done":
            lines = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
            raise RunError(
                "\n".join([f"the run '{name}' failed (exit code {process.returncode})", *lines[-15:]])
            )

    def kill_after_checkpoint(self, name: str, process: subprocess.Popen[bytes]) -> int:
        """Send SIGKILL when the first checkpoint is there; returns the last step that was logged by then."""
        while not (self.folder / name / "last_checkpoint.json").is_file() and process.poll() is None:
            time.sleep(0.005)
        kill(process)
        return len(self.losses(name))

    def state(self, name: str) -> str | None:
        file = self.folder / name / "state.json"
        return json.loads(file.read_text())["state"] if file.is_file() else None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that SIGKILL cut is left out."""
        file = self.folder / name / "metrics.jsonl"
        written = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return [json.loads(line) for line in written if line.endswith("}")]

    def losses(self, name: str) -> list[float]:
        return [line["loss/all"] for line in self.lines(name) if line["kind"] == "train"]


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a run and the processes of its group by SIGKILL; nothing happens to one that has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(runs: Runs) -> Findings:
    """The two runs at once, then what must be true of them."""
    straight = runs.start("straight", *STRAIGHT, f"checkpoint.every_steps={10 * STEPS}")
    every = f"checkpoint.every_steps={EVERY}"
    killed_after = runs.kill_after_checkpoint("killed", runs.start("killed", every))
    state = runs.state("killed")
    say(f"killed after step {killed_after}, state {state}")
    resumed = runs.start("killed", every)
    runs.finish("straight", straight)
    say("the uninterrupted run is done")
    runs.finish("killed", resumed)
    say("the killed run was resumed, and is done")
    findings = Findings()
    if state != "running":
        findings.add_wrong(f"the run was to be killed midway, and was {state}")
    checks = [
        *compare_losses(runs),
        *check_outcome(runs),
        (
            "steps logged before SIGKILL",
            killed_after,
            f"{EVERY} to {STEPS - 1}",
            EVERY <= killed_after < STEPS,
        ),
    ]
    for what, found, limit, right in checks:
        if not right:
            findings.add_wrong(f"{what}: {found}, must be {limit}")
    findings.add_table(
        f"what must be true of the run ({runs.dtype})",
        ["what", "found", "must be"],
        [[what, found, limit] for what, found, limit, _ in checks],
    )
    findings.add_table(
        "losses",
        ["step", "here", "resumed here", "CPU, fp32", "CPU, bf16"],
        [list(row) for row in itertools.zip_longest(range(1, STEPS + 1), *loss_columns(runs))],
    )
    return findings


Check = tuple[str, Any, str, bool]  # what, found, limit, right


def loss_columns(runs: Runs) -> list[list[float]]:
    reference = json.loads(REFERENCE.read_text())
    columns = [runs.losses("straight"), runs.losses("killed"), reference["fp32"], reference["bf16"]]
    return [[round(loss, 4) for loss in column] for column in columns]


def limits(*, on_cuda: bool) -> list[float]:
    """By step, how far a loss may be from the reference's in fp32."""
    if not on_cuda:
        return [CPU_LIMIT] * STEPS
    reference = json.loads(REFERENCE.read_text())
    differences = [abs(a - b) for a, b in zip(reference["fp32"], reference["bf16"], strict=True)]
    # The first steps, which differ by luck alone, are taken together.
    return [TIMES * max(differences[: max(step, EVERY)]) for step in range(1, STEPS + 1)]


def compare_losses(runs: Runs) -> list[Check]:
    """First losses beside the CPU's; those of the resumed run beside the uninterrupted one's."""
    straight, killed = runs.losses("straight"), runs.losses("killed")
    reference = json.loads(REFERENCE.read_text())["fp32"]
    allowed = limits(on_cuda=runs.on_cuda)
    checks = []
    for what, ours, theirs, count in (
        (f"losses of steps 1 to {COMPARED} beside the CPU's", straight, reference, COMPARED),
        ("losses of the resumed run beside the uninterrupted one's", killed, straight, STEPS),
    ):
        parts = [abs(a - b) / limit for a, b, limit in zip(ours, theirs, allowed, strict=False)][:count]
        # A loss that is not a number is within no limit, and `max` would pass over it.
        right = len(parts) == count and all(part <= 1 for part in parts)
        share = f"{max(parts, default=0):.3f} of the limit, {len(parts)} steps"
        checks.append((what, share, f"at most 1, {count} steps, all numbers", right))
    return checks


def check_outcome(runs: Runs) -> list[Check]:
    """Evaluation and export of the resumed run; the export read by plain transformers, on the run's own texts."""
    lines = runs.lines("killed")
    scored = sorted(
        key for line in lines if line["kind"] == "evaluation" for key in line if key.endswith("headline")
    )
    last = [line["loss/ntp"] for line in lines if "loss/ntp" in line][-3:]
    expected, found = sum(last) / len(last), exported_loss(runs)
    return [
        ("tasks evaluated after the last step", len(scored), "4", len(scored) == 4),
        (
            "loss of the export, read by plain transformers",
            round(found, 3),
            f"within {EXPORT_LIMIT} of {expected:.3f}, that of the last NTP steps",
            abs(found - expected) <= EXPORT_LIMIT,
        ),
    ]


def exported_loss(runs: Runs) -> float:
    """Mean next-token loss of the export over the texts that it was trained on, by transformers alone."""
    from transformers import AutoModelForCausalLM

    from bico_ds.data.store import TokenStore

    device = "cuda" if runs.on_cuda else "cpu"
    export = runs.folder / "killed" / "export"
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, trust_remote_code=False
    )
    model.to(device)
    (manifest,) = (runs.folder / "data-killed").glob("*/manifest.json")
    store = TokenStore.open(manifest.parent)
    total, count = 0.0, 0
    for document in store.whole(np.arange(len(store))):
        tokens = torch.from_numpy(document.token_ids).to(device)[None]
        with torch.no_grad():
            # The mean over all tokens but the first.
            loss = model(input_ids=tokens, labels=tokens).loss
        total += float(loss) * (tokens.numel() - 1)
        count += tokens.numel() - 1
    return total / count


def write_reference() -> None:
    """Train on a CPU in both precisions, and keep the losses."""
    kept = {}
    for dtype in ("fp32", "bf16"):
        with TemporaryDirectory() as folder, Runs(folder=Path(folder), on_cuda=False, dtype=dtype) as runs:
            runs.finish("straight", runs.start("straight", *STRAIGHT))
            kept[dtype] = [round(loss, 6) for loss in runs.losses("straight")]
    write_atomically(REFERENCE, json.dumps(kept, indent=1) + "\n")


def make_empty_logs(folder: Path) -> None:
    """Runs add to their logs. Raises `UserError` where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("straight", "killed"):
            (folder / f"{name}.log").write_bytes(b"")
    except OSError as error:
        raise UserError(f"--out: cannot write to '{folder}': {error.strerror}") from None


def say(line: str) -> None:
    print(line, flush=True)


def run(options: Namespace) -> int:
    if options.write_reference:
        write_reference()
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("no CUDA device; --rehearse runs on a CPU")
    if options.out is not None:
        make_empty_logs(options.out)
    with TemporaryDirectory() as folder:
        dtype = "fp32" if options.rehearse else "bf16"
        with Runs(folder=Path(folder), logs=options.out, on_cuda=not options.rehearse, dtype=dtype) as runs:
            say(f"two runs at once; what they print: {runs.log('straight')}, {runs.log('killed')}")
            return run_all(runs).finish(as_json=options.json)


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
