"""liger-kernel on a CPU: its functions by their true signatures, with true results, computed by formulas in torch.

A call that a recorded release would not take, or that asks for another norm than Llama's, fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import silu

RECORDS = sorted((Path(__file__).parent / "recorded_signatures").glob("liger-kernel-*.json"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def liger_on_cpu(release: dict[str, Any]) -> Iterator[None]:
    """Inside, modules of these signatures are those of liger-kernel."""
    modules = {}
    for name, functions in release["modules"].items():
        module = ModuleType(name)
        module.answer = _answer  # type: ignore[attr-defined]
        for function, recorded in functions.items():
            lines = f"def {function}({recorded['parameters']}):\n    return answer({function!r}, locals())"
            exec(lines, module.__dict__)
        modules[name] = module
    outputs = {
        name: of["outputs"] for functions in release["modules"].values() for name, of in functions.items()
    }
    with patch.dict(sys.modules, modules), patch.dict(_outputs, outputs):
        yield


_outputs: dict[str, int] = {}


def _answer(name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    assert arguments.pop("gate_multiplier", 1.0) == 1.0
    assert arguments.pop("needs_dw", None) is None
    if "casting_mode" in arguments:
        # 0: sums in fp32, the product with the weight in its own dtype.
        assert (arguments.pop("casting_mode"), arguments.pop("offset")) == (0, 0.0)
    rows = [x for x in arguments.values() if isinstance(x, Tensor) and x.ndim != 1]
    assert all(x.ndim == 2 and x.is_contiguous() and x.shape == rows[0].shape for x in rows)
    found = globals()[f"_{name}"](**arguments)
    assert len(found) == _outputs[name]
    return found


def _calculate_settings(n: int) -> tuple[int, int]:
    return 1 << (n - 1).bit_length(), 8


def _rms_norm_forward(X: Tensor, W: Tensor, eps: float, row_mode: None) -> tuple[Any, ...]:
    inverse = (X.pow(2).mean(-1) + eps).rsqrt()
    return W * (X * inverse[:, None]), X, inverse, *_calculate_settings(X.shape[1]), 0


def _fused_add_rms_norm_forward(X: Tensor, R: Tensor, W: Tensor, eps: float) -> tuple[Any, ...]:
    S = X + R
    Y, _, inverse, *settings, mode = _rms_norm_forward(S, W, eps, None)
    return Y, S, inverse, *settings, 2, mode


def _rms_norm_backward(
    dY: Tensor, X: Tensor, W: Tensor, RSTD: Tensor, row_mode: None, in_place: bool, **settings: int
) -> tuple[Tensor, Tensor]:
    assert not in_place and tuple(settings.values()) == _calculate_settings(X.shape[1])
    normed = X * RSTD[:, None]
    through = dY * W
    slope = (through * normed).mean(-1, keepdim=True)
    return RSTD[:, None] * (through - normed * slope), (dY * normed).sum(0)


def _fused_add_rms_norm_backward(
    dY: Tensor, dS_out: Tensor, S: Tensor, W: Tensor, RSTD: Tensor, num_stages: int, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    assert num_stages == 2
    dX, dW = _rms_norm_backward(dY, S, W, RSTD, None, **settings)
    dX += dS_out
    return dX, dX, dW


def _swiglu_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a, b, silu(a) * b


def _swiglu_backward(a: Tensor, b: Tensor, dc: Tensor) -> tuple[Tensor, Tensor]:
    """Over a and b, past autograd's eyes, as a Triton kernel writes."""
    s = torch.sigmoid(a)
    da, db = dc * b * s * (1 + a * (1 - s)), dc * a * s
    a.data.copy_(da)
    b.data.copy_(db)
    return a, b
