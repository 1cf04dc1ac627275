"""Numbers on their way to console, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bico_ds.config.load import load_recipe
from bico_ds.planner.devices import cpu_device
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.workload import Texts
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.base import Callback, Callbacks, FirstRankCallback, RunStart, StepReport
from bico_ds.training.callbacks.console import ConsoleProgress
from bico_ds.training.callbacks.monitor import StepMonitor, keep_lines_until
from bico_ds.training.callbacks.stopwatch import Stopwatch
from bico_ds.training.callbacks.tensorboard import board
from bico_ds.training.callbacks.tensorboard.charts import charts
from bico_ds.training.callbacks.utilization import Utilization
from tests.full_disk import files_limited_to


def report(step: int, **values) -> StepReport:
    numbers = {
        "step": step,
        "objective": "ntp",
        "loss": 1.0,
        "targets": 10,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "kept_tokens": 90,
        "represented_tokens": 100,
        "fill": 0.9,
        "seconds": 0.5,
        "wait_seconds": 0.1,
        "pairs": 800,
    }
    return StepReport(**(numbers | values))


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    return run


def tiny_plan(flops: float = 1e9, **rates: float) -> Plan:
    """Of tiny_bico on two ranks of one host's CPUs, which multiply at `flops`."""
    device = replace(cpu_device(memory_bytes=1 << 34, flops=flops, ranks=2), **rates)
    texts = Texts.of(np.random.default_rng().integers(10, 100, 50), source="drawn")
    recipe = load_recipe("tiny_bico", ["model.path=null"])
    return make_plan(recipe, device, nodes=1, ranks_per_node=2, texts=texts)


def monitored(
    folder: RunFolder,
    reports: list[StepReport],
    first_step: int = 0,
    every: int = 2,
    utilization: Utilization | None = None,
    saved: dict | None = None,
) -> list[dict]:
    recipe = load_recipe("tiny_bico", [f"monitor.every_steps={every}"])
    monitor = StepMonitor(recipe.monitor, folder, None, utilization)
    last = reports[-1].step
    start = RunStart(recipe=recipe, first_step=first_step, total_steps=last, summary={}, saved=saved or {})
    monitor.on_start(start)
    for one in reports:
        monitor.on_step(one)
    assert monitor.state() == {"unwritten_steps": []}, (
        "a run that is done, and started again, would write them twice"
    )
    monitor.on_end(last, "done")
    return [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]


def test_a_logged_loss_is_weighted_by_targets_not_a_mean_of_means(folder):
    lines = monitored(folder, [report(1, loss=1.0, targets=30), report(2, loss=5.0, targets=10)])
    assert lines[0]["loss/all"] == pytest.approx(2.0)


def test_a_step_counts_by_its_weights_among_those_of_its_objective_and_by_its_targets_among_all(folder):
    reports = [
        report(1, loss=1.0, targets=30, weight=1.0, source_losses={"a": [1.0, 1.0]}),
        report(2, loss=5.0, targets=10, weight=3.0, source_losses={"a": [5.0, 3.0]}),
    ]
    lines = monitored(folder, reports)
    assert (lines[0]["loss/ntp"], lines[0]["loss/ntp/a"], lines[0]["loss/all"]) == pytest.approx(
        (4.0, 4.0, 2.0)
    )


def test_each_objective_has_a_loss_of_its_own(folder):
    lines = monitored(folder, [report(1, loss=1.0), report(2, loss=3.0, objective="bico")])
    assert (lines[0]["loss/ntp"], lines[0]["loss/bico"], lines[0]["loss/all"]) == (1.0, 3.0, 2.0)


def test_speed_is_tokens_over_wall_time_not_a_mean_of_rates(folder):
    lines = monitored(folder, [report(1, seconds=0.1), report(2, seconds=0.9)])
    assert lines[0]["speed/represented_tokens_per_second"] == pytest.approx(200.0)
    assert lines[0]["speed/data_wait_share"] == pytest.approx(0.2)


def test_a_skipped_step_leaves_the_numbers_of_its_neighbours(folder):
    nan = float("nan")
    lines = monitored(folder, [report(1, loss=2.0), report(2, loss=nan, grad_norm=nan, applied=False)])
    assert (lines[0]["loss/all"], lines[0]["optimizer/grad_norm"], lines[0]["optimizer/skipped_steps"]) == (
        2.0,
        1.0,
        1,
    )


