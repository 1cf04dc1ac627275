"""A model card says what the run recorded, and nothing that a stranger wrote becomes more than text in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from bico_ds.checkpoint import manifest
from bico_ds.config.load import recorded_recipe
from bico_ds.config.paths import FolderOrHubName
from bico_ds.evaluation.results import EvaluationResult, TaskResult
from bico_ds.model.weights.blend import Blend
from bico_ds.planner.architecture import architecture_of
from bico_ds.planner.flops import useful_flops
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.export.card import BICO_PAPER
from bico_ds.training.export.facts import run_of
from bico_ds.training.export.write_card import ExportCard, card_of
from tests import EARLIER_RUN, ROOT
from tests.training.export.test_licences import TEXTS

WORK = {
    "ntp": {"steps": 3, "updates": 2, "rows": 500, "tokens": 700, "targets": 400, "pairs": 9000, "seconds": 1.0},
    "bico": {"steps": 3, "updates": 3, "rows": 600, "tokens": 800, "targets": 200, "pairs": 8000, "seconds": 1.0},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of an earlier version, in a folder of its own."""
    shutil.copytree(EARLIER_RUN / "run", tmp_path / "run")
    return RunFolder(tmp_path / "run")


def record_of(run: RunFolder) -> dict[str, Any]:
    (checkpoint,) = manifest.checkpoints_in(run.checkpoints)
    return manifest.content_of(checkpoint)


def card_for(record: dict[str, Any], run: RunFolder | None, *, base: Path | None = None) -> ExportCard:
    recipe = recorded_recipe(record["recipe"], Path("manifest.json"), objectives=False)
    if base is not None:
        model = recipe.model.model_copy(update={"path": FolderOrHubName(str(base))})
        recipe = recipe.model_copy(update={"model": model})
    return card_of(record, recipe, run)


def evaluated(run: RunFolder, step: int) -> EvaluationResult:
    """Keep an evaluation of this step in the run's folder."""
    questions = [
        {"prompt": "p", "answer": "a", "prediction": "q", "group": str(n), "contains": n % 2}
        for n in range(8)
    ]
    scores = {"metrics": {"contains": 0.5}, "intervals": {"contains": (0.2, 0.8)}}
    result = EvaluationResult(
        tasks={
            "d2n_reverse": TaskResult(
                headline="contains",
                metrics={"contains": 0.5},
                intervals={"contains": (0.25, 0.8125)},
                prompts=questions,
            )
        },
        training_texts={
            "d2n_reverse": {
                "stores": ["s"],
                "documents": 4,
                "without_subject": 0,
                "rewritten": 0,
                "scores": {
                    "same": {"prompts": 3, "persons": 3, **scores},
                    "reverse": {"prompts": 5, "persons": 5, **scores},
                },
                "rows": ["same"] * 3 + ["reverse"] * 5,
            }
        },
        texts={"wiki": {"perplexity": 22.0, "tokens": 9, "times": 1.1, "identity": "i"}},
    )
    run.evaluation.mkdir(exist_ok=True)
    run.evaluation_file(step).write_text(json.dumps(result.to_json()))
    return result


