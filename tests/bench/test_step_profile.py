"""The groups of a step's kernels, by events as torch's profiler makes them of a GPU's; none is at hand here."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from tools.bench.step_profile import OPTIMIZER_PHASE, OTHER, UNKNOWN, count_waits, summarize


def operation(
    number: int, name: str, start: int, end: int, *kernels: tuple[str, int], thread: int = 1
) -> FunctionEvent:
    """An operation on the host, with the kernels that it launched and their microseconds."""
    event = FunctionEvent(
        id=number, name=name, thread=thread, start_us=start, end_us=end, use_device="cuda", device_type=DeviceType.CPU
    )  # fmt: skip
    for kernel, duration in kernels:
        event.append_kernel(kernel, 0, duration)
    return event


def on_device(number: int, name: str, duration: int, *, is_span: bool = False) -> FunctionEvent:
    return FunctionEvent(
        id=number, name=name, thread=0, start_us=0, end_us=duration, use_device="cuda",
        device_type=DeviceType.CUDA, is_user_annotation=is_span,
    )  # fmt: skip


def events(*given: FunctionEvent) -> EventList:
    made = EventList(given, use_device="cuda")
    made._build_tree()
    return made


def test_a_kernel_belongs_to_the_group_of_what_launched_it():
    profile = summarize(
        events(
            operation(1, "_ChunkedCrossEntropy", 0, 20),
            operation(2, "aten::mm", 1, 10, ("gemm", 5000)),
            operation(3, "_PackedAttention", 30, 40),
            operation(4, "aten::_flash_attention_forward", 31, 35, ("flash_fwd", 3000)),
            operation(5, "aten::copy_", 36, 38, ("elementwise_copy", 500)),
            operation(6, "aten::mm", 50, 60, ("gemm", 7000)),
            operation(7, "aten::copy_", 70, 80, ("Memcpy DtoD", 1000)),
            operation(8, "aten::mul", 90, 99, ("elementwise", 2000)),
            operation(9, OPTIMIZER_PHASE, 100, 200, (OPTIMIZER_PHASE, 90000)),
            operation(10, "aten::mul", 110, 120, ("elementwise", 4000)),
            on_device(11, "gemm", 5000),
            on_device(12, "gemm", 7000),
            on_device(13, "flash_fwd", 3000),
            on_device(14, "elementwise_copy", 500),
            on_device(15, "Memcpy DtoD", 1000),
            on_device(16, "elementwise", 2000),
            on_device(17, "elementwise", 4000),
            on_device(18, "launched by a library", 1500),
            on_device(19, OPTIMIZER_PHASE, 90000, is_span=True),
            operation(20, "cudaStreamSynchronize", 300, 900),
            operation(21, "cudaMemcpyAsync", 901, 905),
        ),
        on_cuda=True,
    )
    assert profile is not None
    assert profile.groups == {
        "head and loss": 5.0,
        "attention": 3.5,
        "products of the layers": 7.0,
        "copies and fills": 1.0,
        OTHER: 2.0,
        "optimizer": 4.0,
        UNKNOWN: 1.5,
    }
    assert profile.kernels[0] == ("gemm", 12.0, 2)
    assert profile.total_ms == 24.0  # the span of the optimizer's phase is no kernel
    assert profile.kernel_rows(1) == [["50.0%", 12.0, 2, "gemm"]]
    assert sum(profile.group_shares().values()) == pytest.approx(1, abs=0.001)
    assert profile.waits == [("cudaStreamSynchronize", 0.6, 1)]


def test_a_profile_without_kernels_is_none():
    assert summarize(events(operation(1, "aten::mm", 0, 10)), on_cuda=True) is None


def test_waits_are_torch_s_own_warnings_of_them_and_no_others():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at …)", stacklevel=1)
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=1,
        )
    (times,) = count_waits(found).values()
    assert times == 2


def test_a_profiled_step_on_a_cpu_ends_its_span():
    from tools.bench.step_profile import optimizer_phase, profile_step

    def step() -> None:
        x = torch.randn(64, 64)
        y = x @ x
        with optimizer_phase():
            y.mul_(2)

    profile = profile_step(step, on_cuda=False)
    assert profile is not None and {"products of the layers", "optimizer"} <= {*profile.groups}
