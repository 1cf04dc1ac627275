"""The GPU proof, rehearsed on a CPU from end to end: what will run on a GPU has run before, every part of it.

What single tools measure in it is tested beside them, in tests/bench/.
"""

from __future__ import annotations

import pytest

from bico_ds.proof.parts import PARTS
from tests.proof.rehearsal import reads_rehearsal, rehearse


@reads_rehearsal
def test_every_part_is_right_in_a_rehearsal(rehearsal):
    done, report = rehearsal.done, rehearsal.report
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(part["part"], part["status"]) for part in report["parts"]] == [(name, "right") for name in PARTS]
    assert report["rehearsal"] and report["title"].startswith("REHEARSAL")
    assert {aim["verdict"] for aim in report["aims"]} == {"not measured"}


@reads_rehearsal
def test_every_tool_keeps_the_contract_and_a_ratio_says_how_many_times_better_ours_is(rehearsal):
    found = {name: rehearsal.findings(name) for name in PARTS}
    unmeasured = {name for name in PARTS if not found[name]["rows"]}
    assert unmeasured == {"check", "policy", "run", "nccl"}


@reads_rehearsal
def test_the_proof_writes_into_its_folder_alone(rehearsal):
    assert [path.name for path in rehearsal.folder.parent.iterdir()] == ["out"]


@reads_rehearsal
def test_a_second_call_runs_nothing(rehearsal):
    before = {path: path.stat().st_mtime_ns for path in rehearsal.folder.glob("*.log")}
    done = rehearse(rehearsal.folder.parent).done
    assert done.returncode == 0 and done.stdout.count("done before") == len(PARTS)
    assert {path: path.stat().st_mtime_ns for path in rehearsal.folder.glob("*.log")} == before


@reads_rehearsal
def test_the_reference_belongs_to_the_recipe_and_a_resumed_run_is_the_uninterrupted_one(rehearsal):
    """Where this fails after a change that is meant to change losses: python tools/bench/gpu_run.py --write-reference."""
    _, losses = rehearsal.findings("run")["tables"]
    rows = losses["rows"]
    assert len(rows) == 24
    for _, here, resumed, reference, _ in rows:
        assert here == resumed
        assert here == pytest.approx(reference, abs=2e-3)


@reads_rehearsal
def test_the_aims_find_their_figures_among_what_the_tools_write(rehearsal):
    names = [row["name"] for row in rehearsal.findings("speed")["rows"]]
    assert any(name.startswith("triton beside two passes") for name in names), names
    assert any("beside the authors' dense form" in name and "bidirectional" in name for name in names), names
    steps = rehearsal.findings("step")["steps"]
    assert {"kind", "length", "ms", "mfu", "backend"} <= set(steps[0])
    assert {step["kind"] for step in steps} == {"ntp", "bico"}


@reads_rehearsal
def test_the_collectives_of_training_are_all_timed(rehearsal):
    (table,) = rehearsal.findings("nccl")["tables"]
    assert [name for name, _ in table["rows"]] == ["all-reduce", "all-gather", "reduce-scatter", "barrier"]
