"""The parts of the proof, most valuable first: what each answers, and the tool in tools/bench/ that measures it.

Every tool keeps one contract: `--rehearse` does all of it on a CPU at a tiny size; with `--json` its last line is one
JSON object (`bico_ds.proof.findings.Findings`); exit code 1 where something is wrong or failed.

How the first six minutes are shared, in seconds on an H100. No GPU has run them: these are estimates, but for the time that
a kernel compiles. A process that starts (torch, CUDA) takes 10.

| part | expected | of which |
|---|---|---|
| check | 75 | 50 Triton kernels, each 1 to 2 to compile, shapes side by side; cached for the parts after it |
| speed | 35 | 3 backends, each in a process forked in 4; 42 cases of 0.3 |
| policy | 36 | its `--seconds`: 8 per flash kernel; beside either alternative 56 cases of 0.3, and a check |
| step | 109 | to build the model 20; 2 backends, each 4 kinds: 11 steps of 0.3, and 6 to read the profile; 14 plain steps |
| baselines | 55 | to build the model 20; 10 ways of 7 steps, of 0.3 to 0.5; with TRL 50 more |
| run | 40 | 2 starts one after the other, evaluation, export |
| nccl | 10 | |

That is 360 with torch's own flash kernel alone. Each of flash-attn, flash-attn-3 and flash-attn-4 that is installed would
take 7 more of check, 16 of speed and 8 of policy, which leave out what they have no time for. The next call has elementwise
(20 with liger-kernel) and fused_adam (10 without nvcc; with it, a minute to compile). Even where check, speed and policy
take all that they may, a step still gets all of its own: 90 + 45 + 45 + 120 = 300.
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
        options = [option.replace("{out}", str(out)) for option in self.options]
        rehearsal = ["--rehearse", *self.in_a_rehearsal] if rehearse else []
        return [sys.executable, str(bench / self.tool), *options, *rehearsal, "--json"]


PARTS = {
    part.name: part
    for part in (
        Part(
            name="check",
            question="Is every attention backend right, against the fp64 oracle?",
            tool="gpu_attention.py",
            options=("--part", "check", "--seconds", "75"),
            in_a_rehearsal=PATIENT,
            seconds=90,
        ),
        Part(
            name="speed",
            question="How fast is attention: the kernel alone, two passes, fused, live rows?",
            tool="gpu_attention.py",
            options=("--part", "speed", "--seconds", "30"),
            in_a_rehearsal=PATIENT,
            seconds=45,
        ),
        Part(
            name="policy",
            question="Which flash kernel is fastest on this GPU, and which rows should which kernel serve?",
            tool="gpu_policy.py",
            options=("--out", "{out}/policy.json", "--seconds", "26"),
            in_a_rehearsal=PATIENT,
            seconds=45,
        ),
        Part(
            name="step",
            question="How fast is a whole training step, and a plain one, what is it made of, where does the host wait?",
            tool="gpu_step.py",
            options=("--out", "{out}/step", "--also", "triton", "--set", TORCH_ADAM),
            seconds=120,
        ),
        Part(
            name="baselines",
            question="How fast are others, with the same model and documents?",
            tool="gpu_baselines.py",
            options=("--out", "{out}/baselines", "--set", TORCH_ADAM),
            seconds=110,
        ),
        Part(
            name="run",
            question="Does a run train, resume after SIGKILL, evaluate and export, with the losses of a CPU?",
            tool="gpu_run.py",
            seconds=120,
        ),
        Part(
            name="nccl",
            question="Do the collectives of NCCL work, with one rank?",
            tool="gpu_nccl.py",
            seconds=45,
        ),
        Part(
            name="elementwise",
            question="Are the kernels for norms and gates right, beside Hugging Face's modules, and how fast?",
            tool="gpu_elementwise.py",
            seconds=60,
        ),
        Part(
            name="fused_adam",
            question="Does DeepSpeed's FusedAdam compile here, and compute what torch's AdamW does?",
            tool="gpu_fused_adam.py",
            seconds=120,
        ),
    )
}