def test_metrics_stay_json_where_every_step_was_skipped(folder):
    nan = float("nan")
    lines = monitored(folder, [report(n, loss=nan, grad_norm=nan, applied=False) for n in (1, 2)])
    assert "loss/all" not in lines[0] and lines[0]["optimizer/skipped_steps"] == 2


def test_a_step_without_a_target_is_no_point_of_the_curve(folder):
    nan = float("nan")
    empty = report(2, targets=0, loss=nan, grad_norm=nan, applied=False, kept_tokens=0, represented_tokens=0)
    lines = monitored(folder, [report(1, loss=2.0, grad_norm=3.0), empty])
    assert (lines[0]["loss/all"], lines[0]["optimizer/grad_norm"]) == (2.0, 3.0)
    lines = monitored(folder, [empty], every=1)
    assert not {"loss/all", "loss/ntp", "optimizer/grad_norm"} & set(lines[-1])


def test_an_earlier_programs_update_without_a_target_is_no_point_either(folder):
    """Its loss was 0: such steps may wait in a checkpoint, unwritten."""
    lines = monitored(
        folder, [report(1, loss=2.0, grad_norm=3.0), report(2, targets=0, loss=0.0, grad_norm=0.0)]
    )
    assert (lines[0]["loss/all"], lines[0]["optimizer/grad_norm"]) == (2.0, 3.0)
    lines = monitored(folder, [report(1, targets=0, loss=0.0, grad_norm=0.0)], every=1)
    assert not {"loss/all", "loss/ntp", "optimizer/grad_norm"} & set(lines[-1])


def test_the_steps_after_the_last_full_interval_are_written_too(folder):
    lines = monitored(folder, [report(1), report(2), report(3, loss=7.0)])
    assert [line["step"] for line in lines] == [2, 3]
    assert lines[1]["loss/all"] == 7.0


def test_a_resumed_run_writes_no_step_twice(folder):
    monitored(folder, [report(step, loss=9.0) for step in range(1, 7)], every=1)
    lines = monitored(folder, [report(step, loss=1.0) for step in range(4, 7)], first_step=3, every=1)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss/all"] for line in lines] == [9.0] * 3 + [1.0] * 3


def test_tensorboard_shows_no_step_twice_where_a_run_died_before_its_first_checkpoint(folder):
    monitored(folder, [report(step, loss=9.0) for step in range(1, 5)], every=1)
    monitored(folder, [report(step, loss=1.0) for step in range(1, 3)], every=1)
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("2 loss/all")] == [(1, 1.0), (2, 1.0)]


def test_what_each_source_has_given_so_far_is_in_tensorboard_and_metrics(folder):
    counts = [
        {"books": {"rows": 3 * n, "tokens": 40 * n}, "web": {"rows": n, "tokens": 9 * n}} for n in (1, 2)
    ]
    lines = monitored(folder, [report(n, sources=sources) for n, sources in enumerate(counts, start=1)])
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    for tag, value in {"books/rows": 6, "books/tokens": 80, "web/rows": 2, "web/tokens": 18}.items():
        assert lines[0][f"data/{tag}"] == value
        assert [(e.step, e.value) for e in events.Scalars(f"7 data/{tag}")] == [(2, value)]


def useful(plan: Plan, rows: int, targets: int, pairs: int) -> float:
    """By a dense layer's and a head's matrices, one by one: 6 operations per element, 12 per pair and head dimension."""
    config = plan.recipe.model.config
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    query, key = heads * head_dim, config["num_key_value_heads"] * head_dim
    layer = hidden * query + 2 * hidden * key + query * hidden + 3 * hidden * inner
    layers = config["num_hidden_layers"]
    return (
        6 * layers * layer * rows + 6 * config["vocab_size"] * hidden * targets + 12 * layers * query * pairs
    )


