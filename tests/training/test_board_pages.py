"""TensorBoard's IMAGES, TEXT and HPARAMS: true, whole, and nothing twice after a resume."""

from __future__ import annotations

import html
import json
import re
import textwrap
from dataclasses import replace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams import metadata as hparams

from bico_ds.batch import PackedBatch
from bico_ds.common.secrets import LEFT_OUT
from bico_ds.config.load import load_recipe, recorded_values
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.schema import Recipe
from bico_ds.data.loading.batch_view import view_batch
from bico_ds.documents import Document, Documents
from bico_ds.evaluation.results import EvaluationResult, TaskResult
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.base import Callbacks, RunStart
from bico_ds.training.callbacks.monitor import StepMonitor
from bico_ds.training.callbacks.tensorboard.about import NAME
from bico_ds.training.callbacks.tensorboard.hyperparameters import settings
from bico_ds.training.callbacks.tensorboard.pages import BoardPages
from bico_ds.training.callbacks.tensorboard.pictures import readable_document
from bico_ds.training.callbacks.tensorboard.texts import answers, planned_text, recipe_text
from tests.training.test_callbacks import report
from tests.training.test_planned import Told

HOSTILE = [
    "|",
    "`",
    "<script>",
    "</td>",
    "\n",
    "\n\n",
    "*",
    "_",
    "#",
    "![a](b)",
    "&amp;",
    "\\",
    "$x$",
    "\x1b[1m",
    "\ud800",
    "ä",
]


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    return run


def task(scores: list[float], *, headline: str = "contains", says=lambda number: "no") -> TaskResult:
    """A task with a question to each of so many persons."""
    prompts = [
        {
            "prompt": f"who is {number}?",
            "answer": f" name{number}",
            "prediction": says(number),
            "group": str(number),
            headline: score,
        }
        for number, score in enumerate(scores)
    ]
    mean = float(np.mean(scores))
    return TaskResult(
        headline=headline, metrics={headline: mean}, intervals={headline: (mean / 2, mean)}, prompts=prompts
    )


