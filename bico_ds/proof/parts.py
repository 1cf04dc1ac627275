"""The parts of the proof, most valuable first: what each answers, and the tool in tools/bench/ that measures it.

Every tool keeps one contract: `--rehearse` does all of it on a CPU at a tiny size; with `--json` its last line is one
JSON object (`bico_ds.proof.findings.Findings`); exit code 1 where something is wrong or failed.

How two calls of six minutes share them, in seconds. Measured: on an H200 with torch's own flash kernel and liger-kernel,
without flash-attn and TRL (docs/benchmarks/gpu.md). A process that starts (torch, CUDA) takes 10 of each.

| part | expected | measured, and with which limits |
|---|---|---|
| check | 74 | 74 |
| speed | 50 | 35 of its `--seconds` 30: Triton kernels were cut, the dense form did not begin |
| step | 97 | 97 |
| baselines | 66 | 66; with TRL 50 more (an estimate) |
| nccl | 6 | 6 |
| elementwise | 22 | 22 |
| run | 110 | 110 |
| policy | 130 | 32 without its comparisons; 85 with those of head dimension 128 beside the Triton kernels alone |
| fused_adam | 80 | it failed after 10, before it compiled: an estimate; 10 without nvcc |

The first call has the parts up to elementwise, the second one the others: a part that needs more than is left waits for the
next call (`Part.needs`). flash-attn, flash-attn-3 and flash-attn-4 have not run: each that is installed is estimated to take
7 more of check, 16 of speed and 8 of policy, which leave out what they have no time for.
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

    `needs`: seconds without which it does not begin after another part of the same call, as it would be cut.

    In `options`, {out} stands for the folder of the proof's results; `in_a_rehearsal` are further options there.
    """

    name: str
    question: str
    tool: str
    options: tuple[str, ...] = ()
    in_a_rehearsal: tuple[str, ...] = ()
    seconds: float
    needs: float = 0.0

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
            needs=80,
        ),
        Part(
            name="speed",
            question="How fast is attention: the kernel alone, two passes, fused, live rows?",
            tool="gpu_attention.py",
            options=("--part", "speed", "--seconds", "45"),
            in_a_rehearsal=PATIENT,
            seconds=60,
            needs=30,
        ),
        Part(
            name="step",
            question="How fast is a whole training step, and a plain one, what is it made of, where does the host wait?",
            tool="gpu_step.py",
            options=("--out", "{out}/step", "--also", "triton", "--set", TORCH_ADAM),
            seconds=120,
            needs=100,
        ),
        Part(
            name="baselines",
            question="How fast are others, with the same model and documents?",
            tool="gpu_baselines.py",
            options=("--out", "{out}/baselines", "--set", TORCH_ADAM),
            seconds=110,
            needs=70,
        ),
        Part(
            name="nccl",
            question="Do the collectives of NCCL work, with one rank?",
            tool="gpu_nccl.py",
            seconds=45,
            needs=10,
        ),
        Part(
            name="elementwise",
            question="Are the kernels for norms and gates right, beside Hugging Face's modules, and how fast?",
            tool="gpu_elementwise.py",
            seconds=60,
            needs=25,
        ),
        Part(
            name="run",
            question="Does a run train, resume after SIGKILL, evaluate and export, with the losses of a CPU?",
            tool="gpu_run.py",
            options=("--out", "{out}/run"),
            seconds=140,
            needs=115,
        ),
        Part(
            name="policy",
            question="Which flash kernel is fastest on this GPU, and which rows should which kernel serve?",
            tool="gpu_policy.py",
            options=("--out", "{out}/policy.json", "--seconds", "125"),
            in_a_rehearsal=PATIENT,
            seconds=140,
            needs=60,
        ),
        Part(
            name="fused_adam",
            question="Does DeepSpeed's FusedAdam compile here, and compute what torch's AdamW does?",
            tool="gpu_fused_adam.py",
            seconds=120,
            needs=60,
        ),
    )
}