def written(card: ExportCard, folder: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """The head and the body of the card that is written into a new folder."""
    folder.mkdir()
    config = card.facts.recipe.model.config
    (folder / "config.json").write_text(json.dumps({**(config or {}), "dtype": "bfloat16"}))
    card.write(folder, **options)
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def cells(body: str, first: str) -> list[str]:
    """The cells of the row that begins so, as Markdown shows them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    texts = [shown(token) for token in tokens if token.type == "inline"]
    at = texts.index(first)
    return texts[at : at + 6]


def shown(token: Any) -> str:
    return "".join(child.content for child in token.children)


def test_an_earlier_run_s_card_says_what_is_known_and_what_is_not(run, tmp_path):
    head, body = written(card_for(record_of(run), run), tmp_path / "out")
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bico_ds", "ntp", "bico"],
    }
    assert "random weights of seed 7" in body and "trained from random weights" in body
    assert "Nothing: the run was not evaluated at step 6." in body
    assert cells(body, "store")[:4] == [
        "store",
        "not recorded by the run",
        "not recorded by the run",
        "eb40b78095fd275ad516c5259382744b",
    ]
    assert "No base: the run began with random weights." in body
    assert cells(body, "steps")[1] == "6 of 12"


def test_scores_stand_with_their_intervals_and_what_the_texts_answer(run, tmp_path):
    evaluated(run, 6)
    record = record_of(run)
    record["state"]["texts_before"] = {
        "wiki": {"perplexity": 20.0, "tokens": 9, "times": None, "identity": "i"}
    }
    _, body = written(card_for(record, run), tmp_path / "out")
    assert cells(body, "d2n_reverse") == [
        "d2n_reverse", "contains", "0.500", "0.250 to 0.812", "8", "3 in the order asked",
    ]  # fmt: skip
    assert cells(body, "wiki")[:4] == ["wiki", "20.000", "22.000", "1.100"]
    assert "Not measured: the loss of held-out texts; safety" in body


def test_held_out_losses_are_those_of_the_metrics(run, tmp_path, monkeypatch):
    evaluated(run, 6)
    tags = {"evaluation/held_out/mine/bico": 1.23456, "evaluation/held_out/mine/ntp": 2.5}
    monkeypatch.setattr(EvaluationResult, "scalars", lambda self: tags)
    _, body = written(card_for(record_of(run), run), tmp_path / "out")
    assert cells(body, "mine")[:3] == ["mine", "bico", "1.2346"]
    assert "the loss of held-out texts" not in body.split("Not measured")[1]


def test_the_evaluation_of_another_step_is_not_taken_for_this_one(run, tmp_path):
    evaluated(run, 4)
    _, body = written(card_for(record_of(run), run), tmp_path / "out")
    assert "not evaluated at step 6 (the run's evaluations are of steps 4)" in body and "0.500" not in body
    run.evaluation_file(6).write_text("{")
    _, body = written(card_for(record_of(run), run), tmp_path / "again")
    assert "the evaluation of step 6 cannot be read" in body


def test_a_checkpoint_that_was_copied_elsewhere_says_that_its_run_was_not_there(run, tmp_path):
    (checkpoint,) = manifest.checkpoints_in(run.checkpoints)
    assert run_of(checkpoint) is not None
    shutil.copytree(checkpoint, tmp_path / "checkpoints" / checkpoint.name)
    assert run_of(tmp_path / "checkpoints" / checkpoint.name) is None
    _, body = written(card_for(record_of(run), None), tmp_path / "out")
    assert "Nothing: the run's folder was not beside the checkpoint." in body


def test_the_work_of_each_objective_is_what_its_steps_did(run, tmp_path):
    record = record_of(run)
    record["state"]["callbacks"]["work"] = WORK
    _, body = written(card_for(record, run), tmp_path / "out")
    model = card_for(record, run).facts.recipe.model
    flops = useful_flops(
        architecture_of(record["recipe"]["model"]["config"], source=""),
        model,
        rows=600,
        targets=200,
        pairs=8000,
    )
    assert cells(body, "bico") == ["bico", "40.0%", "40%, by token", "3", "800", f"{flops:.3g}"]
    assert cells(body, "bico_2") == ["bico_2", "20.0%", "20% to 60%, by span", "0", "0", "0"]


def test_versions_are_those_of_the_start_that_wrote_the_checkpoint(run, tmp_path):
    record = record_of(run)
    ours, other = (
        {"run_id": name, "versions": {"torch": v}} for name, v in ((record["run_id"], "1.5"), ("x", "9.9"))
    )
    run.run_file.write_text(json.dumps([ours, other]))
    _, body = written(card_for(record, run), tmp_path / "out")
    assert cells(body, "versions")[1] == "torch 1.5"


def test_a_base_of_the_hub_is_named_with_its_licence_in_the_head(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "LICENSE").write_text(TEXTS["llama3.1"])
    card = card_for(record_of(run), run, base=snapshot)
    head, body = written(card, tmp_path / "out")
    assert head["base_model"] == "meta-llama/Llama-3.1-8B" and head["license"] == "llama3.1"
    assert str(tmp_path) not in body and "a" * 40 in body
    assert "The name of the model begins with “Llama” (section 1.b)." in body
    assert "**This name does not keep to it:** `mixed`. `Llama-mixed` would." in body
    (note,) = card.notes
    assert note.endswith("must begin with 'Llama', and 'mixed' does not: pass it on as 'Llama-mixed'")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE", "NOTICE", "README.md", "config.json",
    ]  # fmt: skip


def test_an_adapter_s_card_is_peft_s(run, tmp_path):
    base = tmp_path / "llama"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(record_of(run)["recipe"]["model"]["config"]))
    (tmp_path / "out").mkdir()
    card_for(record_of(run), run, base=base).write(tmp_path / "out", kind="adapter")
    _, head, body = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    values = yaml.safe_load(head)
    assert values["library_name"] == "peft" and "base_model" not in values  # no hub finds `llama`
    assert "LoRA adapters for a llama language model" in body and "AutoPeftModelForCausalLM" in body
    assert "lm-eval" not in body


def test_a_blend_s_scores_are_said_to_be_none_of_its_own(run, tmp_path):
    evaluated(run, 6)
    blend = Blend(share=0.7, base="x", fingerprint=None, run="mixed", step=6)
    _, body = written(card_for(record_of(run), run), tmp_path / "out", blend=blend)
    assert "**Of the run's own weights, not of this blend**" in body
    assert cells(body, "share of the trained weights")[1] == "0.7"


HOSTILE = (
    "![i](http://x/y.png) [l](javascript:x) <script>alert(1)</script> `c` **b** __u__ | ~~s~~ $m$ @you "
    "https://evil.example www.evil.example &lt; \x1b[31m \u202e"
)


def test_a_text_of_unknown_origin_stays_text(run, tmp_path):
    """As a CommonMark parser reads it: all characters are shown, and nothing else comes of them."""
    record = record_of(run)
    for start in ("", "# ", "1. ", "- ", "=== "):
        record["recipe"]["description"] = start + HOSTILE
        _, body = written(card_for(record, run), tmp_path / f"out{len(start)}{start[:1]}x")
        tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
        (token,) = (token for token in tokens if token.type == "inline" and "alert" in token.content)
        assert {child.type for child in token.children} <= {"text", "text_special"}
        assert shown(token) == (start + HOSTILE).replace("\x1b", " ").replace("\u202e", " ").strip()
        # What GitHub makes links of.
        assert re.search(r"(?<!\\)://|www(?<!\\)\.", token.content) is None


def test_a_secret_in_a_description_is_left_out(run, tmp_path):
    record = record_of(run)
    record["recipe"]["description"] = "with hf_abcdefghijklmnopqrstuvwxyzABCDEFGH, mine"
    _, body = written(card_for(record, run), tmp_path / "out")
    assert "hf_abc" not in body and "(not recorded), mine" in body


def test_the_paper_is_cited_as_in_the_project_s_own_file():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][0]
    authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in cited["authors"])
    entry = dict(re.findall(r"^  (\w+)=\{(.*)\},?$", BICO_PAPER, re.MULTILINE))
    assert (entry["title"], entry["author"], entry["year"]) == (cited["title"], authors, str(cited["year"]))
    assert cited["identifiers"][0]["value"] in entry["journal"]


@pytest.mark.parametrize(("rslora", "scaled"), [(False, "alpha / rank"), (True, "alpha / sqrt(rank)")])
def test_the_scaling_of_adapters_stands_beside_their_rank(run, tmp_path, rslora, scaled):
    """Rank 8 and alpha 16 are two scalings, 2 and 5.7."""
    record = record_of(run)
    record["recipe"]["model"]["lora"] = {"rank": 8, "alpha": 16, "targets": ["q_proj"], "rslora": rslora}
    card_for(record, run).write(tmp_path)
    expected = f"| trained | LoRA adapters of rank 8, alpha 16, scaled by {scaled}, of q_proj |"
    assert expected in (tmp_path / "README.md").read_text(encoding="utf-8")
