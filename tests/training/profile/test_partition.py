"""A step's seconds by part: against every microsecond looked at by itself on a CPU, and a small trace of a GPU by hand."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from bico_ds.planner.report.step_parts import StepPart
from bico_ds.training.profile.names import Place, inside
from bico_ds.training.profile.partition import seconds_by_part

STEP = "bico_ds, step 7"
TRAINING, AUTOGRAD = 11, 12  # threads


def event(
    name: str, start: float, end: float, *, cat: str = "cpu_op", tid: int = TRAINING, **args: Any
) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "pid": 1,
        "tid": tid,
        "ts": start,
        "dur": end - start,
        "args": args,
    }


def step(end: float, start: float = 0.0) -> dict[str, Any]:
    return event(STEP, start, end, cat="user_annotation")


def drawn_events(start: int, end: int, depth: int) -> list[dict[str, Any]]:
    """Events one after the other, at times that are whole microseconds, with others inside of them."""
    found: list[dict[str, Any]] = []
    while depth and start < end and random.random() < 0.8:
        begin = random.randrange(start, end)
        start = random.randint(begin + 1, end)
        name = random.choice(
            [*(f"bico_ds: {part.value}" for part in StepPart if part is not StepPart.OTHER), "python"]
        )
        found += [event(name, begin, start, cat="user_annotation"), *drawn_events(begin, start, depth - 1)]
    return found


def expected_on_cpu(events: list[dict[str, Any]], end: int) -> Counter:
    """Of each microsecond the name of the innermost event with one; without any, that of the next which has."""
    parts = []
    for at in range(end):
        around = [one for one in events if one["ts"] <= at and at + 1 <= one["ts"] + one["dur"]]
        named = [
            one["name"].removeprefix("bico_ds: ") for one in around if one["name"].startswith("bico_ds: ")
        ]
        parts.append(named[-1] if named else None)
    following = StepPart.OTHER.value
    for at in reversed(range(end)):
        following = parts[at] = parts[at] or following
    return Counter(parts)


@pytest.mark.parametrize("_", range(20))
def test_on_a_cpu_every_moment_belongs_to_the_innermost_name_or_the_next_one(_):
    events, end = drawn_events(0, 300, 4), 300
    random.shuffle(
        shuffled := [*events, step(end), event("elsewhere", 0, 200, tid=99), event("before", -50, -10)]
    )
    if len({one["ts"] for one in events}) < len(events):
        shuffled = [step(end), *events]  # of what begins together, the outer one is known by its order alone
    found = seconds_by_part(shuffled, on_cuda=False)
    assert sum(found.values()) == pytest.approx(end / 1e6)
    expected = expected_on_cpu(events, end)
    assert {part.value: round(seconds * 1e6) for part, seconds in found.items() if seconds > 1e-9} == expected


ON_GPU = [
    step(1000),
    event("bico_ds: data", 0, 100, cat="user_annotation"),
    event("cudaMemcpyAsync", 90, 95, cat="cuda_runtime", correlation=1),
    event("Memcpy HtoD (Pinned -> Device)", 100, 140, cat="gpu_memcpy", tid=7, stream=7, correlation=1),
    event("_ChunkedCrossEntropy", 150, 200),
    event("aten::mm", 155, 190),
    event("cudaLaunchKernel", 160, 170, cat="cuda_runtime", correlation=2),
    event("sm90_xmma_gemm", 300, 400, cat="kernel", tid=7, stream=7, correlation=2),
    event("c10d::_allgather_base_", 205, 230),
    event("cudaLaunchKernelExC", 210, 220, cat="cuda_runtime", correlation=3),
    event("ncclDevKernel_AllGather_RING_LL", 350, 600, cat="kernel", tid=20, stream=20, correlation=3),
    event("_PackedAttentionBackward", 610, 700, tid=AUTOGRAD),
    event("cuLaunchKernelEx", 620, 630, cat="cuda_driver", tid=AUTOGRAD, correlation=4),
    event("key_gradient_kernel", 650, 800, cat="kernel", tid=7, stream=7, correlation=4),
    event("bico_ds: optimizer", 900, 1000, cat="user_annotation"),
    event("cudaLaunchKernel", 950, 955, cat="cuda_runtime", correlation=5),
    event("multi_tensor_apply_kernel", 960, 990, cat="kernel", tid=7, stream=7, correlation=5),
    event("launched before the step", -20, 10, cat="kernel", tid=7, stream=7, correlation=6),
    event("bico_ds, step 7", 0, 1000, cat="gpu_user_annotation", tid=7),
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
]  # fmt: skip
EXPECTED_ON_GPU = {
    StepPart.OTHER: 10,  # until 10
    StepPart.DATA: 90 + 40,  # the host waits for data until 100, and they are copied until 140
    StepPart.HOST_WAITS: 160 + 50 + 100,  # until the first kernel, and around that of attention
    StepPart.HEAD_AND_LOSS: 100,
    StepPart.COMMUNICATION: 200,  # of 250, what the head's kernel does not hide
    StepPart.ATTENTION_PASSES: 150,
    StepPart.OPTIMIZER: 100,  # while the host makes the update
}


def test_on_a_gpu_every_moment_of_its_computing_stream_belongs_to_a_launch_or_to_what_it_waits_for():
    shuffled = random.sample(ON_GPU, len(ON_GPU))
    found = seconds_by_part(shuffled, on_cuda=True)
    assert {part: round(seconds * 1e6) for part, seconds in found.items()} == EXPECTED_ON_GPU


def test_a_recording_without_the_gpus_work_is_no_profile_of_it():
    with pytest.raises(ValueError, match="no work of the GPU"):
        seconds_by_part([step(100), event("aten::mm", 10, 20)], on_cuda=True)
    with pytest.raises(ValueError, match="no step"):
        seconds_by_part([event("aten::mm", 10, 20)], on_cuda=False)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ([STEP], StepPart.OTHER),
        ([STEP, "aten::mm"], StepPart.LINEAR_LAYERS),
        ([STEP, "aten::linear", "aten::addmm", "aten::expand"], StepPart.LINEAR_LAYERS),
        ([STEP, "autograd::engine::evaluate_function: MmBackward0", "MmBackward0"], StepPart.LINEAR_LAYERS),
        ([STEP, "LinearFunctionForZeroStage3", "aten::matmul"], StepPart.LINEAR_LAYERS),
        ([STEP, "_ChunkedCrossEntropy", "aten::mm"], StepPart.HEAD_AND_LOSS),
        ([STEP, "autograd::engine::evaluate_function: _PackedAttentionBackward"], StepPart.ATTENTION_PASSES),
        ([STEP, "_PackedAttentionBackward", "bico_ds: rotation", "aten::mul"], StepPart.ROTATION),
        ([STEP, "_PackedAttention", "bico_ds: attention fused", "bico_ds::tiles_forward"], StepPart.ATTENTION_FUSED),
        ([STEP, "_PackedAttention", "bico_ds: live rows", "bico_ds: attention merge"], StepPart.ATTENTION_MERGE),
        ([STEP, "_AddRMSNorm", "bico_ds::rms_norm_forward"], StepPart.NORMS),
        ([STEP, "autograd::engine::evaluate_function: SiluBackward0"], StepPart.GATES_AND_OTHER_ELEMENTWISE),
        ([STEP, "aten::add"], StepPart.GATES_AND_OTHER_ELEMENTWISE),
        ([STEP, "DeepSpeed: DeepSpeedEngine.forward", "aten::add"], StepPart.GATES_AND_OTHER_ELEMENTWISE),
        ([STEP, "DeepSpeed: PartitionedParameterCoordinator.fetch_sub_module"], StepPart.COMMUNICATION),
        ([STEP, "bico_ds: optimizer", "DeepSpeed: DeepSpeedZeroOptimizer_Stage3.step"], StepPart.OPTIMIZER),
        ([STEP, "bico_ds: optimizer", "aten::mm"], StepPart.OPTIMIZER),
        ([STEP, "bico_ds: optimizer", "c10d::allreduce_"], StepPart.COMMUNICATION),
        ([STEP, "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", "aten::add_"], StepPart.OPTIMIZER),
    ],
)  # fmt: skip
def test_the_names_around_an_event_tell_its_part(path, part):
    place = Place()
    for name in path:
        place = inside(place, name)
    assert place.part is part
