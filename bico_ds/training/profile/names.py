"""Which part of a step an event of a profile belongs to, by its name. No torch here.

Names are those of torch's profiler: of operations (`aten::mm`), of autograd's functions and their backward passes, of our
named parts (`bico_ds.named_parts`), and of what DeepSpeed says that it does. The events around an event decide, too: a named
part or a function of ours and a collective are what they are wherever they run, but a product of torch's is the head's
inside of the head, and else a linear layer's.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from bico_ds.planner.report.step_parts import StepPart

NAMED = "bico_ds: "
DEEPSPEED = "DeepSpeed: "
STEP = "bico_ds, step"
"""The event around a whole step."""

# By the beginning of a name; the first that fits counts.
_OURS = (
    ("_PackedAttention", StepPart.ATTENTION_PASSES),
    ("bico_ds::passes_rotated", StepPart.ROTATION),
    ("bico_ds::passes_summed", StepPart.ROTATION),
    ("bico_ds::passes_merged", StepPart.ATTENTION_MERGE),
    ("bico_ds::rms_norm_", StepPart.NORMS),
    ("_RMSNorm", StepPart.NORMS),
    ("_AddRMSNorm", StepPart.NORMS),
    ("_NormedAgain", StepPart.NORMS),
    ("_SwiGLU", StepPart.GATES_AND_OTHER_ELEMENTWISE),
    ("_ChunkedCrossEntropy", StepPart.HEAD_AND_LOSS),
    ("_FromHidden", StepPart.HEAD_AND_LOSS),
    ("_FromStored", StepPart.HEAD_AND_LOSS),
    ("c10d::", StepPart.COMMUNICATION),
    ("gloo:", StepPart.COMMUNICATION),
    ("nccl:", StepPart.COMMUNICATION),
    ("record_param_comms", StepPart.COMMUNICATION),
    # DeepSpeed's functions around modules, which fetch and release weights.
    ("PreBackwardFunctionForModule", StepPart.COMMUNICATION),
    ("PostBackwardFunctionModule", StepPart.COMMUNICATION),
)
# Of torch's own, where nothing of ours is around them; the first that is around an event counts.
_TORCH = (
    (
        "torch::autograd::AccumulateGrad",
        StepPart.OPTIMIZER,
    ),  # as the planner counts the adding up of gradients
    *(
        (product, StepPart.LINEAR_LAYERS)
        for product in (
            "aten::mm",
            "aten::addmm",
            "aten::bmm",
            "aten::baddbmm",
            "aten::matmul",
            "aten::linear",
        )
    ),
    ("LinearFunctionForZeroStage3", StepPart.LINEAR_LAYERS),  # of DeepSpeed, forward and backward
    *((f"{node}Backward", StepPart.LINEAR_LAYERS) for node in ("Mm", "Addmm", "Bmm", "T")),
    ("aten::", StepPart.GATES_AND_OTHER_ELEMENTWISE),
)
_PRECEDENCE = (StepPart.OPTIMIZER, StepPart.LINEAR_LAYERS, StepPart.GATES_AND_OTHER_ELEMENTWISE)
_EVALUATION = "autograd::engine::evaluate_function: "
# DeepSpeed's ranges around all of a forward or backward pass; in the others it works for ZeRO.
_WHOLE_PASSES = ("DeepSpeedEngine.forward", "DeepSpeedEngine.backward")


class Place(NamedTuple):
    """Where an event is: what the nearest of our names around it says, and else the first of torch's."""

    ours: StepPart | None = None
    torchs: StepPart | None = None

    @property
    def part(self) -> StepPart:
        return self.ours or self.torchs or StepPart.OTHER


@functools.lru_cache(maxsize=10_000)
def inside(place: Place, name: str) -> Place:
    """The place of what runs in an event of this name, which is itself at `place`."""
    name = name.removeprefix(_EVALUATION)
    if name.startswith(NAMED):
        return place._replace(ours=StepPart(name.removeprefix(NAMED)))
    if name.startswith(DEEPSPEED):
        return _inside_deepspeed(place, name.removeprefix(DEEPSPEED))
    if (ours := _first(_OURS, name)) is not None:
        return place._replace(ours=ours)
    torchs = _first(_TORCH, name)
    if torchs is None and "Backward" in name:
        torchs = StepPart.GATES_AND_OTHER_ELEMENTWISE
    known = [part for part in (place.torchs, torchs) if part is not None]
    return place._replace(torchs=min(known, key=_PRECEDENCE.index, default=None))


def _inside_deepspeed(place: Place, name: str) -> Place:
    """Its work for ZeRO moves weights and gradients, but for that of the update."""
    if name.startswith(_WHOLE_PASSES) or place.ours is StepPart.OPTIMIZER:
        return place
    return place._replace(ours=StepPart.COMMUNICATION)


def _first(parts: tuple[tuple[str, StepPart], ...], name: str) -> StepPart | None:
    return next((part for beginning, part in parts if name.startswith(beginning)), None)
