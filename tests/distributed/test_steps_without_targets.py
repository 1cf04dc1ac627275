"""Steps without any target, and data that have none: real runs on one rank, and on two under ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from bico_ds.config.load import load_recipe
from bico_ds.data.loading.loader import RankShare
from bico_ds.optim.schedule import build_scheduler
from bico_ds.training import assembly
from tests.distributed.launching import metrics, train
from tests.distributed.survival import RECIPE, SMALL, final_manifest, state

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS, STOP = 12, 6
# One short document per bin: now and then nothing of a step is masked.
SPARSE = (
    *SMALL, f"training.steps={STEPS}", "checkpoint.every_steps=1", f"checkpoint.keep_last={STEPS}",
    "data.max_documents_per_bin=1", "training.global_batch_bins=2", "training.micro_batch_bins=1",
    "optimizer.weight_decay=0.1", "monitor.csv=true",
)  # fmt: skip
RATE = "objectives=[{kind: bico, mask: {rate: 0.05}}]"
HARDLY = "{kind: bico, mask: {rate: 0.000001}}"


@pytest.fixture(scope="module")
def passed_over(tmp_path_factory) -> list[int]:
    """The steps, from 1, in which no rank has a target: counted from the batches themselves."""
    cache = tmp_path_factory.mktemp("cache")
    recipe = load_recipe(RECIPE, [*SPARSE, RATE, f"data.cache_dir={cache}", "data.workers=0"])
    inputs = assembly.open_inputs(recipe)
    loader = assembly.build_loader(recipe, inputs, RankShare())
    found = [n + 1 for n in range(STEPS) if not sum(len(batch.targets) for batch in loader.step(n).batches)]
    assert 2 <= len(found) <= STEPS - 4 and any(n <= STOP for n in found) and any(n > STOP for n in found)
    return found


@pytest.fixture(scope="module", params=[pytest.param("zero2_bf16", marks=pytest.mark.slow), "zero3_bf16"])
def run(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    done = train(RECIPE, folder, *SPARSE, RATE, f"deepspeed.config={request.param}")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed.txt").write_text(done.stdout + done.stderr)
    return folder


def test_a_step_without_targets_is_no_point_of_the_curve_and_is_told(run, passed_over):
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        has_numbers = {tag: tag in line for tag in ("loss/all", "loss/bico", "optimizer/grad_norm")}
        assert set(has_numbers.values()) == {line["step"] not in passed_over}, line
        assert line["optimizer/skipped_steps"] == (line["step"] in passed_over)
    assert len((run / "csv" / RECIPE / "loss_all.csv").read_text().splitlines()) == 1 + STEPS - len(
        passed_over
    )
    printed = (run / "printed.txt").read_text()
    assert f"step {passed_over[0]}: no target for objective 'bico', so no update was made" in printed
    assert "nan" not in printed and "lr_scheduler.step()" not in printed


def test_a_step_without_targets_leaves_weights_and_moments_as_they_were(run, passed_over):
    for step in range(2, STEPS + 1):
        before, after = (final_manifest(run, number) for number in (step - 1, step))
        assert (before["checksums"] == after["checksums"]) == (step in passed_over), step
    assert set(final_manifest(run, STEPS)["optimizer_steps"]) == {STEPS - len(passed_over)}


def test_the_schedule_counts_a_step_without_targets(run):
    recipe = load_recipe(RECIPE, [*SPARSE, RATE])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.optimizer.lr)
    schedule = build_scheduler(recipe.schedule, optimizer, STEPS)
    expected = []
    for _ in range(STEPS):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [line["optimizer/learning_rate"] for line in metrics(run)] == pytest.approx(expected, rel=1e-12)


def test_a_run_resumed_among_such_steps_ends_as_the_uninterrupted_one(run, passed_over, tmp_path):
    stop = passed_over[0]
    shutil.copytree(run, tmp_path / "run")
    for step in range(stop + 1, STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    config = run.parent.name.removesuffix("0")
    done = train(
        RECIPE, tmp_path / "run", *SPARSE, RATE, f"deepspeed.config={config}", "monitor.every_steps=5"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = final_manifest(tmp_path / "run", STEPS), final_manifest(run, STEPS)
    assert ours["checksums"] == theirs["checksums"] and ours["optimizer_steps"] == theirs["optimizer_steps"]
    assert ours["state"]["targetless"] == theirs["state"]["targetless"]
    assert ours["state"]["targetless"]["total"] == len(passed_over)


def test_a_run_without_a_single_target_does_not_end_as_done(tmp_path):
    run = tmp_path / "run"
    short = (
        *SPARSE,
        "training.steps=4",
        "schedule.warmup_steps=0",
        "schedule.decay_steps=1",
        "checkpoint.export=true",
    )
    for _ in range(2):  # and not at a second start, which has no step left to make
        done = train(RECIPE, run, *short, f"objectives=[{HARDLY}]", ranks=1)
        assert done.returncode == 1, done.stdout + done.stderr
        assert (
            "error: none of the 4 steps had a target: the weights are those that the run began with"
            in done.stderr
        )
        assert state(run)["state"] == "failed" and not (run / "export").exists()


@pytest.mark.slow
def test_an_objective_that_never_has_a_target_ends_the_run(tmp_path):
    run = tmp_path / "run"
    both = f"objectives=[{{kind: ntp, probability: 0.2}}, {HARDLY.replace('mask', 'probability: 0.8, mask')}]"
    done = train(RECIPE, run, *SPARSE, "training.steps=300", "checkpoint.every_steps=300", both, ranks=1)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the last 100 steps of objective 'bico' had no target" in done.stderr
    assert done.stdout.count("no target for objective 'bico', so no update was made") == 7  # 1, 2, 4, … 64
    assert state(run)["state"] == "failed" and state(run)["reason"].startswith("NoTargetsError")


PROMPTS = [{"prompt": "the " * 100, "completion": " end"}] * 12 + [
    {"prompt": "the", "completion": " end"}
] * 88


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_prompts_that_cutting_leaves_alone_are_refused_or_counted_before_a_step(tmp_path, ranks):
    """Told once, whatever the number of ranks."""
    for name, records in (("long", PROMPTS[:12]), ("mixed", PROMPTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    facts = assembly.facts_folder(load_recipe(RECIPE, [*SMALL, f"data.cache_dir={tmp_path}/facts"]).data)
    common = (
        *SMALL, "training.steps=2", "schedule.warmup_steps=0", "schedule.decay_steps=1", "data.capacity=64",
        "data.overlong=truncate", "objectives=[{kind: ntp, loss_on: completion}]", f"model.tokenizer={facts}/tokenizer",
    )  # fmt: skip
    form = "prompt_field: prompt, completion_field: completion"
    done = train(
        RECIPE, tmp_path / "refused", *common, f"data.sources=[{{files: [long.jsonl], {form}}}]", ranks=ranks
    )
    assert done.returncode != 0 and not (tmp_path / "refused" / "metrics.jsonl").exists()
    told = (
        "of {} documents have no target for objectives[0] (ntp), which predicts a token after the prompt: "
        "12 lose theirs by data.overlong=truncate at data.capacity=64; raise data.capacity, or set data.overlong=split"
    )
    assert (done.stdout + done.stderr).count(f"error: source 'long.jsonl': 12 {told.format(12)}") == 1, (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    done = train(
        RECIPE, tmp_path / "warned", *common, f"data.sources=[{{files: [mixed.jsonl], {form}}}]", ranks=ranks
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"warning: source 'mixed.jsonl': 12 {told.format(100)}") == 1
