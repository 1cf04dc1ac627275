"""Triton's interpreter, in a process of its own, and what the tests run in it.

It has to be switched on before Triton is imported, which another test may have done already, and Triton compiles nothing
where it is on. It computes with numpy on the CPU; it has no bfloat16.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bico_ds.attention import layout
from bico_ds.attention.backend import Backend
from bico_ds.attention.kernels.cpu_flash import CpuFlash
from bico_ds.attention.layout import LayoutPolicy
from bico_ds.attention.packed import packed_attention, run_packed_attention
from bico_ds.attention.triton import self_check
from bico_ds.attention.triton.passes import TRITON_PASSES
from tests.attention.attention_problems import NoKeyMask, Problem

PACKAGE = "bico_ds.attention.triton"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is for Linux on x86-64)"
)


def interpreted(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function`, of a module, called in the process with the interpreter."""
    # Pickled here: multiprocessing itself would share the tensors' memory instead.
    call = pickle.dumps((function, arguments))
    return pickle.loads(_process().submit(_call, call).result())


@functools.cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_switch_on)


def _switch_on() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import language
    from triton.runtime import interpreter

    from bico_ds.attention.triton.primitives import rotate

    # At every call of a function the interpreter patches the language anew, which takes half of its time.
    for function in (rotate, language.cdiv):
        interpreter._patch_lang(function.fn)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    # Triton 3.6 takes int() of an array of one element, which numpy 2.4 refuses.
    language.tensor.__index__ = lambda scalar: scalar.handle.data.item()


def _call(call: bytes) -> bytes:
    function, arguments = pickle.loads(call)
    return pickle.dumps(function(*arguments))


def attend(problem: Problem) -> list[Tensor]:
    """out and the gradients of q, k, v by the backend `triton`."""
    return problem.packed(packed_attention, backend="triton")


def attend_scaled(problem: Problem, scale: float) -> list[Tensor]:
    """`attend` with a softmax scale that is given."""
    return problem.packed(packed_attention, backend="triton", scale=scale)


def attend_by(policy: LayoutPolicy, problem: Problem) -> list[Tensor]:
    """The same by a policy, with the CPU's flash kernel."""
    backend = Backend(kernel=CpuFlash(), policy=policy)
    scale = problem.q.shape[-1] ** -0.5
    return problem.packed(partial(run_packed_attention, scale=scale, backend=backend))


def attend_by_passes(policy: LayoutPolicy, problem: Problem, *, masks_keys: bool = False) -> list[Tensor]:
    """By a policy, with the CPU's flash kernel, and Triton's kernels around its two passes.

    `masks_keys`: the kernel hides keys by itself, and no head is widened.
    """
    backend = Backend(kernel=CpuFlash() if masks_keys else NoKeyMask(), policy=policy, passes=TRITON_PASSES)
    scale = problem.q.shape[-1] ** -0.5
    return problem.packed(partial(run_packed_attention, scale=scale, backend=backend))


def attend_by_wrong_passes(old: str, new: str, policy: LayoutPolicy, problem: Problem) -> list[Tensor]:
    """The same with one place of the source of the kernels around the passes changed."""
    with _mutated("pass_kernels", old, new):
        return attend_by_passes(policy, problem)


def objections(module: str | None = None, old: str = "", new: str = "") -> list[str | None]:
    """What the self-check says of the attention kernels, and of those around the passes; perhaps with a changed source."""
    with nullcontext() if module is None else _mutated(module, old, new):
        inputs = torch.float16, 16, torch.device("cpu")
        return [self_check.blocks_objection(*inputs), self_check.passes_objection(NoKeyMask(), *inputs)]


def attend_by_mutant(module: str, old: str, new: str, problem: Problem) -> list[Tensor]:
    """`attend` with one place of the kernels' source changed."""
    with _mutated(module, old, new):
        return attend(problem)


@contextmanager
def _mutated(module: str, old: str, new: str) -> Iterator[None]:
    """All kernels loaded anew from a copy of their source in which `old`, which is there once, became `new`."""
    from bico_ds.attention.triton import launches

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        loaded = {}
        for name in ("primitives", "forward", "backward", "row_blocks", "pass_kernels"):
            origin = importlib.import_module(f"{PACKAGE}.{name}").__file__
            source = Path(origin or "").read_text(encoding="utf-8")
            if name == module:
                assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {name}"
                source = source.replace(old, new)
            (Path(folder) / f"{name}.py").write_text(source, encoding="utf-8")
            loaded[name] = _load(f"{PACKAGE}.{name}", Path(folder) / f"{name}.py", patch)
        patch.setattr(launches, "rotate_kernel", loaded["primitives"].rotate_kernel)
        patch.setattr(launches, "forward_kernel", loaded["forward"].forward_kernel)
        patch.setattr(launches, "query_gradient_kernel", loaded["backward"].query_gradient_kernel)
        patch.setattr(launches, "key_gradient_kernel", loaded["backward"].key_gradient_kernel)
        patch.setattr(layout, "RowBlocks", loaded["row_blocks"].RowBlocks)
        yield


def _load(name: str, path: Path, patch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def attend_from_one_projection(problem: Problem) -> list[Tensor]:
    """`attend`, with q, k and v as slices of one tensor, and a gradient that is an expanded one."""
    rows = problem.token_of_row
    (H, D), N = problem.q.shape[1:], problem.k.shape[1]
    whole = torch.cat([problem.q, problem.k, problem.v], 1)[rows].requires_grad_()
    q, k, v = whole.split([H, N, N], dim=1)
    assert q.stride(0) == (H + 2 * N) * D
    out = packed_attention(q, k, v, problem.cos[rows], problem.sin[rows], problem.plan, backend="triton")
    (grad,) = torch.autograd.grad(out, whole, problem.grad_out[rows][:, :1, :1].expand_as(out))
    return [out.detach(), *grad.split([H, N, N], dim=1)]


def attend_far_apart(problem: Problem, row_stride: int) -> list[Tensor]:
    """`attend`, with the rows of q, k and v `row_stride` elements apart, in memory that is reserved alone."""
    rows = problem.token_of_row

    def spread(x: Tensor) -> Tensor:
        T, heads, D = len(rows), x.shape[1], x.shape[2]
        far = torch.empty((T - 1) * row_stride + heads * D, dtype=x.dtype)
        return far.as_strided((T, heads, D), (row_stride, D, 1)).copy_(x[rows]).requires_grad_()

    inputs = [spread(x) for x in (problem.q, problem.k, problem.v)]
    out = packed_attention(*inputs, problem.cos[rows], problem.sin[rows], problem.plan, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, inputs, problem.grad_out[rows])]
