"""What a report claims: aims by the parts' figures, on a GPU alone; a rehearsal cannot be taken for a proof."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest

from bico_ds.proof import report
from bico_ds.proof.aims import AIMS, RIGHT, judge_aims
from bico_ds.proof.findings import Findings, read_findings
from bico_ds.proof.parts import PARTS
from bico_ds.proof.processes import Ended
from bico_ds.proof.results import Result, judge
from tests import ROOT

MACHINE = {
    "rehearsal": False, "gpu": "NVIDIA H100 80GB HBM3", "memory_gb": 85.0, "compute_capability": "9.0", "driver": "570.1",
    "cuda": "13.0", "cpu": "x86_64, 16 cores", "compiler": None, "nvcc": None, "python": "3.12.1",
    "versions": {"torch": "2.13.0"}, "commit": "abc",
}  # fmt: skip
REHEARSAL = MACHINE | {"rehearsal": True, "gpu": None}


def step(kind, length, ms, mfu, backend="auto"):
    return {"kind": kind, "length": length, "ms": ms, "mfu": mfu, "backend": backend}


def row(name, ours, other, unit="ms"):
    findings = Findings()
    findings.add_row(name, ours, other, unit)
    return findings.rows[0]


def results(*, steps=(), rows=(), **statuses) -> dict[str, Result]:
    found = {
        "step": Result(part="step", status="right", findings=Findings(steps=list(steps))),
        "speed": Result(part="speed", status="right", findings=Findings(rows=list(rows))),
    }
    checked = Findings(
        tables=[{"title": "t", "columns": ["backend", "right"], "rows": [["aten-cuda", 1], ["triton", 1]]}]
    )
    return found | {
        name: Result(part=name, status=status, findings=checked) for name, status in statuses.items()
    }


def verdicts(found: dict[str, Result], *, rehearsal=False) -> list[str]:
    return [aim.verdict for aim in judge_aims(found, rehearsal=rehearsal)]


def meets_all(times: float = 1.0) -> dict[str, Result]:
    """Figures on the better side of every aim by the factor `times`; below 1, on the other side."""
    steps = [
        step("ntp", 40, 100, 0.3), step("bico", 40, 90 / times, 0.3),
        step("ntp", 2048, 100, 0.5 * times), step("bico", 2048, 105 / times, 0.48 * times),
    ]  # fmt: skip
    steps[0]["memory_off"], steps[3]["memory_off"] = 0.0, 10 / times
    rows = [
        row("triton beside two passes (aten-cuda), 40 tokens, bidirectional", 1, 9),
        row("triton beside two passes (aten-cuda), 512 tokens, bidirectional, 16% live", 1, 2 * times),
        row("triton beside two passes (aten-cuda), 4096 tokens, bidirectional", 1, 1.1),
        row("triton beside the authors' dense form, 2048 tokens, bidirectional", 2, 10 * times),
        row("triton beside a flash pass (aten-cuda), 40 tokens, causal", 1, 0.5),
    ]
    return results(steps=steps, rows=rows, check="right")


def test_each_aim_is_met_at_its_limit_and_missed_beyond():
    limit = random.uniform(1.0001, 1.5)
    assert verdicts(meets_all()) == ["met"] * (1 + len(AIMS))
    assert verdicts(meets_all(limit)) == ["met"] * (1 + len(AIMS))
    assert verdicts(meets_all(1 / limit)) == ["met"] + ["missed"] * len(AIMS)


def test_what_was_not_measured_is_neither_met_nor_missed():
    assert set(verdicts({})) == {"not measured"}
    only_ntp = results(steps=[step("ntp", 40, 10, None), step("ntp", 2048, 10, None)])
    assert set(verdicts(only_ntp)) == {"not measured"}
    assert verdicts(results(check="cut"))[0] == "not measured"
    assert verdicts(results(check="wrong"))[0] == "missed"


def test_a_check_names_the_backends_that_are_right_and_without_any_nothing_is_right():
    judge_check = lambda **found: judge_aims(found, rehearsal=False)[0]  # noqa: E731
    right = judge_check(check=results(check="right")["check"])
    assert (right.figure, right.verdict) == ("all that run here: aten-cuda, triton", "met")
    notes = Findings(notes=["check: triton: was not done within --seconds"])
    assert judge_check(check=Result(part="check", status="right", findings=notes)).verdict == "not measured"


def test_a_check_that_left_a_backend_out_is_no_check_of_every_backend(tmp_path):
    log = tmp_path / "log"
    log.write_text(Findings(left_out=["triton", "dense tiles"]).as_line())
    result = judge("check", Ended(code=0, seconds=50), log, date="today")
    assert (result.status, result.good) == ("cut", False)
    assert result.problem.startswith("no time was left for triton, dense tiles")


def test_of_steps_the_best_backend_of_each_kind_counts():
    steps = [
        step("ntp", 40, 100, 0.1, "auto"), step("bico", 40, 120, 0.1, "auto"),
        step("ntp", 40, 300, 0.1, "triton"), step("bico", 40, 85, 0.1, "triton"),
    ]  # fmt: skip
    (aim,) = [aim for aim in judge_aims(results(steps=steps), rehearsal=False) if "40 tokens" in aim.aim]
    assert (aim.figure, aim.verdict) == ("0.85", "met")
    steps[-1]["ms"] = 240  # 0.8 of an NTP step that nobody would take
    (aim,) = [aim for aim in judge_aims(results(steps=steps), rehearsal=False) if "40 tokens" in aim.aim]
    assert (aim.figure, aim.verdict) == ("1.2", "missed")


def test_a_plain_step_which_others_are_compared_with_meets_no_aim():
    steps = [step("ntp", 2048, 100, 0.6, "auto, plain"), step("bico", 2048, 100, 0.6, "auto, plain")]
    met = judge_aims(results(steps=[one | {"plain": True} for one in steps]), rehearsal=False)
    assert {aim.verdict for aim in met if "step" in aim.aim} == {"not measured"}
    met = judge_aims(results(steps=[one | {"plain": False} for one in steps]), rehearsal=False)
    assert [aim.verdict for aim in met if "MFU" in aim.aim] == ["met", "met"]


def test_up_to_a_length_is_not_measured_before_that_length_is():
    rows = [row("triton beside two passes on aten-cuda, 40 tokens, bidirectional", 1, 9)]
    assert verdicts(results(rows=rows))[-2] == "not measured"
    rows.append(row("triton beside two passes on aten-cuda, 512 tokens, bidirectional", 1, 3))
    assert verdicts(results(rows=rows))[-2] == "met"


def test_what_a_part_has_measured_that_is_wrong_meets_no_aim():
    found = meets_all()
    for name in ("step", "speed"):
        found[name] = replace(found[name], status="wrong")
    assert verdicts(found) == ["met"] + ["in doubt"] * len(AIMS)


def test_a_ratio_says_how_many_times_better_ours_is_of_times_and_of_rates():
    ours, times = random.uniform(1e-3, 1e3), random.uniform(1e-3, 1e3)
    for unit in ("ms", "s"):
        assert row("a", ours, ours * times, unit)["ratio"] == pytest.approx(times, rel=1e-5)
    for unit in ("tokens/s", "TFLOP/s"):
        assert row("a", ours * times, ours, unit)["ratio"] == pytest.approx(times, rel=1e-5)


def test_a_rate_is_better_when_it_is_higher():
    name = "triton beside the authors' dense form, 2048 tokens, bidirectional"
    assert verdicts(results(rows=[row(name, 600, 100, "TFLOP/s")]))[-1] == "met"
    assert verdicts(results(rows=[row(name, 100, 600, "TFLOP/s")]))[-1] == "missed"


def test_a_rehearsal_says_so_in_its_title_in_every_section_and_table_and_meets_no_aim():
    found = meets_all()
    found["policy"] = Result(
        part="policy",
        status="right",
        findings=Findings(tables=[{"title": "crossovers", "columns": ["a"], "rows": [[1]]}]),
    )
    aims = judge_aims(found, rehearsal=True)
    assert {aim.verdict for aim in aims} == {"not measured"} and {aim.figure for aim in aims} == {""}
    page = report.markdown(found, REHEARSAL, aims)
    lines = page.splitlines()
    assert all("REHEARSAL" in line for line in lines if line.startswith("#"))
    assert "crossovers (REHEARSAL on a CPU)" in lines
    assert "| compared (REHEARSAL on a CPU) | ours | other | unit | times as fast |" in lines
    assert "REHEARSAL: no GPU was measured" in page
    assert " met" not in page and "missed" not in page
    assert "REHEARSAL" not in report.markdown(found, MACHINE, judge_aims(found, rehearsal=False))


def test_a_proof_names_the_gpu_and_what_it_lacks_and_has_the_form_of_a_benchmark_page():
    found = meets_all()
    page = report.markdown(found, MACHINE, judge_aims(found, rehearsal=False))
    title, empty, first = page.splitlines()[:3]
    assert (title, empty, first) == ("# GPU proof on NVIDIA H100 80GB HBM3", "", "```bash")
    assert "| nvcc | none |" in page and "| C++ compiler | none |" in page
    for part in PARTS.values():
        assert f"## {part.name}\n\n{part.question}" in page


def test_names_of_kernels_and_places_of_this_machine_do_not_break_the_page():
    kernel = "void at::native::elementwise<4, std::array<char*, 2ul>>(int) | x"
    places = [
        "/opt/venv/lib/python3.12/site-packages/deepspeed/runtime/engine.py:10",
        "deepspeed/runtime/zero/stage3.py:1414",
        f"{ROOT}/bico_ds/training/trainer.py:7",
        "/tmp/tmpab12/run/checkpoints",
    ]
    findings = Findings(tables=[{"title": "t", "columns": ["kernel"], "rows": [[kernel]]}], notes=places)
    page = report.markdown({"step": Result(part="step", status="right", findings=findings)}, MACHINE, [])
    assert r"| void at::native::elementwise&lt;4, std::array&lt;char\*, 2ul&gt;&gt;(int) \| x |" in page
    assert "- …/deepspeed/runtime/engine.py:10\n- …/deepspeed/runtime/zero/stage3.py:1414\n" in page
    assert "- bico_ds/training/trainer.py:7\n- (a temporary folder)\n" in page


def test_the_folder_of_results_and_the_home_folder_are_not_on_the_page(tmp_path, monkeypatch):
    out = tmp_path / "my <out>"
    out.mkdir()
    monkeypatch.setenv("HOME", "/home/somebody")
    notes = [f"written to {out}/policy.json: use it", "as in /home/somebody/envs/a"]
    found = {"policy": Result(part="policy", status="right", findings=Findings(notes=notes))}
    report.write(list(found.values()), MACHINE, out)
    page = (out / "report.md").read_text()
    assert "- written to policy.json: use it\n- as in ~/envs/a\n" in page


def test_findings_are_read_from_the_last_line_that_holds_any():
    first, last = Findings(notes=["first"]).as_line(), Findings(rows=[row("a", 1, 2)]).as_line()
    assert read_findings(["text", first, last, "[W] destroy_process_group() was not called", ""]) == Findings(
        rows=[row("a", 1, 2)]
    )
    assert read_findings(["{not json", "3", '{"other": 1}', ""]) is None
    assert read_findings(['{"rows": [], "of_a_newer_tool": 1}']) == Findings()
    assert read_findings(['{"kind": "ntp", "rows": 8192}']) is None


@pytest.mark.parametrize(
    "found",
    [
        {"rows": [1]},
        {"rows": [{"name": "a", "ours": 1, "other": 2, "ratio": 2}]},
        {"rows": [row("a", 1, 2) | {"ours": None}]},
        {"rows": [], "steps": [{}]},
        {"rows": [], "steps": [{"kind": "ntp", "length": 40, "ms": "1", "mfu": None}]},
        {"rows": [], "tables": [{"title": "t", "columns": ["a"], "rows": [3]}]},
        {"rows": [], "wrong": "wrong"},
        {"rows": [], "notes": [1]},
        {"rows": [], "not_measured": None},
    ],
)
def test_what_is_not_of_the_form_of_findings_fails_its_part_alone(tmp_path, found):
    log = tmp_path / "log"
    log.write_text("[" * 100_000 + "\n" + json.dumps(found))
    result = judge("speed", Ended(code=0, seconds=1), log, date="today")
    assert (result.status, result.findings) == ("failed", Findings())
    assert result.problem.startswith("exit code 0, without findings: {")
    assert report.markdown({"speed": result}, MACHINE, judge_aims({"speed": result}, rehearsal=False))


def test_the_steps_that_a_cut_tool_had_measured_count(tmp_path):
    steps = [step("ntp", 40, 100, 0.3), step("bico", 40, 89, 0.3)]
    log = tmp_path / "log"
    log.write_text("\n".join(["built in 9 s", *map(json.dumps, steps), '{"kind": "ntp", "len']))
    result = judge("step", Ended(code=None, seconds=120), log, date="today")
    assert (result.status, result.findings.steps) == ("cut", steps)
    assert verdicts({"step": result})[1:3] == ["met", "not measured"]


def test_the_committed_page_is_a_gpu_s_and_names_every_part_and_aim():
    page = (ROOT / "docs" / "benchmarks" / "gpu.md").read_text(encoding="utf-8")
    assert page.startswith("# GPU proof on ")
    for part in PARTS.values():
        assert f"## {part.name}\n\n{part.question} `tools/bench/{part.tool}`\n" in page
    assert f"| {RIGHT} | all |" in page
    assert not [aim.text for aim in AIMS if f"| {aim.text} | {aim.limit} |" not in page]


def test_the_committed_rehearsal_is_one_of_all_parts_and_all_are_right():
    page = (ROOT / "docs" / "benchmarks" / "gpu_rehearsal.md").read_text(encoding="utf-8")
    assert page.startswith("# REHEARSAL of the GPU proof, on a CPU\n")
    for name in PARTS:
        (section,) = re.findall(rf"^## {name} \(REHEARSAL on a CPU\)\n(.*?)(?=^## |\Z)", page, re.M | re.S)
        assert "**right**" in section, name