def test_utilization_is_useful_operations_over_time_and_the_peak_of_all_ranks(folder):
    plan, draw = tiny_plan(flops=3e9), np.random.default_rng()
    counts = draw.integers(10, 500, (3, 3)).tolist()
    reports = [
        report(n, objective=name, kept_tokens=rows, targets=targets, pairs=pairs, seconds=0.1 * n)
        for n, (name, (rows, targets, pairs)) in enumerate(
            zip(("ntp", "bico", "ntp"), counts, strict=True), start=1
        )
    ]
    (line,) = monitored(folder, reports, every=3, utilization=Utilization.planned(plan))
    flops = [useful(plan, *of_step) for of_step in counts]
    assert line["speed/mfu/bico"] == pytest.approx(flops[1] / (0.2 * 2 * 3e9))
    assert line["speed/mfu/ntp"] == pytest.approx((flops[0] + flops[2]) / (0.4 * 2 * 3e9))
    assert line["speed/mfu"] == pytest.approx(sum(flops) / (0.6 * 2 * 3e9))


def test_tensorboard_says_by_which_peak_utilization_is_measured(folder):
    monitored(folder, [report(1)], every=1, utilization=Utilization.planned(tiny_plan(flops=3e9)))
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    layout = charts(load_recipe("tiny_bico"), has_mfu=True)
    ((chart,),) = (one.multiline.tag for part in layout.category for one in part.chart if one.title == "MFU")
    for tag in ("4 speed/mfu", "4 speed/mfu/ntp"):
        assert re.match(chart, tag)
        assert len(events.Scalars(tag)) == 1
        described = events.SummaryMetadata(tag)
        assert described.plugin_data.plugin_name == "scalars"
        assert "0.006 TFLOP/s = a matrix product in fp32 that rank 0 timed" in described.summary_description


def test_without_a_known_peak_there_is_no_utilization(folder):
    nan = float("nan")
    assert Utilization.planned(tiny_plan(bf16_flops=nan, fp32_flops=nan)) is None
    assert not [tag for tag in monitored(folder, [report(1)], every=1)[0] if "mfu" in tag]


def test_a_run_that_is_done_started_again_writes_no_line_twice(folder):
    """Of a checkpoint of before, which kept the steps of its last line, too."""
    recipe = load_recipe("tiny_bico", [])
    monitor = StepMonitor(recipe.monitor, folder, None, watch=Stopwatch())
    folder.metrics_file.write_text('{"step": 3, "kind": "train"}\n')
    saved = {"unwritten_steps": [asdict(report(3))]}
    monitor.on_start(RunStart(recipe=recipe, first_step=3, total_steps=3, summary={}, saved=saved))
    monitor.on_end(3, "done")
    assert folder.metrics_file.read_text() == '{"step": 3, "kind": "train"}\n'


def test_steps_that_an_earlier_program_left_unwritten_count_for_all_but_utilization(folder):
    old = asdict(report(1, seconds=100.0, loss=3.0))
    del old["pairs"]
    plan = tiny_plan()
    (line,) = monitored(
        folder,
        [report(2, loss=1.0, seconds=0.5)],
        first_step=1,
        utilization=Utilization.planned(plan),
        saved={"unwritten_steps": [old]},
    )
    assert line["loss/all"] == 2.0
    assert line["speed/mfu"] == pytest.approx(useful(plan, 90, 10, 800) / (0.5 * 2 * 1e9))


def test_a_line_cut_by_a_crash_is_dropped(folder):
    folder.metrics_file.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    keep_lines_until(folder.metrics_file, step=5)
    assert folder.metrics_file.read_text() == '{"step": 1, "kind": "train"}\n'


def test_without_a_terminal_the_console_gets_plain_lines():
    out = io.StringIO()
    console = ConsoleProgress(Console(file=out, soft_wrap=True))
    recipe = load_recipe("tiny_bico")
    console.on_start(RunStart(recipe=recipe, first_step=0, total_steps=2, summary={}))
    console.on_step(report(1))
    console.on_numbers(1, "evaluation", {"evaluation/n2d/headline": 0.25, "evaluation/n2d/exact": 0.1})
    console.on_end(1, "preempted")
    text = out.getvalue()
    assert "step 1/2" in text and "n2d 0.250" in text and "preempted after step 1" in text
    assert "\x1b" not in text


