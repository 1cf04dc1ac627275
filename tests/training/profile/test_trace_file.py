"""Several recordings as one trace."""

from __future__ import annotations

import gzip
import json

import pytest

from bico_ds.training.profile.trace_file import TraceFile


def trace(base: int, *events: dict) -> dict:
    return {"schemaVersion": 1, "baseTimeNanoseconds": base, "traceEvents": list(events)}


def test_recordings_follow_each_other_on_one_clock(tmp_path):
    file = TraceFile(tmp_path / "trace.json.gz")
    file.add(trace(1_000_000, {"name": "a", "ts": 5.0, "dur": 1.0}, {"name": "process_name"}))
    file.add(trace(3_000_000, {"name": "b", "ts": 4.5, "dur": 1.0}))
    assert not (tmp_path / "trace.json.gz").exists()
    file.close()
    with gzip.open(tmp_path / "trace.json.gz") as opened:
        content = json.load(opened)
    assert content["schemaVersion"] == 1
    assert [event["name"] for event in content["traceEvents"]] == ["a", "process_name", "b"]
    assert content["traceEvents"][2]["ts"] == 2004.5
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]


def test_a_trace_of_nothing_is_no_file(tmp_path):
    file = TraceFile(tmp_path / "trace.json.gz")
    file.close()
    file.close()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    file = TraceFile(tmp_path / "trace.json.gz")
    file.add(trace(0, {"name": "a", "ts": 1.0}))
    (tmp_path / "trace.json.gz").mkdir()
    (tmp_path / "trace.json.gz" / "something").touch()
    with pytest.raises(OSError):
        file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]
