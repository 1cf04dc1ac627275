"""tools/bench/gpu_step.py and gpu_baselines.py, rehearsed on a CPU: what runs on a rented GPU has run before."""

from __future__ import annotations

import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from bico_ds.config.load import load_recipe
from bico_ds.planner.devices import DEVICES
from bico_ds.planner.items import Item
from bico_ds.planner.memory import MemoryPlan, Moment
from bico_ds.planner.plan import make_plan
from bico_ds.planner.ranges import Range
from bico_ds.planner.workload import Texts
from bico_ds.proof.findings import Findings
from bico_ds.proof.parts import PARTS
from tests.proof.rehearsal import reads_rehearsal
from tools.bench import gpu_baselines, gpu_step
from tools.bench.baseline_batches import causal_rows
from tools.bench.step_memory import farthest, planned_phases
from tools.bench.step_shapes import Steps, check_random_loss, check_same

VOCABULARY = 227  # of the recipe that a rehearsal trains


@reads_rehearsal
def test_the_step_of_the_gpu_proof_is_rehearsed(rehearsal):
    found = rehearsal.findings("step")
    assert json.loads((rehearsal.folder / "step" / "step.json").read_text()) == found["steps"]
    by_name = {(step["kind"], step["length"], step["backend"]): step for step in found["steps"]}
    kinds = [(kind, length) for length in (16, 64) for kind in ("ntp", "bico")]
    for kind, length in kinds:
        auto, oracle = by_name[kind, length, "auto"], by_name[kind, length, "oracle"]
        assert auto["loss"] == pytest.approx(math.log(VOCABULARY), abs=0.2)  # random weights
        assert auto["loss"] == pytest.approx(oracle["loss"], abs=1e-5)
        assert auto["grad_norm"] == pytest.approx(oracle["grad_norm"], rel=1e-4)
        assert auto["ms"] > 0 and auto["tflops"] > 0 and auto["mfu"] is None
        assert auto["tokens_per_s"] == pytest.approx(128e3 / auto["ms"], rel=2e-3)  # ms are rounded
        groups = auto["groups"]
        assert sum(groups.values()) == pytest.approx(1, abs=0.01)
        assert {"products of the layers", "attention", "head and loss", "optimizer"} <= {*groups}
        # dead placeholders never enter the model
        assert by_name["ntp", length, "auto"]["rows"] == 128 > by_name["bico", length, "auto"]["rows"]
    compared = {row["name"]: row for row in found["rows"]}
    beside = compared["a BICO step beside an NTP step, documents of 64, auto"]
    both = [by_name[kind, 64, "auto"]["ms"] for kind in ("bico", "ntp")]
    assert [beside["ours"], beside["other"]] == pytest.approx(both, abs=0.01)
    assert "oracle beside auto, bico, documents of 16" in compared
    plain = [step for step in found["steps"] if step["plain"]]
    assert [(step["kind"], step["length"]) for step in plain] == [("ntp", 64), ("bico", 64)]
    before = compared["auto beside auto, plain, bico, documents of 64"]
    both = [by_name["bico", 64, name]["ms"] for name in ("auto", "auto, plain")]
    assert [before["ours"], before["other"]] == pytest.approx(both, abs=0.01)
    share = by_name["ntp", 64, "auto"]["head_share"]
    whole = share / (share + (1 - share) * 3 / 2)  # tiny_bico has 3 layers, its rehearsal 2
    depth = (
        f"the head is {share:.0%} of an NTP step's operations with 2 layers, {whole:.0%} with the recipe's 3"
    )
    assert any(depth in note for note in found["notes"])
    assert any(table["title"].startswith("The 20 costliest kernels: bico") for table in found["tables"])


@reads_rehearsal
def test_the_memory_of_the_rehearsed_step_stands_beside_its_plan(rehearsal):
    """A CPU has no allocator to ask: the states are the optimizer's tensors, and the phases are planned alone."""
    found = rehearsal.findings("step")
    tables = {table["title"].split(",")[0]: table for table in found["tables"]}
    at_rest = {row[0]: row for row in tables["Memory between steps"]["rows"]}
    for item in ("parameters", "fp32 masters", "moments"):
        assert at_rest[item][3] == pytest.approx(1, abs=0.01), at_rest[item]
    for step in (step for step in found["steps"] if not step["plain"]):
        assert {*step["memory"]} == {"rest", "forward", "backward", "update"}
        rest, forward = (step["memory"][phase]["planned"][0] for phase in ("rest", "forward"))
        assert 0 < rest < forward and step["memory"]["rest"]["measured"] is None
        peak = max(of["planned"][1] for of in step["memory"].values())
        parts = [row for row in tables["What the plan's peak is made of"]["rows"] if step["kind"] in row[0]]
        assert "master weights" in {row[2] for row in parts}
        assert any(
            sum(row[4] for row in parts if row[0] == what) == pytest.approx(peak, rel=0.05)
            for what in {row[0] for row in parts}
        )


def phase(ratio: float) -> dict[str, float]:
    return {"ratio": ratio}


def test_the_phase_that_is_farthest_from_its_plan_counts():
    assert farthest({"forward": phase(1.02), "update": phase(0.93)}) == pytest.approx(7)
    assert farthest({"forward": phase(1.5), "update": phase(0.93)}) == pytest.approx(50)


def test_all_moments_of_a_plan_have_a_phase_and_only_what_no_operation_makes_is_no_tensor():
    texts = Texts.of(np.random.default_rng().integers(10, 2000, 50), source="drawn")
    recipe = load_recipe("llama3_8b_bico", ["model.path=null"])
    memory = make_plan(recipe, DEVICES["h100-80g"], nodes=1, ranks_per_node=8, texts=texts).memory
    assert {*planned_phases(memory)} == {"forward", "backward", "update"}
    others = {item.name for moment in memory.moments for item in moment.items if not item.is_tensor}
    assert others == {"CUDA context", "NCCL", "allocator's margin", "kept for a second stream"}


