"""The flash kernels of GPUs on a CPU: torch's own and the packages', called by their true signatures, with true results.

What computes is torch's CPU kernel (on meta tensors nothing does). A call that the real function would not take, or that
means something else than plain causal attention over packed documents, is an `AssertionError` or a `TypeError`.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bico_ds.attention import backends
from bico_ds.attention.kernels.aten_cuda import AtenCuda
from bico_ds.attention.kernels.cpu_flash import CpuFlash

RECORDS = Path(__file__).parent / "recorded_signatures"
# Arguments that we give a meaning; every other one must have its default,
OURS = {
    "q", "k", "v", "out", "dout", "dq", "dk", "dv", "softmax_lse", "lse", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
    "max_seqlen_k", "softmax_scale", "causal", "is_causal", "return_softmax", "return_lse", "deterministic", "num_splits",
}  # fmt: skip
# or this value, where it has none.
NEUTRAL = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


@contextmanager
def aten_on_cpu() -> Iterator[None]:
    """Inside, `aten::_flash_attention_forward` and `_backward` take CPU tensors."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _aten_forward, "CPU")
        library.impl("_flash_attention_backward", _aten_backward, "CPU")
        yield


def _aten_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **settings
):
    assert is_causal and not dropout_p and not return_debug_mask
    packing = _packing(cum_seq_q, cum_seq_k, max_q, max_k, settings)
    _check_rows(query, key, value)
    out, lse = CpuFlash().forward(query, key, value, **packing)
    state = torch.zeros(2, dtype=torch.uint64)
    return out.contiguous(), lse.contiguous(), state, torch.empty(0), torch.empty(0)


def _aten_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    **settings,
):
    assert is_causal and not dropout_p
    assert rng_state.dtype == torch.uint64 and rng_state.shape == (2,) and unused.numel() == 0
    packing = _packing(cum_seq_q, cum_seq_k, max_q, max_k, settings)
    _check_rows(grad_out, query, key, value, out)
    assert logsumexp.shape == (query.shape[1], len(query)) and logsumexp.is_contiguous()
    return CpuFlash().backward(grad_out, query, key, value, out, logsumexp, **packing)


def _packing(cum_seq_q, cum_seq_k, max_q, max_k, settings) -> dict[str, Any]:
    scale = settings.pop("scale")
    assert scale is not None and not any(value is not None for value in settings.values()), settings
    assert cum_seq_q.dtype == torch.int32 and torch.equal(cum_seq_q, cum_seq_k)
    assert max_q == max_k == int(cum_seq_q.diff().max())
    return {"cu_seqlens": cum_seq_q, "max_seqlen": max_q, "scale": scale}


def _check_rows(*rows: Tensor) -> None:
    """[N, heads, Dh] as the kernels take them."""
    assert all(x.ndim == 3 and x.is_contiguous() for x in rows)


@dataclass(frozen=True, kw_only=True)
class Package:
    """A release of a kernel package, by its recorded signatures."""

    distribution: str
    version: str
    module: str
    functions: dict[str, dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.distribution}-{self.version}"

    @staticmethod
    def read(path: Path) -> Package:
        record = json.loads(path.read_text(encoding="utf-8"))
        del record["source"]
        schemas = all(isinstance(function, str) for function in record["functions"].values())
        return (OperatorPackage if schemas else Package)(**record)

    @contextmanager
    def installed(self, folder: Path, changed: dict[str, Any] | None = None) -> Iterator[None]:
        """Inside, a package with these signatures is the one that is installed, in `folder`.

        `changed`: arguments that its functions get in the place of those in a call, or beside them.
        """
        info = folder / f"{self.distribution.replace('-', '_')}-{self.version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {self.distribution}\nVersion: {self.version}\n"
        )
        self._write_module(folder)
        real = {name: sys.modules.pop(name) for name in _loaded(folder, self.module)}
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        backends.resolve.cache_clear()
        try:
            with self._answering(changed or {}):
                yield
        finally:
            sys.path.remove(str(folder))
            for name in _loaded(folder, self.module):
                del sys.modules[name]
            sys.modules.update(real)
            backends.resolve.cache_clear()

    def _write_module(self, folder: Path) -> None:
        module = folder / self.module
        for package in itertools.takewhile(lambda parent: parent != folder, module.parents):
            package.mkdir(parents=True, exist_ok=True)
            (package / "__init__.py").touch()
        lines = ["from __future__ import annotations", "def answer(name, arguments): ..."]
        for name, function in self.functions.items():
            lines += [f"def {name}({function['parameters']}):", f"    return answer({name!r}, locals())"]
        module.write_text("\n".join(lines) + "\n")

    @contextmanager
    def _answering(self, changed: dict[str, Any]) -> Iterator[None]:
        loaded = importlib.import_module(self.module.removesuffix(".py").replace("/", "."))
        loaded.answer = lambda name, arguments: self._answer(getattr(loaded, name), arguments | changed)
        yield

    def _answer(self, function: Any, arguments: dict[str, Any]) -> Any:
        for parameter in inspect.signature(function).parameters.values():
            _check_argument(parameter, arguments[parameter.name])
        values = _COMPUTE[function.__name__](arguments)
        (outputs, *_) = self.functions[function.__name__]["outputs"]
        if outputs == 0:
            return values[0]
        return tuple(itertools.islice(itertools.chain(values, itertools.repeat(None)), outputs))


