"""The parts of the proof, most valuable first: what each answers, and the tool in tools/bench/ that measures it.

Every tool keeps one contract: `--rehearse` does all of it on a CPU at a tiny size; with `--json` its last line is one
JSON object (`bico_ds.proof.findings.Findings`); exit code 1 where something is wrong or failed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# Both sides of a comparison by torch's fused AdamW: DeepSpeed's own needs nvcc, and has a part of its own.
TORCH_ADAM = "deepspeed.overrides={optimizer: {params: {torch_adam: true, fused: true}}}"
REHEARSAL_SECONDS = 180.0
"""The most that a part may take in a rehearsal: ten times what it needs, for machines that are busy."""
# Tools that leave out what they have no time for.
PATIENT = ("--seconds", f"{REHEARSAL_SECONDS - 10:.0f}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part. `seconds`: the most it may take on a GPU, where the proof's own minutes leave it so much.

    In `options`, {out} stands for the folder of the proof's results; `in_a_rehearsal` are further options there.
    """

    name: str
    question: str
    tool: str
    options: tuple[str, ...] = ()
    in_a_rehearsal: tuple[str, ...] = ()
    seconds: float

    def command(self, bench: Path, out: Path, *, rehearse: bool) -> list[str]:
        """The command line, with the tools of the folder `bench`."""
        options = [option.format(out=out) for option in self.options]
        rehearsal = ["--rehearse", *self.in_a_rehearsal] if rehearse else []
        return [sys.executable, str(bench / self.tool), *options, *rehearsal, "--json"]


PARTS = {
    part.name: part
    for part in (
        Part(
            name="check",
            question="Is every attention backend right, against the fp64 oracle?",
            tool="gpu_attention.py",
            options=("--part", "check"),
            in_a_rehearsal=PATIENT,
            seconds=70,
        ),
        Part(
            name="speed",
            question="How fast is attention: the kernel alone, two passes, fused, live rows?",
            tool="gpu_attention.py",
            options=("--part", "speed"),
            in_a_rehearsal=PATIENT,
            seconds=70,
        ),
        Part(
            name="policy",
            question="Which rows should which kernel serve on this GPU?",
            tool="gpu_policy.py",
            options=("--out", "{out}/policy.json"),
            in_a_rehearsal=PATIENT,
            seconds=70,
        ),
        Part(
            name="step",
            question="How fast is a whole training step, what is it made of, where does the host wait?",
            tool="gpu_step.py",
            options=("--out", "{out}/step", "--set", TORCH_ADAM.replace("{", "{{").replace("}", "}}")),
            seconds=120,
        ),
        Part(
            name="baselines",
            question="How fast are others, with the same model and documents?",
            tool="gpu_baselines.py",
            seconds=120,
        ),
        Part(
            name="run",
            question="Does a run train, resume after SIGKILL, evaluate and export, with the losses of a CPU?",
            tool="gpu_run.py",
            seconds=120,
        ),
        Part(
            name="fused_adam",
            question="Does DeepSpeed's FusedAdam compile here, and compute what torch's AdamW does?",
            tool="gpu_fused_adam.py",
            seconds=120,
        ),
        Part(
            name="nccl",
            question="Do the collectives of NCCL work, with one rank?",
            tool="gpu_nccl.py",
            seconds=45,
        ),
    )
}
