"""Loader states of version 1, which name objectives by the `repr` of their classes, read as states of today's version.

The names of classes and fields, and the defaults, are those of release 0.1.0, whatever they are called now.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from bico_ds.config.objectives.masks import MaskSpec

_MASK_DEFAULTS = {"rate": 0.15, "unit": "token", "mean_span": 3.0, "eligible": "all"}


def translate_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state of version 1 as one of version 2."""
    before = state["identity"]
    objectives = {
        key: _objective(value)
        for key, value in before.items()
        if key.startswith("objectives[") and key.endswith("]")
    }
    # They expanded documents alike, and shared one cursor.
    cursor_of = [0] * len(objectives)
    return {**state, "version": 2, "identity": {**before, **objectives}, "cursor_of": cursor_of}


def _objective(written: str) -> dict[str, Any]:
    """The identity behind `NextTokenPrediction(…)` or `MaskDenoising(…)`."""
    name, values = _call(ast.parse(written, mode="eval").body)
    if name == "NextTokenPrediction":
        return {"kind": "ntp", "version": 1} | _changed(values, {"loss_on": "all"}, "loss_on")
    assert name == "MaskDenoising", written
    _, policy = values["policy"]
    _, mask = policy["spec"]
    mask = _changed({**mask, "rate": _rate(mask["rate"])}, _MASK_DEFAULTS, *mask)
    return {
        "kind": "bico",
        "version": 1,
        **({"mask": mask} if mask else {}),
        "placeholder_id": values["placeholder_id"],
        "special_ids": list(policy["special_ids"]),
    }


def _rate(written: float | tuple[float, float]) -> float | list[float]:
    """As `MaskSpec` has it today: a range of one rate is that rate, and the masks are the same."""
    rate = MaskSpec(rate=written).rate
    return list(rate) if isinstance(rate, tuple) else rate


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys if values[key] != defaults[key]}


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    """A call's name and keyword arguments: calls among these in the same way, the rest literals."""
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name), ast.dump(node)
    arguments = {}
    for keyword in node.keywords:
        assert keyword.arg is not None
        nested = isinstance(keyword.value, ast.Call)
        arguments[keyword.arg] = _call(keyword.value) if nested else _literal(keyword.value)
    return node.func.id, arguments


def _literal(node: ast.expr) -> Any:
    # The name `inf` is no literal.
    return float(node.id) if isinstance(node, ast.Name) else ast.literal_eval(node)
