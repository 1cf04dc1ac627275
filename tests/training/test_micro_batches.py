"""Files that name the micro-batches of a step which went wrong."""

from __future__ import annotations

import json

from bico_ds.training.micro_batches import write_micro_batches


def test_micro_batches_that_cannot_be_written_are_no_second_error(tmp_path):
    logs = tmp_path / "logs"
    assert write_micro_batches(logs / "step.json", [], []) == f"see {logs / 'step.json'}"
    assert json.loads((logs / "step.json").read_text()) == []
    full = tmp_path / "a file" / "step.json"
    full.parent.write_text("")
    assert write_micro_batches(full, [], []) == f"not written to {full}: File exists"