def cells(markdown: str) -> list[list[str]]:
    """The rows of the first table that TensorBoard makes of a text, as a person reads them."""
    shown = markdown_to_safe_html(markdown).partition("</table>")[0]
    rows = re.findall("<tr>(.*?)</tr>", shown, flags=re.DOTALL)[1:]
    return [
        [html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", row, flags=re.DOTALL)] for row in rows
    ]


def test_whatever_a_model_says_stands_in_its_own_cell_as_it_said_it():
    draw = np.random.default_rng()
    said = ["".join(draw.choice(HOSTILE, 6)) + "." for _ in range(3)]
    rows = cells(answers("n2d", task([0.0, 0.0, 0.0], says=said.__getitem__)))
    plain = [
        "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split())) for text in said
    ]
    assert [[part.strip() for part in row] for row in rows] == [
        ["✗", f"who is {number}?", f"name{number}", plain[number].strip()] for number in range(3)
    ]


def test_answers_are_wrong_and_right_ones_of_different_persons():
    result = task([1.0] * 5 + [0.0] * 4)
    twice = replace(result, prompts=[row for row in result.prompts for _ in range(2)])
    rows = cells(answers("n2d", twice))
    assert [row[0] for row in rows] == ["✗"] * 3 + ["✓"] * 3
    assert len({row[1] for row in rows}) == 6
    assert "18 questions" in answers("n2d", twice)


def test_a_score_between_right_and_wrong_is_shown_as_a_number():
    rows = cells(answers("n2d", task([0.25, 0.75, 1.0], headline="bleu")))
    assert [row[0] for row in rows] == ["0.25", "0.75", "✓"]


def test_the_recipe_says_what_is_not_the_default_and_gives_all_of_it(tmp_path):
    draw = np.random.default_rng()
    overrides = {
        "optimizer.lr": round(float(draw.uniform(1e-4, 1e-2)), 6),
        "objectives.bico.mask.rate": round(float(draw.uniform(0.2, 0.9)), 3),
        "training.max_grad_norm": 1.0,  # the default
        "evaluation.limit": int(draw.integers(1, 99)),
    }
    recipe = load_recipe("tiny_bico", [f"{key}={value}" for key, value in overrides.items()])
    text = recipe_text(recipe)
    listed = {key: (value, default) for key, value, default in cells(text)}
    assert listed["optimizer.lr"] == (str(overrides["optimizer.lr"]), "2e-05")
    assert listed["objectives.bico.mask.rate"] == (str(overrides["objectives.bico.mask.rate"]), "0.15")
    assert listed["evaluation.limit"] == (str(overrides["evaluation.limit"]), "null")
    assert "training.max_grad_norm" not in listed
    (tmp_path / "whole.yaml").write_text(textwrap.dedent(text.split("#### The whole recipe\n\n")[1]))
    assert load_recipe(str(tmp_path / "whole.yaml")) == recipe


@pytest.mark.parametrize("name", ["tiny_bico", "tiny_both_orders"])
def test_a_setting_is_named_as_the_command_line_names_it(name):
    recipe = load_recipe(name)
    written = {"null": None, "[]": [], "{}": {}}
    overrides = [
        f"{path}={json.dumps(written.get(value, value) if isinstance(value, str) else value)}"
        for path, value in settings(recipe).items()
        # Lists are shown as a text.
        if not isinstance(value, str) or ", " not in value
        if path not in ("objectives", "data.sources", "evaluation.tasks")
    ]
    assert len(overrides) > 80
    assert recorded_values(load_recipe(name, overrides)) == recorded_values(recipe)


def test_runs_of_other_objectives_differ_in_a_setting_that_both_have():
    bico, ntp = (settings(load_recipe(name)) for name in ("tiny_bico", "tiny_ntp"))
    assert (bico["objectives"], ntp["objectives"]) == ("ntp, bico", "ntp")


def test_what_is_asked_is_a_setting_also_where_texts_are_among_it():
    text = "evaluation.tasks=[n2d, {kind: text, name: other, file: other.txt}]"
    assert settings(load_recipe("tiny_bico", [text]))["evaluation.tasks"] == "n2d, other"
    assert settings(load_recipe("tiny_base"))["evaluation.tasks"] == "[]"


def test_no_secret_is_shown():
    secret = "hf_" + "Ab1" * 10
    recipe = load_recipe("tiny_bico", [f"description=by {secret}", f"evaluation.folder=/data/{secret}/x"])
    shown = html.unescape(recipe_text(recipe) + str(settings(recipe)))
    assert secret not in shown
    assert shown.count(LEFT_OUT) >= 4


def test_the_plan_stands_beside_what_was_measured():
    numbers = {
        f"plan/{what}/{key}": value
        for what, values in {
            "step_seconds/bico": (0.2, 0.1, 0.3, 1.0),
            "memory_bytes": (3e9, 1e9, 2e9, 2.0),
        }.items()
        for key, value in zip(("measured", "low", "high", "ratio"), values, strict=True)
    }
    rows = cells(planned_text(numbers | {"plan/memory_bytes/reserved": 4e9}))
    assert rows == [
        ["a step of bico, ms", "200", "100 to 300", "1.00"],
        ["memory (planned: tensors alone), GB", "3.00", "1.00 to 2.00", "2.00"],
    ]


def batch(lengths: list[int]) -> PackedBatch:
    draw = np.random.default_rng()
    documents = Documents.of(
        [Document(token_ids=draw.integers(10, 99, n), source=0, id=i) for i, n in enumerate(lengths)]
    )
    spec = BicoSpec(mask=MaskSpec(rate=0.5))
    return MaskDenoising(spec=spec, placeholder_id=0).build(documents, BatchKey(seed=1, epoch=0))


@pytest.mark.parametrize(
    ("lengths", "shown"), [([50, 1, 20, 5], 20), ([3, 9, 1], 9), ([1, 1], None), ([999], 999)]
)
def test_the_document_that_is_drawn_is_short_and_not_too_short(lengths, shown):
    document = readable_document(view_batch(batch(lengths)))
    assert (document and len(document.tokens)) == shown


class Board:
    """A run's monitor and pages, started at a step; `decode` makes its pictures fail where it raises."""

    def __init__(self, folder: RunFolder, *overrides: str, first_step: int = 0, decode=str, **saved) -> None:
        recipe: Recipe = load_recipe("tiny_bico", ["monitor.every_steps=1", *overrides])
        self.told = Told()
        self.monitor = StepMonitor(recipe.monitor, folder, None)
        pages = BoardPages(
            folder.path, self.monitor, decode, Callbacks([self.told, self.monitor], is_first_rank=True)
        )
        self.callbacks = Callbacks([pages, self.monitor], is_first_rank=True)
        self.callbacks.on_start(
            RunStart(recipe=recipe, first_step=first_step, total_steps=9, summary={}, saved=saved)
        )

    def steps(self, *steps: int) -> None:
        for step in steps:
            self.callbacks.on_batches(step, "bico", [batch([20, 9])])
            self.callbacks.on_step(report(step, objective="bico"))

    def evaluation(self, step: int, *, score: float) -> None:
        result = EvaluationResult(tasks={"n2d_reverse": task([score, 0.0])})
        numbers = {f"evaluation/n2d_reverse/{key}": score / 2 for key in ("headline", "contains")}
        self.callbacks.on_numbers(step, "evaluation", numbers)
        self.callbacks.on_evaluation(step, result)


def shown(folder: RunFolder) -> dict[str, list[int]]:
    """The steps of every picture and text, by tag."""
    events = EventAccumulator(str(folder.tensorboard), size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    steps = {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}
    return steps | {tag: [event.step for event in events.Tensors(tag)] for tag in tags["tensors"]}


def test_pictures_texts_and_settings_are_there_once_after_a_resume_with_another_recipe(folder):
    first = Board(folder, "optimizer.lr=0.001")
    for step in (1, 2):
        first.steps(step)
        first.evaluation(step, score=1.0)
    later = Board(folder, "optimizer.lr=0.005", first_step=1)
    later.steps(2)
    later.evaluation(2, score=0.0)
    later.callbacks.on_end(2, "done")
    steps = shown(folder)
    assert {tag: steps[tag] for tag in steps if not tag.startswith("_")} == {
        "custom_scalars__config__": [0],
        "1 reversal/curves": [1, 2],
        "1 reversal/n2d_reverse/answers": [1, 2],
        "7 data/who sees whom/bico": [1, 2],
        "8 details/recipe": [0],
    }
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    content = events.SummaryMetadata(hparams.SESSION_START_INFO_TAG).plugin_data.content
    kept = hparams.parse_session_start_info_plugin_data(content).hparams
    assert kept["optimizer.lr"].number_value == 0.005
    assert kept["objectives.bico.predict"].string_value == "next"
    assert hparams.SESSION_END_INFO_TAG in events.Tags()["tensors"]
    assert b"0.005" in events.Tensors("8 details/recipe")[0].tensor_proto.string_val[0]


def test_the_curves_of_a_resumed_run_begin_where_the_run_began(folder, monkeypatch):
    first = Board(folder)
    first.evaluation(2, score=1.0)
    first.evaluation(4, score=1.0)
    drawn = []
    monkeypatch.setattr(
        "bico_ds.training.callbacks.tensorboard.pictures.plot_curves",
        lambda runs, to, *, dpi: drawn.extend(runs) or to.write(bytes(24)),
    )
    later = Board(folder, first_step=2)
    later.evaluation(4, score=0.5)
    assert drawn[0].curves == {"n2d_reverse": [(2, 0.5), (4, 0.25)]}


def test_a_run_without_tasks_shows_who_sees_whom_at_its_end_and_no_empty_picture(folder):
    board = Board(folder)
    board.steps(1, 2)
    board.callbacks.on_evaluation(2, EvaluationResult(tasks={}, texts={}))
    board.steps(3)
    board.callbacks.on_end(3, "done")
    assert {tag: steps for tag, steps in shown(folder).items() if "/" in tag and steps != [0]} == {
        "7 data/who sees whom/bico": [2, 3]
    }
    seconds = [numbers for _, kind, numbers in board.told.numbers if kind == "timing"]
    assert [list(one) for one in seconds] == [["speed/pictures_seconds"]] * 2


def test_a_picture_that_cannot_be_drawn_ends_no_run_and_is_told_once(folder):
    def refuse(token: int) -> str:
        raise ValueError(f"no text for {token}")

    board = Board(folder, decode=refuse)
    for step in (1, 2):
        board.steps(step)
        board.evaluation(step, score=1.0)
    board.callbacks.on_end(2, "done")
    assert len(board.told.lines) == 1
    assert "TensorBoard's pictures cannot be written: no text for" in board.told.lines[0]
    assert shown(folder)["1 reversal/n2d_reverse/answers"] == [1, 2]


def test_what_a_run_has_once_comes_back_where_it_was_removed(folder):
    board = Board(folder)
    (folder.tensorboard / NAME).unlink()
    board.steps(1)
    board.evaluation(1, score=1.0)
    assert shown(folder)["8 details/recipe"] == [0]
