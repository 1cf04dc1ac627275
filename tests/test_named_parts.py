"""Spans: what they name while a profile is made, and that they do nothing else."""

from __future__ import annotations

import ast
from contextlib import contextmanager

import pytest

from bico_ds.named_parts import as_step_part, recording, step_part
from bico_ds.planner.report.step_parts import StepPart
from tests import ROOT


@as_step_part("rotation")
def turned(x: int, *, by: int) -> int:
    with step_part("data"):
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
    with step_part("data"):
        pass


def test_every_span_of_the_source_is_a_part_of_a_step():
    parts, found = {part.value for part in StepPart}, set()
    for path in sorted((ROOT / "bico_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("step_part", "as_step_part"):
                (name,) = node.args
                if isinstance(name, ast.Constant):
                    found.add(name.value)
    assert found <= parts and found