@dataclass(frozen=True, kw_only=True)
class OperatorPackage(Package):
    """A release whose functions are operators of torch, defined by their recorded schemas."""

    functions: dict[str, str]

    def _write_module(self, folder: Path) -> None:
        (folder / self.module).touch()

    @contextmanager
    def _answering(self, changed: dict[str, Any]) -> Iterator[None]:
        with torch.library._scoped_library(self.distribution.replace("-", "_"), "DEF") as library:
            for name, schema in self.functions.items():
                library.define(schema)
                answer = partial(self._answer_operator, torch._C.parse_schema(schema), changed)
                library.impl(name, answer, "CompositeExplicitAutograd")
            yield

    def _answer_operator(
        self, schema: Any, changed: dict[str, Any], *given: Any, **named: Any
    ) -> tuple[Tensor, ...]:
        """Types are checked by torch, and what is not given has its default."""
        assert self.module.removesuffix(".py") in sys.modules, (
            "the real operators are there once it is imported"
        )
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        arguments |= dict(zip(arguments, given, strict=False)) | named | changed
        for argument in schema.arguments:
            value = arguments[argument.name]
            is_neutral = argument.has_default_value() and value == argument.default_value
            assert argument.name in OURS or is_neutral, f"{argument.name} is {value!r}"
        values = _COMPUTE[schema.name](arguments)
        fill = itertools.repeat(torch.empty(0))
        return tuple(itertools.islice(itertools.chain(values, fill), len(schema.returns)))


def _loaded(folder: Path, module: str) -> list[str]:
    root = module.split("/")[0]
    return [name for name in sys.modules if name.split(".")[0] == root]


def _check_argument(parameter: inspect.Parameter, value: Any) -> None:
    """Of the type that the signature names; and where it is none of ours, neutral."""
    assert _is_a(parameter.annotation, value), f"{parameter} is {value!r}"
    if parameter.name not in OURS:
        has_default = parameter.default is not inspect.Parameter.empty
        neutral = parameter.default if has_default else NEUTRAL[parameter.name]
        assert value is neutral or value == neutral, f"{parameter} is {value!r}"


def _is_a(annotation: str, value: Any) -> bool:
    optional = re.fullmatch(r"Optional\[(.*)\]", annotation)
    if optional:
        return value is None or _is_a(optional[1], value)
    kinds = {"torch.Tensor": Tensor, "int": int, "float": float, "bool": bool}
    return type(value) is kinds[annotation]


def _fa2_forward(arguments: dict[str, Any]) -> list[Tensor]:
    assert arguments["causal"] and not arguments["return_softmax"]
    out, lse = _forward(arguments, arguments["max_seqlen_q"], arguments["max_seqlen_k"])
    return [out, lse, out.new_empty(0), out.new_empty(2)]


def _fa2_backward(arguments: dict[str, Any]) -> list[Tensor]:
    assert arguments["causal"]
    assert arguments["deterministic"] == torch.are_deterministic_algorithms_enabled()
    lse = arguments["softmax_lse"]
    grads = _backward(arguments, lse, arguments["max_seqlen_q"], arguments["max_seqlen_k"])
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        arguments[name].copy_(grad)
    return [torch.empty_like(lse)]


def _fa3_forward(arguments: dict[str, Any]) -> list[Tensor]:
    assert arguments["is_causal"] and arguments["num_splits"] == 1
    return list(_forward(arguments, arguments["max_seqlen_q"], arguments["max_seqlen_k"]))


def _fa3_backward(arguments: dict[str, Any]) -> list[Tensor]:
    return _fa2_backward(arguments | {"causal": arguments["is_causal"]})


def _fa4_forward(arguments: dict[str, Any]) -> list[Tensor]:
    assert arguments["causal"] and arguments["return_lse"]
    return list(_forward(arguments, arguments["max_seqlen_q"], arguments["max_seqlen_k"]))


def _fa4_backward(arguments: dict[str, Any]) -> list[Tensor]:
    assert arguments["causal"]
    assert arguments["deterministic"] == torch.are_deterministic_algorithms_enabled()
    return list(_backward(arguments, arguments["lse"], arguments["max_seqlen_q"], arguments["max_seqlen_k"]))


_COMPUTE = {
    "_flash_attn_varlen_forward": _fa2_forward,
    "_flash_attn_varlen_backward": _fa2_backward,
    "fwd": _fa3_forward,
    "bwd": _fa3_backward,
    "_flash_attn_fwd": _fa4_forward,
    "_flash_attn_bwd": _fa4_backward,
}


def _forward(arguments: dict[str, Any], longest_q: int, longest_k: int) -> tuple[Tensor, Tensor]:
    assert longest_q == longest_k and arguments["cu_seqlens_k"] is arguments["cu_seqlens_q"]
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    return AtenCuda().forward(q, k, v, **_settings(arguments, longest_q))


def _backward(
    arguments: dict[str, Any], lse: Tensor, longest_q: int, longest_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    assert longest_q == longest_k and arguments["cu_seqlens_k"] is arguments["cu_seqlens_q"]
    assert lse.is_contiguous() and arguments["dout"].is_contiguous()
    rows = [arguments[name] for name in ("dout", "q", "k", "v", "out")]
    return AtenCuda().backward(*rows, lse, **_settings(arguments, longest_q))


def _settings(arguments: dict[str, Any], longest: int) -> dict[str, Any]:
    return {
        "cu_seqlens": arguments["cu_seqlens_q"],
        "max_seqlen": longest,
        "scale": arguments["softmax_scale"],
    }


PACKAGES = [Package.read(path) for path in sorted(RECORDS.glob("flash-attn-*.json"))]