def test_the_console_shows_no_loss_of_a_step_without_a_target():
    out = io.StringIO()
    console = ConsoleProgress(Console(file=out, soft_wrap=True))
    console.on_start(RunStart(recipe=load_recipe("tiny_bico"), first_step=0, total_steps=2, summary={}))
    console.on_step(report(1, loss=1.25))
    console.on_step(report(2, targets=0, loss=float("nan"), grad_norm=float("nan"), applied=False))
    assert "step 2/2  loss ntp 1.250  no target" in out.getvalue()
    assert "nan" not in out.getvalue()


class Counting(Callback):
    """As a callback with a collective would be: it must be called on every rank, at the same points."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_step(self, step: StepReport) -> None:
        self.calls.append(f"step {step.step}")

    def on_message(self, text: str) -> None:
        self.calls.append(text)

    def state(self) -> dict:
        return {"calls": len(self.calls)}


class CountingOnRank0(Counting, FirstRankCallback):
    """As one that only shows or writes."""


@pytest.mark.parametrize("is_first", [True, False])
def test_every_rank_calls_every_callback_but_those_of_the_first_rank_alone(is_first):
    everywhere, first_only = Counting(), CountingOnRank0()
    callbacks = Callbacks([first_only, everywhere], is_first_rank=is_first)
    callbacks.on_message("hello")
    callbacks.on_step(report(3))
    assert everywhere.calls == ["hello", "step 3"]
    assert first_only.calls == (everywhere.calls if is_first else [])
    assert callbacks.state() == {"calls": 2}


class Watched:
    """A monitor of a run with TensorBoard and CSV, whose messages are kept."""

    def __init__(self, folder: RunFolder, *, first_step: int = 0, **writers) -> None:
        recipe = load_recipe("tiny_bico", ["monitor.every_steps=1"])
        self.folder, self.told, self.name = folder, [], recipe.name
        engine_s = SimpleNamespace(enabled=True, csv_monitor=object(), wandb_monitor=None, **writers)
        engine_s.write_events = lambda events: [
            writer.write_events(events) for writer in (engine_s.wandb_monitor, engine_s.csv_monitor) if writer
        ]
        self.monitor = StepMonitor(recipe.monitor, folder, engine_s, tell=self.told.append)
        self.engine_s = engine_s
        self.start = RunStart(recipe=recipe, first_step=first_step, total_steps=9, summary={})

    def steps(self, *numbers: int) -> None:
        """Training pauses after each."""
        for number in numbers:
            self.monitor.on_step(report(number))
            self.monitor.on_pause()

    def lines(self) -> list[int]:
        return [json.loads(line)["step"] for line in self.folder.metrics_file.read_text().splitlines()]

    def events(self) -> list[int]:
        events = EventAccumulator(str(self.folder.tensorboard)).Reload()
        return [event.step for event in events.Scalars("2 loss/all")]

    def csv(self) -> list[str]:
        return (self.folder.csv / self.name / "loss_all.csv").read_text().splitlines()


def test_tensorboard_gets_the_lines_of_a_second_together_and_all_of_them_where_training_pauses(
    folder, monkeypatch
):
    clock = [100.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: clock[0])
    run, shown = Watched(folder), []
    run.monitor.on_start(run.start)
    run.steps(1)
    for step in range(2, 8):
        clock[0] += 0.4
        run.monitor.on_step(report(step))
        shown.append(run.events())
        assert run.lines() == list(range(1, step + 1)), "metrics.jsonl has each at once"
    assert [events[-1] for events in shown] == [1, 1, 4, 4, 4, 7]
    assert shown[-1] == list(range(1, 8))
    run.monitor.on_step(report(8))
    assert run.events()[-1] == 7
    run.monitor.on_numbers(8, "evaluation", {"evaluation/n2d/headline": 0.5})
    assert run.events()[-1] == 8, "behind the steps before it"
    run.monitor.on_step(report(9))
    run.monitor.on_pause()
    assert run.events() == list(range(1, 10))


def test_a_resume_writes_no_line_of_csv_twice(folder):
    killed = Watched(folder)
    killed.monitor.on_start(killed.start)
    killed.steps(1, 2, 3)
    with (folder.csv / killed.name / "loss_all.csv").open("a") as file:
        file.write("4,1.")
    resumed = Watched(folder, first_step=1)
    resumed.monitor.on_start(resumed.start)
    resumed.steps(2, 3, 4)
    assert resumed.csv() == ["step,all", *(f"{step},1.0" for step in range(1, 5))]
    assert resumed.told == []


def test_a_disk_that_is_full_for_a_while_ends_no_run_and_costs_no_number(folder, capfd):
    run = Watched(folder)
    run.monitor.on_start(run.start)
    run.steps(1, 2)
    with files_limited_to(0):
        run.steps(3, 4, 5)
    assert run.lines() == [1, 2]
    whats = ("csv", "metrics.jsonl", "TensorBoard's file")
    assert sorted(run.told, key=str.casefold) == [
        f"WARNING: {what} cannot be written: File too large; training goes on, and tries again"
        for what in whats
    ]
    run.told.clear()
    run.steps(6)
    assert sorted(run.told, key=str.casefold) == [f"{what}: written again" for what in whats]
    run.monitor.on_end(6, "done")
    assert run.lines() == run.events() == [1, 2, 3, 4, 5, 6]
    assert run.csv() == ["step,all", *(f"{step},1.0" for step in range(1, 7))]
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_that_ends_on_a_full_disk_says_what_its_files_lack(folder):
    run = Watched(folder)
    run.monitor.on_start(run.start)
    run.steps(1)
    with files_limited_to(0):
        run.steps(2, 3)
        run.monitor.on_end(3, "done")
    assert f"WARNING: {folder.metrics_file} lacks 2 records, which could not be written" in run.told
    assert run.lines() == run.events() == [1]


def test_metrics_that_somebody_removes_or_blocks_in_the_run_end_no_run(folder):
    run = Watched(folder)
    run.monitor.on_start(run.start)
    run.steps(1, 2)
    shutil.rmtree(folder.tensorboard)
    shutil.rmtree(folder.csv)
    folder.metrics_file.unlink()
    run.steps(3)
    assert run.told == []
    assert (run.lines(), run.events(), run.csv()) == ([3], [3], ["step,all", "3,1.0"])
    accumulated = EventAccumulator(str(folder.tensorboard)).Reload()
    assert "custom_scalars__config__" in accumulated.Tags()["tensors"]
    for path in (folder.tensorboard, folder.csv):
        shutil.rmtree(path)
        path.write_text("a file")
    folder.metrics_file.unlink()
    folder.metrics_file.mkdir()
    run.steps(4)
    assert len(run.told) == 3
    for path in (folder.tensorboard, folder.csv):
        path.unlink()
    folder.metrics_file.rmdir()
    run.steps(5)
    run.monitor.on_end(5, "done")
    assert run.lines() == run.events() == [4, 5]


def test_metrics_that_are_no_text_are_dropped_at_a_resume(folder):
    line = b'{"step": 1, "kind": "train"}\n'
    noise = np.random.default_rng().integers(0, 256, 3000, dtype=np.uint8).tobytes()
    folder.metrics_file.write_bytes(line + noise + b"\n" + b"[" * 100_000 + b"\n")
    run = Watched(folder, first_step=1)
    run.monitor.on_start(run.start)
    run.steps(2)
    assert run.lines() == [1, 2]


def test_a_failing_wandb_ends_no_run(folder):
    class NoNetwork:
        def write_events(self, event_list):
            raise RuntimeError("api.wandb.ai is not reached")

    run = Watched(folder)
    run.engine_s.wandb_monitor = NoNetwork()
    run.monitor.on_start(run.start)
    run.steps(1, 2)
    assert run.told == [
        "WARNING: W&B cannot be written: api.wandb.ai is not reached; training goes on, and tries again"
    ]
    assert run.csv() == ["step,all", "1,1.0", "2,1.0"]


def test_a_number_that_json_does_not_have_is_left_out_of_metrics(folder):
    run = Watched(folder)
    run.monitor.on_start(run.start)
    run.monitor.on_numbers(3, "evaluation", {"texts/a/perplexity": float("inf"), "b": float("nan"), "c": 1.0})
    assert json.loads(folder.metrics_file.read_text()) == {"step": 3, "kind": "evaluation", "c": 1.0}
