"""Spans: what they name while a profile is made, and that they do nothing else."""

from __future__ import annotations

import ast
from contextlib import contextmanager

import pytest

from bico_ds.planner.report.step_parts import StepPart
from bico_ds.spans import in_span, recording, span
from tests import ROOT


@in_span("rotation")
def turned(x: int, *, by: int) -> int:
    with span("data"):
        return x + by


def test_spans_are_told_where_they_begin_and_end_and_only_while_recorded():
    seen = []

    @contextmanager
    def begin(name):
        seen.append(name)
        yield
        seen.append(f"/{name}")

    assert turned(1, by=2) == 3 and seen == []
    with recording(begin):
        assert turned(1, by=2) == 3
    assert seen == ["rotation", "data", "/data", "/rotation"]
    assert turned(1, by=2) == 3 and len(seen) == 4


def test_a_recording_that_fails_ends():
    with pytest.raises(ZeroDivisionError), recording(lambda name: pytest.fail(name)):
        raise ZeroDivisionError
    with span("data"):
        pass


def test_every_span_of_the_source_is_a_part_of_a_step():
    parts, found = {part.value for part in StepPart}, set()
    for path in sorted((ROOT / "bico_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("span", "in_span"):
                (name,) = node.args
                if isinstance(name, ast.Constant):
                    found.add(name.value)
    assert found <= parts and found
