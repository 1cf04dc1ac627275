"""The main job at a small scale: base, BICO from its export, on ZeRO-3 with two ranks; and what is left in the folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from bico_ds.config.load import load_recipe
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.deployment import read_zero
from bico_ds.planner.storage import checkpoint_bytes
from bico_ds.training.callbacks.tensorboard.tags import tag_of, tagged
from tests.distributed.launching import ROOT, metrics, train

pytestmark = pytest.mark.distributed

FACTS = (
    "data.facts.name_first=3",
    "data.facts.description_first=3",
    "data.facts.both=6",
    "data.facts.test_prompts=1",
)
SMALL = (*FACTS, "model.config.vocab_size=51", "monitor.every_steps=1")
TASKS = ("n2d", "d2n", "n2d_reverse", "d2n_reverse")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    schedule = ("schedule.warmup_steps=5", "schedule.decay_steps=5")
    base = train("tiny_base", folder / "base", *SMALL, *schedule, "training.steps=25", by_deepspeed=True)
    assert base.returncode == 0, base.stdout + base.stderr
    bico = train(
        "tiny_bico", folder / "bico", *SMALL, *schedule, "training.steps=20", "evaluation.every_steps=10",
        f"model.path={folder / 'base' / 'export'}", "checkpoint.every_steps=10", "evaluation.likelihood_others=3",
    )  # fmt: skip
    assert bico.returncode == 0, bico.stdout + bico.stderr
    (folder / "bico.log").write_text(bico.stdout)
    return folder


def test_the_loss_falls_and_every_step_is_logged_once(runs):
    lines = metrics(runs / "base")
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert lines[-1]["loss/all"] < lines[0]["loss/all"] - 1


def test_both_objectives_are_trained_and_told_apart(runs):
    lines = metrics(runs / "bico")
    assert {key for line in lines for key in line if key.startswith("loss/")} == {
        "loss/all",
        "loss/ntp",
        "loss/bico",
    }
    bico_steps = [line for line in lines if "loss/bico" in line]
    assert all(
        line["speed/kept_tokens_per_second"] < line["speed/represented_tokens_per_second"]
        for line in bico_steps
    )


def test_the_console_begins_with_what_runs_and_the_ranks_logs_have_what_libraries_say(runs):
    console = (runs / "bico.log").read_text()
    banner = [line.split("  ")[0] for line in console.splitlines()]
    for label in ("model", "parameters", "ranks", "objectives", "data", "global batch", "memory", "time"):
        assert banner.count(label) == 1, label
    assert f"from {runs / 'base' / 'export'}" in console and "ZeRO 3" in console
    assert "built successfully" not in console
    for rank in (0, 1):
        log = (runs / "bico" / "logs" / f"rank-{rank}.log").read_text()
        assert "built successfully" in log and log.count("──── start ") == 1
    assert "done after step 20" in (runs / "bico" / "logs" / "rank-0.log").read_text()


def test_a_step_is_saved_before_it_is_evaluated(runs):
    lines = (runs / "bico" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = [(line["step"], line["kind"]) for line in map(json.loads, lines)]
    for step in (10, 20):
        assert kinds.index((step, "checkpoint")) < kinds.index((step, "evaluation"))


def test_one_rank_gives_the_losses_of_two(runs, tmp_path):
    one = train("tiny_base", tmp_path / "one", *SMALL, "training.steps=25", "schedule.warmup_steps=5",
                "schedule.decay_steps=5", "checkpoint.export=false", ranks=1)  # fmt: skip
    assert one.returncode == 0, one.stdout + one.stderr
    assert_same_numbers(tmp_path / "one", runs / "base", steps=25)


def test_zero_2_gives_the_losses_and_gradients_of_zero_3_in_both_objectives(runs):
    """The paper's own recipes run on ZeRO-2; here the loop itself does, as `launch/train.py` starts it."""
    options = (
        *SMALL, "schedule.warmup_steps=5", "schedule.decay_steps=5", "training.steps=20", "evaluation.tasks=[]",
        f"model.path={runs / 'base' / 'export'}", "checkpoint.export=false", "deepspeed.config=zero2_bf16",
    )  # fmt: skip
    done = train("tiny_bico", runs / "zero2", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_numbers(runs / "zero2", runs / "bico", steps=20)


@pytest.mark.parametrize("name", ["bico", "zero2"])
def test_a_checkpoint_is_as_large_as_planned(runs, name):
    """By ZeRO-3 without the weights in their own type, by ZeRO-2 with them."""
    (checkpoint, *_) = sorted((runs / name / "checkpoints").glob("step-*"))
    recipe = load_recipe(str(runs / name / "recipe.yaml"))
    architecture = read_architecture(recipe.model)
    zero = read_zero(recipe, hidden_size=architecture.hidden, ranks=2, ranks_per_node=2, on_cuda=False)
    on_disk = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert on_disk == pytest.approx(checkpoint_bytes(recipe, architecture, zero), rel=0.02)
    assert zero.stage == (2 if name == "zero2" else 3)


def assert_same_numbers(run: Path, other: Path, *, steps: int) -> None:
    """Losses, and gradient norms: Adam would hide a gradient of the wrong scale from the losses."""
    for tag, tolerance in (("loss/all", 2e-5), ("optimizer/grad_norm", 5e-5)):
        found, expected = ([line[tag] for line in metrics(folder)] for folder in (run, other))
        assert len(found) == steps
        assert found == pytest.approx(expected, rel=tolerance), tag


def test_the_export_loads_in_plain_transformers_and_scores_the_same(runs):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bico_ds.evaluation.run_tasks import GenerationOptions, evaluate
    from bico_ds.evaluation.scoring.choice import choice_test
    from bico_ds.evaluation.scoring.share import PromptShare
    from bico_ds.evaluation.tasks.task import load_tasks

    export = runs / "bico" / "export"
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    facts = next((runs / "runs" / "data").glob("facts-????????????????"))
    tokenizer, tasks = AutoTokenizer.from_pretrained(export), load_tasks(facts, TASKS, limit=None)
    share = PromptShare(batch_size=64)
    result = evaluate(model, tokenizer, tasks, GenerationOptions(max_new_tokens=8), share)
    last = metrics(runs / "bico", "evaluation")[-1]
    assert last["step"] == 20
    for name, task in result.tasks.items():
        assert task.score == last[f"evaluation/{name}/headline"], name
    for task in tasks:
        test = choice_test(model, tokenizer, task, others=3, share=share)
        for figure in ("difference", "rank", "forced_choice", "nll"):
            # An answer of which the model is sure costs next to nothing, rounded as logits of about ten are.
            expected = pytest.approx(test[figure], rel=1e-4, abs=1e-5)
            assert last[f"evaluation/{task.name}/{figure}"] == expected, task.name


def test_tensorboard_has_losses_speed_and_the_recipe(runs):
    events = EventAccumulator(str(runs / "bico" / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"2 loss/all", "2 loss/ntp", "2 loss/bico", "6 optimizer/grad_norm", "7 data/fill"} <= tags
    assert {f"1 reversal/{task}" for task in TASKS} <= tags
    assert "8 details/recipe" in events.Tags()["tensors"]


@pytest.mark.parametrize("name", ["base", "bico"])
def test_tensorboard_shows_every_number_of_metrics_once_and_charts_what_is_there(runs, name):
    points: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines()):
        step, kind = line.pop("step"), line.pop("kind")
        tags = {tag_of(key): key for key in line}
        assert len(tags) == len(line)
        shown = tagged(kind, line)
        for tag, value in shown.items():
            points.setdefault(tag, []).append((step, pytest.approx(value)))
        left_out = {key for tag, key in tags.items() if tag not in shown}
        again = {key for key in line if key.startswith(("work/", "share/"))}
        headlines = {f"evaluation/{task}/contains" for task in TASKS}
        assert left_out == (again | headlines if kind == "evaluation" else set())
    events = EventAccumulator(str(runs / name / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert found == points
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    for chart in (chart for category in layout.category for chart in category.chart):
        for pattern in chart.multiline.tag:
            assert any(re.match(pattern, tag) for tag in points), (chart.title, pattern)
        for series in chart.margin.series:
            assert {series.value, series.lower, series.upper} <= set(points), chart.title


def test_mfu_is_useful_operations_of_the_batches_over_seconds_and_the_peak(runs, monkeypatch):
    """Counted here from the global batches and the exported weights, by no code of the planner's."""
    from safetensors.torch import load_file

    from bico_ds.config.load import load_recipe
    from bico_ds.data.loading.loader import RankShare
    from bico_ds.training.assembly import build_loader, open_inputs

    weights = load_file(runs / "bico" / "export" / "model.safetensors")
    config = json.loads((runs / "bico" / "export" / "config.json").read_text())
    layers = sum(w.numel() for name, w in weights.items() if ".layers." in name and w.ndim == 2)
    heads = config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    peak = 2 * json.loads((runs / "bico" / "run.json").read_text())[0]["plan"]["peak_flops"]
    monkeypatch.chdir(runs)
    recipe = load_recipe(str(runs / "bico" / "recipe.yaml"), [])
    loader = build_loader(
        recipe, open_inputs(recipe), RankShare(micro_batch_bins=recipe.training.micro_batch_bins)
    )
    names = set()
    for line in metrics(runs / "bico"):
        step = loader.step(line["step"] - 1)
        flops = 0.0
        for batch in step.batches:
            kept = batch.plan.cu_seqlens.diff().double()
            live = batch.plan.live_document.bincount(minlength=len(kept)).double()
            pairs = kept * (kept + 1) / 2 if step.objective == "ntp" else kept * (kept + live)
            flops += 6 * layers * len(batch.input_ids) + 12 * heads * pairs.sum().item()
            flops += 6 * weights["lm_head.weight"].numel() * len(batch.targets)
        expected = flops / (line["speed/step_seconds"] * peak)
        assert line[f"speed/mfu/{step.objective}"] == line["speed/mfu"] == pytest.approx(expected, rel=1e-9)
        names.add(step.objective)
    loader.close()
    assert names == {"ntp", "bico"}


def test_a_run_shows_what_was_planned_beside_what_was_measured(runs):
    (line,) = metrics(runs / "bico", "plan")
    assert line["step"] == 20
    for what in ("step_seconds/ntp", "step_seconds/bico", "memory_bytes"):
        measured, low, high = (line[f"plan/{what}/{key}"] for key in ("measured", "low", "high"))
        assert measured > 0 and 0 < low <= high
        assert line[f"plan/{what}/ratio"] == pytest.approx(measured / ((low + high) / 2))
    console = (runs / "bico.log").read_text()
    assert console.count("measured beside planned: ntp step ") == 1
    tags = EventAccumulator(str(runs / "bico" / "tensorboard")).Reload().Tags()["scalars"]
    assert "8 details/plan/step_seconds/bico/measured" in tags and "4 speed/mfu/bico" in tags


def test_the_run_folder_tells_what_was_run(runs):
    folder = runs / "bico"
    assert json.loads((folder / "state.json").read_text())["state"] == "done"
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["training"]["steps"] == 20
    start = json.loads((folder / "run.json").read_text())[0]
    assert start["versions"]["deepspeed"] and "launch/train.py" in start["command"][0]
    assert not (folder / "lock.json").exists()


def test_a_run_that_is_done_says_so_and_trains_no_step(runs):
    before = (runs / "base" / "metrics.jsonl").read_text()
    again = train("tiny_base", runs / "base", *SMALL, "schedule.warmup_steps=5", "schedule.decay_steps=5",
                  "training.steps=25", ranks=1)  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert (runs / "base" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "tiny_bica"], "did you mean 'tiny_bico'"),
        (["--recipe", "tiny_bico"], "runs/tiny_base/export"),
        (
            ["--recipe", "tiny_base", "--set", "distributed.world_size=64"],
            "made for 64 ranks, started with 1",
        ),
        (["--recipe", "tiny_base", "--set", "training.global_batch_bins=3"], "must be a multiple"),
        (["--recipe", "tiny_base", "--set", "schedule.warmup_steps=9999"], "more than the 300 steps"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(tmp_path, arguments, expected):
    import subprocess

    from tests.distributed.launching import environment, launch_command

    done = subprocess.run(
        launch_command(*arguments, ranks=1),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_list_need_no_heavy_import(tmp_path):
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "launch" / "train.py"), "--list-recipes"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "tiny_bico" in done.stdout
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