def test_a_phase_is_planned_by_its_largest_moment_and_by_tensors_alone():
    context = Item(name="context", bytes=Range.exactly(500), is_tensor=False)
    moments = {"head": 7, "gradient of the head": 9, "backward of a layer": 8, "optimizer": 3}
    plan = MemoryPlan(
        resident=(context,),
        moments=tuple(
            Moment(
                name=name, objective="ntp", items=(context, Item(name="rows", bytes=Range(size, 2 * size)))
            )
            for name, size in moments.items()
        ),
        available=1e9,
    )
    assert planned_phases(plan) == {"forward": Range(7, 14), "backward": Range(9, 18), "update": Range(3, 6)}


@reads_rehearsal
def test_the_baselines_of_the_gpu_proof_are_rehearsed(rehearsal):
    found = rehearsal.findings("baselines")
    assert found["wrong"] == []
    (table,) = found["tables"]
    measured = [(kind, length, way.split(",")[0]) for kind, length, way, *_ in table["rows"]]
    for length in (16, 64):
        assert measured.count(("ntp", length, "Hugging Face")) == 2
        assert {("ntp", length, "ours"), ("bico", length, "ours")} <= {*measured}
        assert ("bico", length, "the authors' dense formulation") in measured
    assert len(found["rows"]) >= 6 and all(row["unit"] == "tokens/s" for row in found["rows"])


@pytest.mark.parametrize(("part", "tool"), [("step", gpu_step), ("baselines", gpu_baselines)])
def test_no_part_compiles_an_optimizer_within_its_limit(part, tool, tmp_path):
    options = tool.main.parse(PARTS[part].command(tmp_path, tmp_path, rehearse=False)[2:])
    recipe = load_recipe(options.recipe, options.overrides)
    assert recipe.deepspeed.overrides["optimizer"]["params"]["torch_adam"] is True
    assert options.out == tmp_path / part


@pytest.mark.parametrize("tool", [gpu_step, gpu_baselines], ids=["gpu_step", "gpu_baselines"])
def test_each_set_counts(tool):
    assert tool.main.parse(["--set", "a=1", "b=2", "--set", "c=3"]).overrides == ["a=1", "b=2", "c=3"]


def steps(loss: float = 5.0, norm: float = 2.0, seconds: float = 0.1) -> Steps:
    return Steps(seconds=[seconds] * 2, losses=[loss] * 2, grad_norms=[norm] * 2, peak_bytes=None)


def test_a_slower_baseline_shows_ours_as_faster():
    findings = Findings()
    comparison = gpu_baselines.Comparison(Namespace(rows=100, lengths=[50], trl=None), findings)
    comparison.ours["ntp", 50] = steps(seconds=0.1)  # 1000 tokens per second
    slow = gpu_baselines.Way(kind="ntp", name="slow", batch=causal_rows)
    comparison.add(slow, 50, tokens_per_s=250.0, peak_bytes=None)
    (row,) = findings.rows
    assert (row["ours"], row["other"], row["ratio"]) == (1000, 250, 4.0)
    assert comparison.table[-1][-1] == 4.0


def test_out_of_memory_is_a_baseline_s_result_and_our_failure():
    findings = Findings()
    comparison = gpu_baselines.Comparison(Namespace(rows=100, lengths=[50], trl=None), findings)
    way = gpu_baselines.Way(kind="bico", name="dense", batch=causal_rows)
    comparison.note_failure(way, 2048, torch.OutOfMemoryError("CUDA out of memory"))
    assert findings.wrong == [] and findings.notes == ["dense, bico, documents of 2048: out of memory"]
    ours = gpu_baselines.Way(kind="bico", name=gpu_baselines.OURS, batch=causal_rows)
    comparison.note_failure(ours, 2048, torch.OutOfMemoryError("CUDA out of memory"))
    comparison.note_failure(way, 2048, RuntimeError("shapes"))
    assert len(findings.wrong) == 2


@pytest.mark.parametrize(("loss", "norm"), [(5.003, 2.0), (5.0, 2.05), (math.nan, 2.0), (5.0, math.nan)])
def test_another_loss_or_norm_of_the_same_batch_is_wrong(loss, norm):
    findings = Findings()
    check_same(findings, "it", steps(loss, norm), steps(), "bf16")
    assert len(findings.wrong) == 1
    findings = Findings()
    check_same(findings, "it", steps(5.0005, 2.005), steps(), "bf16")
    assert findings.wrong == []


@pytest.mark.parametrize(("loss", "is_wrong"), [(12.58, False), (11.0, True), (14.0, True), (math.inf, True)])
def test_a_loss_that_random_weights_do_not_have_is_wrong(loss, is_wrong):
    llama3_8b = LlamaConfig(vocab_size=128256, hidden_size=4096, initializer_range=0.02)
    findings = Findings()
    check_random_loss(findings, "it", steps(loss), llama3_8b)
    assert bool(findings.wrong) == is_wrong


@pytest.mark.parametrize("tool", [gpu_step, gpu_baselines], ids=["gpu_step", "gpu_baselines"])
def test_a_document_longer_than_a_step_is_a_usage_error(tool, capsys):
    with pytest.raises(SystemExit) as ended:
        tool.main(["--rows", "64", "--lengths", "65"])
    assert ended.value.code == 2
    assert "a document of 65 tokens does not fit --rows 64" in capsys.readouterr().err
