"""A run in TensorBoard: its tags, charts, and event files, also of a run begun before they had today's tags."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.evaluation.results import EvaluationResult, TaskResult
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.tensorboard.charts import charts
from bico_ds.training.callbacks.tensorboard.tags import tag_of, tagged
from tests.training.test_callbacks import Watched

# What a recipe may call an objective, a source or a text, and what could be taken for a part of a key or tag.
NAMES = (
    "ntp", "all", "held-out", "divergence", "text", "headline", "perplexity", "times_base", "loss", "fill", "rows",
    "a/b", "held-out/a", "2 loss", "1 reversal", "größe", "a (b)+", "x", "details", "evaluation", "mfu",
)  # fmt: skip


def keys_of(*, objective: str, source: str, text: str, task: str) -> list[str]:
    return [
        "loss/all", "loss/divergence", f"loss/{objective}", f"loss/{objective}/{source}", "speed/step_seconds",
        "speed/mfu", f"speed/mfu/{objective}", "memory/peak_gb", "optimizer/grad_norm", "data/fill",
        f"data/{source}/rows", f"work/rows/{objective}", f"share/steps/{objective}", f"plan/step_seconds/{objective}/low",
        f"evaluation/{task}/headline", f"evaluation/{task}/headline_low", f"evaluation/{task}/exact",
        f"evaluation/{task}/same/contains", f"evaluation/text/{text}/perplexity", f"evaluation/text/{text}/times_base",
    ]  # fmt: skip


def test_no_two_keys_have_one_tag_whatever_names_a_recipe_gives():
    keys = {
        key
        for objective, source in itertools.product(NAMES, NAMES)
        for key in keys_of(objective=objective, source=source, text=source, task=objective)
    }
    tags = {key: tag_of(key) for key in keys}
    assert len(set(tags.values())) == len(keys)
    assert all(re.match("[1-8] [a-z]+/.", tag) for tag in tags.values())


@pytest.mark.parametrize(
    ("key", "tag"),
    {
        "evaluation/n2d_reverse/headline": "1 reversal/n2d_reverse",
        "loss/all": "2 loss/all",
        "loss/bico/books": "2 loss/bico/books",
        "evaluation/text/novel/perplexity": "2 loss/held-out/novel",
        "evaluation/text/novel/times_base": "3 retention/novel",
        "evaluation/held_out/mine/bico_2": "2 loss/held-out/mine/bico_2",
        "loss/divergence": "3 retention/divergence",
        "speed/mfu/bico": "4 speed/mfu/bico",
        "memory/planned_low_gb": "5 memory/planned_low_gb",
        "optimizer/clipped_share": "6 optimizer/clipped_share",
        "data/books/rows": "7 data/books/rows",
        **{key: f"8 details/{key}" for key in ("evaluation/n2d_reverse/headline_low", "work/rows/bico")},
    }.items(),
)
def test_a_key_is_in_the_group_in_which_one_looks_for_it(key, tag):
    assert tag_of(key) == tag


@pytest.mark.parametrize(
    ("metrics", "headline"), [(("contains", "exact"), "contains"), (("contains", "bleu"), "bleu")]
)
def test_a_task_s_headline_metric_is_shown_once(metrics, headline):
    numbers = {f"evaluation/n2d/{metric}": 0.1 * n for n, metric in enumerate(metrics, start=1)}
    numbers["evaluation/n2d/headline"] = numbers[f"evaluation/n2d/{headline}"]
    (other,) = set(metrics) - {headline}
    assert set(tagged("evaluation", numbers)) == {"1 reversal/n2d", f"8 details/evaluation/n2d/{other}"}


def test_a_held_out_text_s_loss_is_in_nats_and_what_is_no_number_is_not_shown():
    (draw,) = np.random.default_rng().uniform(0.1, 9, 1)
    numbers = {
        "evaluation/text/a/perplexity": float(np.exp(draw)),
        "evaluation/text/b/perplexity": float("inf"),
        "evaluation/text/c/perplexity": 0.0,
        "evaluation/text/b/times_base": float("nan"),
        "evaluation/held_out/d/ntp": float(draw),  # a loss already
    }
    shown = {"2 loss/held-out/a": pytest.approx(draw), "2 loss/held-out/d/ntp": float(draw)}
    assert tagged("evaluation", numbers) == shown


def test_what_an_evaluation_repeats_of_the_work_is_no_second_point():
    numbers = {"work/rows/ntp": 3.0, "share/steps/ntp": 1.0}
    assert tagged("evaluation", numbers) == {}
    assert len(tagged("train", numbers)) == 2


def patterns(recipe: Recipe, *, has_mfu: bool = True) -> dict[str, list[str]]:
    """By chart the expressions that its tags match; those of a chart with margins match one tag each."""
    found = {}
    for chart in (chart for category in charts(recipe, has_mfu=has_mfu).category for chart in category.chart):
        margins = [tag for one in chart.margin.series for tag in (one.value, one.lower, one.upper)]
        found[chart.title] = list(chart.multiline.tag) + [f"{re.escape(tag)}$" for tag in margins]
    return found


def shown(recipe: Recipe, chart: str, tags: list[str]) -> list[str]:
    """As TensorBoard searches them."""
    return [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns(recipe)[chart])]


def test_the_chart_of_losses_has_those_of_objectives_and_of_nothing_else():
    recipe = load_recipe("tiny_bico", ["data.sources=[{facts: all, name: a}, {facts: both_orders, name: b}]"])
    tags = [
        tag_of(f"loss/{name}") for name in ("all", "ntp", "bico", "bico_2", "ntp/a", "bico/b", "divergence")
    ]
    tags.append(tag_of("evaluation/text/held/perplexity"))
    assert shown(recipe, "loss", tags) == tags[:4]
    assert shown(recipe, "loss by source", tags) == tags[4:6]


def test_runs_of_one_objective_and_of_two_share_their_charts():
    """TensorBoard would draw a chart for each of two that differ."""
    one, two = patterns(load_recipe("tiny_ntp")), patterns(load_recipe("tiny_bico"))
    assert one == {title: two[title] for title in one}


def test_own_questions_are_shown_first_and_the_other_way_round_before_as_read():
    """TensorBoard shows these charts from the last to the first."""
    own = (
        "{kind: questions, name: policy, file: x}, {kind: pairs, name: company, file: x}, "
        "{kind: parents, name: celebs, file: x}"
    )
    layout = charts(load_recipe("tiny_bico", [f"evaluation.tasks=[n2d_reverse, {own}, n2d]"]), has_mfu=False)
    (reversal,) = (category for category in layout.category if category.title == "reversal")
    assert [chart.title for chart in reversed(reversal.chart)] == [
        "policy", "company, BACKWARD", "company, forward", "celebs, PARENT TO CHILD", "celebs, child to parent",
        "N2D, forward: name → description", "N2D, REVERSE: description → name",
    ]  # fmt: skip
    shown = [chart.margin.series[0].value for chart in reversed(reversal.chart)]
    assert shown[1:4] == [
        f"1 reversal/{name}" for name in ("company_backward", "company_forward", "celebs_parent_to_child")
    ]


def test_charts_of_what_a_run_does_not_write_are_not_there():
    assert not {"MFU", "frontier", "N2D, forward: name → description", "share of steps"} & set(
        patterns(load_recipe("tiny_base"), has_mfu=False)
    )


@pytest.fixture
def run(tmp_path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


class OldRun:
    """A run as the program before wrote it: `last` lines of steps, evaluated at the last one."""

    def __init__(self, run: RunFolder, last: int) -> None:
        run.tensorboard.mkdir(parents=True, exist_ok=True)
        self.began = time.time() - 10_000
        with SummaryWriter(str(run.tensorboard)) as writer, run.metrics_file.open("a") as metrics:
            for step in range(1, last + 1):
                self._write(writer, metrics, step, "train", {"loss/all": 1 / step, "work/rows/ntp": step})
            self._write(writer, metrics, last, "evaluation", {
                "evaluation/n2d/headline": 0.5, "evaluation/n2d/contains": 0.5, "evaluation/n2d/exact": 0.25,
            })  # fmt: skip
        (self.events,) = run.tensorboard.iterdir()

    def _write(self, writer: SummaryWriter, metrics, step: int, kind: str, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step, walltime=self.began + step)
        metrics.write(json.dumps({"step": step, "kind": kind, **numbers}) + "\n")


def scalars_in(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def resumed(run: RunFolder, first_step: int, *steps: int) -> list[str]:
    """What a start that goes on from there tells the user."""
    watched = Watched(run, first_step=first_step)
    watched.monitor.on_start(watched.start)
    watched.steps(*steps)
    return watched.told


def test_a_run_begun_before_goes_on_without_two_curves_of_one_number(run):
    old = OldRun(run, last=4)
    told = resumed(run, 3, 4, 5)
    curves = scalars_in(run)
    assert curves["2 loss/all"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 1.0), (5, 1.0)]
    assert not [tag for tag in curves if not tag[0].isdigit()]
    assert told == [
        "TensorBoard's curves are written anew, under today's names; the files of before are kept in "
        f"{run.path / 'replaced-1' / 'tensorboard'}"
    ]
    kept = run.path / "replaced-1" / "tensorboard" / old.events.name
    assert EventAccumulator(str(kept)).Reload().Scalars("loss/all")[0].step == 1
    events = EventAccumulator(str(run.tensorboard)).Reload().Scalars("2 loss/all")
    assert [event.wall_time for event in events[:3]] == pytest.approx([old.began + n for n in (1, 2, 3)])


def test_a_headline_of_before_is_shown_once_at_its_step(run):
    OldRun(run, last=4)
    resumed(run, 4, 5)
    curves = scalars_in(run)
    assert curves["1 reversal/n2d"] == [(4, 0.5)]
    assert curves["8 details/evaluation/n2d/exact"] == [(4, 0.25)]
    assert "8 details/evaluation/n2d/contains" not in curves
    assert curves["8 details/" + "work/rows/ntp"] == [(n, n) for n in range(1, 5)]


@pytest.mark.parametrize(("written", "bounds"), [((0.25, 0.75), (0.25, 0.75)), (None, (0, 1))])
def test_an_old_headline_has_its_interval_and_never_a_narrower_one(run, written, bounds):
    """TensorBoard shows an error in the place of a curve of which a step has no bounds."""
    OldRun(run, last=4)
    if written is not None:
        task = TaskResult(headline="contains", metrics={"contains": 0.5}, intervals={"contains": written})
        run.evaluation_file(4).parent.mkdir()
        run.evaluation_file(4).write_text(json.dumps(EvaluationResult(tasks={"n2d": task}).to_json()))
    resumed(run, 4, 5)
    curves = scalars_in(run)
    for end, bound in zip(("low", "high"), bounds, strict=True):
        assert curves[f"8 details/evaluation/n2d/headline_{end}"] == [(4, bound)]


def test_a_second_resume_writes_no_history_again(run):
    OldRun(run, last=2)
    resumed(run, 2, 3)
    assert resumed(run, 3, 4) == []
    assert [step for step, _ in scalars_in(run)["2 loss/all"]] == [1, 2, 3, 4]
    assert not (run.path / "replaced-2").exists()


def test_a_start_that_died_after_it_set_the_old_files_aside_costs_no_curve(run):
    OldRun(run, last=2)
    shutil.move(run.tensorboard, run.new_aside() / "tensorboard")
    assert resumed(run, 2, 3) == []
    assert [step for step, _ in scalars_in(run)["2 loss/all"]] == [1, 2, 3]


def test_an_old_program_that_went_on_in_between_is_put_right(run):
    resumed(run, 0, 1, 2)
    with SummaryWriter(str(run.tensorboard)) as writer:
        writer.add_scalar("loss/all", 7.0, 3)
    with run.metrics_file.open("a") as metrics:
        metrics.write('{"step": 3, "kind": "train", "loss/all": 7.0}\n')
    resumed(run, 3, 4)
    curves = scalars_in(run)
    assert curves["2 loss/all"] == [(1, 1.0), (2, 1.0), (3, 7.0), (4, 1.0)]
    assert "loss/all" not in curves


def test_metrics_and_event_files_that_are_broken_hinder_no_run(run):
    old = OldRun(run, last=3)
    noise = np.random.default_rng().integers(0, 256, 300, dtype=np.uint8).tobytes()
    old.events.write_bytes(old.events.read_bytes()[:-40] + noise)
    lines = run.metrics_file.read_bytes().splitlines(keepends=True)
    strange = b'{"step": 2, "kind": ["x"], "a": "b", "c": null, "d/e": [1], "loss/ntp": true, "f": 1e40}\n'
    run.metrics_file.write_bytes(b"".join([*lines[:2], noise, b"\n", strange, lines[2][:-9]]))
    resumed(run, 3, 4)
    curves = scalars_in(run)
    assert curves["2 loss/all"] == [(1, 1.0), (2, 0.5), (4, 1.0)]


def test_a_run_begun_before_that_lost_its_metrics_goes_on(run):
    OldRun(run, last=3)
    run.metrics_file.unlink()
    resumed(run, 3, 4)
    assert scalars_in(run)["2 loss/all"] == [(4, 1.0)]


def test_the_history_comes_back_where_somebody_removed_the_event_files(run):
    resumed(run, 0, 1, 2)
    shutil.rmtree(run.tensorboard)
    resumed(run, 2, 3)
    assert scalars_in(run)["2 loss/all"] == [(1, 1.0), (2, 1.0), (3, 1.0)]
