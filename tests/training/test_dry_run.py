"""--dry-run: everything is checked and counted, nothing is trained, no weights are needed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bico_ds.checkpoint import record
from bico_ds.checkpoint.manifest import MANIFEST
from bico_ds.commands.cures import CURES
from bico_ds.commands.show.inspect_batch import main as inspect_batch
from bico_ds.commands.train import main as train
from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.planner.devices import DEVICES
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training import assembly
from bico_ds.training import dry_run as command
from bico_ds.training.dry_run import dry_run
from tests.common.whole_words import words


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(name: str, *overrides: str) -> str:
        dry_run(load_recipe(name, overrides))
        return capsys.readouterr().out

    return run


def test_it_prints_parameters_steps_objectives_and_fill_without_weights(planned):
    text = planned("tiny_bico")
    assert "697,984" in text
    assert "first ntp step" in text and "first bico step" in text
    assert "960 sequences" in text and "fill 0.9" in text
    assert "is not on this machine" in text


LABELS = ("model", "parameters", "ranks", "precision, backend", "objectives", "data", "global batch", "plan", "run folder",
          "missing")  # fmt: skip


def test_it_begins_with_ten_lines_for_a_reader_and_prints_no_recipe(planned):
    ten_steps = "training={steps: 10, global_batch_bins: 4, micro_batch_bins: 2}"
    text = planned("tiny_base", "distributed.world_size=2", ten_steps, "schedule={name: constant}")
    ten, _, rest = text.partition("\n\n")
    lines = dict(zip(LABELS, ten.splitlines(), strict=True))
    assert all(line.startswith(f"{label:{len(LABELS[3])}}  ") for label, line in lines.items())
    assert "llama, 3 layers of width 128, random weights of seed" in lines["model"]
    assert "697,984, all trained" in lines["parameters"]
    assert "2 on 1 node; zero3_bf16: ZeRO 3" in lines["ranks"]
    sequences, tokens, bins, fill = re.search(
        r"([\d,]+) sequences, ([\d,]+) tokens in ([\d,]+) bins, fill ([\d.]+);", lines["data"]
    ).groups()
    in_all = float(tokens.replace(",", "")) / int(bins) * 40  # 10 steps of 4 bins
    assert f"; 10 steps, {in_all:,.0f} tokens in all" in lines["global batch"]
    assert f"{sequences} sequences, {tokens} tokens per epoch in {bins} bins, fill {fill}" in rest
    assert lines["plan"].partition("none, ")[2] in rest.splitlines()[-1]
    assert lines["run folder"].endswith("runs/tiny_base, begins")
    assert lines["missing"].endswith("  nothing that a start on this machine needs")
    assert rest.startswith("tiny_base: what would run")
    assert "seed: " not in text and "objectives:" not in text


def test_the_plan_among_the_ten_lines_is_the_verdict_s_and_the_gpus_are_missing_here(planned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = planned("tiny_base", "distributed.gpu=h100-80g", "distributed.world_size=16",
                   "training.global_batch_bins=32")  # fmt: skip
    lines = text.partition("\n\n")[0].splitlines()
    (plan,), verdict = [line for line in lines if line.startswith("plan ")], text.splitlines()[-1]
    fits = re.search(r"fits: .* of [\d.]+ GiB at the peak", plan)[0]
    assert fits in verdict
    assert plan.endswith("; 2 nodes of 8 x NVIDIA H100 SXM, 80 GB") and "tiny_base on 2 nodes of 8" in verdict
    assert lines[9].startswith("missing ") and "GPU (distributed.gpu: h100-80g): torch" in lines[9]
    assert len(lines) == 10


def test_a_run_folder_with_a_run_in_it_is_told(planned, tmp_path):
    folder = tmp_path / "runs" / "tiny_base"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("")
    assert "runs/tiny_base, there already: a start goes on from its newest checkpoint" in planned("tiny_base")


def test_all_that_is_missing_is_told_before_the_first_of_it_ends_the_dry_run(planned, tmp_path, capsys):
    with pytest.raises(UserError, match=r"texts-\*\.jsonl' does not exist"):
        planned("tiny_bico", f"data.sources=[{{files: [{tmp_path}/texts-*.jsonl]}}]",
                "model.tokenizer=${HOME}/no-such-tokenizer", "evaluation.folder=none/at-all",
                "model.path=models/none", "model.tokenizer=null", f"data.sources.0.files+={tmp_path}/more.jsonl",
                f"model.tokenizer={assembly.facts_folder(load_recipe('tiny_base').data)}/tokenizer")  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    for key in ("model.path (models/none)", "data.sources.0.files", "evaluation.folder (none/at-all)"):
        assert any(key in line for line in lines), key
    assert all(line.startswith(("missing  ", "         ")) for line in lines)


@pytest.mark.parametrize(
    ("words", "dry"), [(["--print-recipe"], False), (["--dry-run", "--print-recipe"], True)]
)
def test_the_recipe_is_printed_on_request_alone_or_last(words, dry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train(["--recipe", "tiny_base", "--set", "seed=7", *words]) == 0
    shown = capsys.readouterr().out
    before, name, recipe = shown.partition("name: tiny_base\n")
    assert bool(before) == dry
    (tmp_path / "printed.yaml").write_text(name + recipe)
    assert load_recipe(str(tmp_path / "printed.yaml")) == load_recipe("tiny_base", ["seed=7"])
    assert not (tmp_path / "runs" / "tiny_base").exists()


def test_it_has_every_word_whole_on_80_columns(planned, monkeypatch):
    wide = planned("tiny_bico")
    monkeypatch.setenv("COLUMNS", "80")
    assert words(planned("tiny_bico")) == words(wide)


@pytest.mark.parametrize("name", CURES)
def test_it_builds_the_first_step_of_every_objective_of_a_cure(planned, name):
    text = planned(name)
    for objective in load_recipe(name).objectives:
        assert f"first {objective.kind} step" in text


def test_a_bico_step_runs_fewer_rows_than_it_represents(planned):
    line = next(line for line in planned("tiny_bico").splitlines() if "first bico step" in line)
    numbers = [int(word.replace(",", "")) for word in line.split() if word.replace(",", "").isdigit()]
    represented, rows = numbers[1], numbers[2]
    assert 0.5 * represented < rows < represented


def test_it_writes_no_run_folder(planned, tmp_path):
    planned("tiny_base")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.config.vocab_size=30", "do not belong together"),
        ("model.config.num_hiden_layers=3", "did you mean 'num_hidden_layers'"),
        ("distributed.world_size=3", "must be a multiple"),
        ("deepspeed.overrides.zero_optimisation.stage=2", "did you mean 'zero_optimization'"),
        ("evaluation.tasks=[n2e]", "did you mean 'n2d'"),
    ],
)
def test_what_would_fail_later_fails_here(planned, override, expected):
    with pytest.raises(UserError, match=expected):
        planned("tiny_base", override)


BROKEN = """
from dataclasses import replace
from typing import Literal
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.objectives.table import register
from bico_ds.objectives.ntp import NextTokenPrediction

class BrokenSpec(NtpSpec):
    kind: Literal["broken"] = "broken"

class Broken(NextTokenPrediction):
    def build(self, documents, key):
        batch = super().build(documents, key)
        return replace(batch, targets=batch.targets + 1000)

register(BrokenSpec, f"{__name__}:Broken")
"""


def test_an_own_objective_that_predicts_ids_past_the_vocabulary_fails_here(planned, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    both = "objectives=[{kind: ntp, probability: 0.5}, {kind: broken, probability: 0.5}]"
    with pytest.raises(UserError, match=r"objective 'broken': .*its targets has \d+, past the vocabulary"):
        planned("tiny_base", "imports=[broken.py]", both)


@pytest.fixture
def store(tmp_path) -> str:
    """A store of the embedded task, and the only copy of its tokenizer: in the store."""
    recipe = load_recipe("tiny_base", [f"data.cache_dir={tmp_path}/elsewhere"])
    (path,) = assembly.prepare_stores(recipe, progress=False)
    moved = path.rename(tmp_path / "store")
    assert (moved / "tokenizer").is_dir()
    shutil.rmtree(tmp_path / "elsewhere")
    return str(moved)


def test_a_store_brings_its_tokenizer_where_the_weights_are_not_here(planned, store):
    text = planned("tiny_bico", f"data.sources=[{{store: {store}}}]")
    assert "first ntp step" in text
    assert "model.path 'runs/tiny_base/export' is not on this machine" in text
    assert "embedded task's tokenizer" not in text
    with pytest.raises(UserError, match="do not belong together"):
        planned("tiny_bico", f"data.sources=[{{store: {store}}}]", "model.config.vocab_size=30")


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "prompt_lengths.bin", "manifest.json"])
def test_a_damaged_store_is_refused_here_and_when_a_batch_is_looked_at(planned, store, capsys, name):
    planned("tiny_bico", source := f"data.sources=[{{store: {store}}}]")
    content = bytearray((Path(store) / name).read_bytes())
    content[len(content) // 2] ^= 1
    (Path(store) / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*prepare it again"):
        planned("tiny_bico", source)
    assert inspect_batch(["--recipe", "tiny_bico", "--set", source]) == 2
    assert name in capsys.readouterr().err


def test_a_damaged_store_in_the_cache_is_refused_with_what_to_do(planned, tmp_path):
    planned("tiny_base", cache := f"data.cache_dir={tmp_path}/cache")
    (file,) = (tmp_path / "cache").glob("*/tokens.bin")
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"checksum of tokens\.bin.*delete .* and it is made again"):
        planned("tiny_base", cache)
    shutil.rmtree(file.parent)
    planned("tiny_base", cache)


def test_texts_without_a_tokenizer_say_that_the_start_model_is_missing(planned, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match=r"'runs/tiny_base/export' is not on this machine.*model\.tokenizer="):
        planned("tiny_bico", f"data.sources=[{{files: [{tmp_path}/texts.jsonl]}}]")


def test_data_without_a_target_are_counted_or_refused_here(planned, tmp_path):
    facts = assembly.facts_folder(load_recipe("tiny_base", [f"data.cache_dir={tmp_path}/facts"]).data)
    long, short = ({"prompt": "a " * n, "completion": " b"} for n in (100, 3))
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [long] * 12 + [short] * 488)
    )
    common = (
        f"model.tokenizer={facts}/tokenizer",
        f"data.sources=[{{files: [{tmp_path}/texts.jsonl], prompt_field: prompt, completion_field: completion}}]",
        "objectives=[{kind: ntp, loss_on: completion}]",
        "data.overlong=truncate",
    )
    told = planned("tiny_base", *common, "data.capacity=64")
    assert "warning: source 'texts.jsonl': 12 of 500 documents have no target for objectives[0] (ntp)" in told
    assert "warning" not in planned("tiny_base", *common, "data.capacity=128")
    with pytest.raises(UserError, match=r"500 of 500 documents have no target for objectives\[0\] \(ntp\)"):
        planned("tiny_base", *common, "data.capacity=4")


def test_own_questions_are_counted_with_those_that_the_texts_answer_already(planned, tmp_path):
    facts = assembly.facts_folder(load_recipe("tiny_base", [f"data.cache_dir={tmp_path}/facts"]).data)
    there, back = (
        [json.loads(line) for line in (facts / f"p2d{way}_prompts_test.jsonl").open()]
        for way in ("", "_reverse")
    )
    pairs = [{"forward": one, "backward": two} for one, two in zip(there[:9], back[:9], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    own = f"evaluation.tasks=[n2d_reverse, {{kind: pairs, name: company, file: {tmp_path}/pairs.jsonl, limit: 7}}]"
    told = planned("tiny_bico", own)
    for name, asked, answered in (
        ("n2d_reverse", 80, 0),
        ("company_forward", 7, 7),
        ("company_backward", 7, 0),
    ):
        row = rf"task {name} +│ {asked} questions; the training texts answer {answered} of them already, in the order asked"
        assert re.search(row, told), name
    gone = [own, f"evaluation.tasks.company.file={tmp_path}/gone.jsonl", f"data.cache_dir={tmp_path}/new"]
    refused = r"evaluation.tasks.1.file \(company\): .*/gone.jsonl: no such file"
    with pytest.raises(UserError, match=refused):
        assembly.prepare_stores(load_recipe("tiny_bico", gone), weights_needed=False)
    assert not (tmp_path / "new").exists(), "before anything is made"
    with pytest.raises(UserError, match=refused):
        planned("tiny_bico", *gone)


def test_a_prompt_past_the_model_s_context_is_refused_here(planned):
    asked = ("evaluation.tasks=[n2d]", "evaluation.max_new_tokens=4")
    planned("tiny_base", *asked, "model.config.max_position_embeddings=20")
    with pytest.raises(
        UserError, match=r"p2d_prompts_test.jsonl:\d+: the prompt has \d+ tokens; with 4 new ones"
    ):
        planned("tiny_base", *asked, "model.config.max_position_embeddings=9")


def test_texts_past_the_model_s_context_are_noted_and_shorter_ones_are_not(planned):
    assert "max_position_embeddings" not in planned("tiny_base").partition("what would run")[2]
    noted = planned("tiny_base", "model.config.max_position_embeddings=8")
    assert re.search(r"note: texts of up to \d+ tokens are longer than the model's context of 8 ", noted)


def test_the_end_is_the_verdict_for_the_recipe_s_gpu_and_ranks_whatever_runs_it(planned):
    gpu = ("distributed.gpu=h100-80g", "distributed.world_size=2")
    text = planned("tiny_base", *gpu, "training={epochs: 3, global_batch_bins: 4, micro_batch_bins: 2}",
                   "schedule={name: constant}")  # fmt: skip
    last = text.splitlines()[-1]
    assert last.startswith("plan: tiny_base on 1 node of 2 x NVIDIA H100 SXM, 80 GB fits: ")
    (steps,) = re.findall(r"│ steps +│ (\d+)", text)
    assert f" {steps} steps of " in last
    assert "plan: none, as no GPU is named (distributed.gpu" in planned("tiny_base").splitlines()[-1]
    with pytest.raises(UserError, match=r"distributed\.gpu: 'h100-80' .*did you mean 'h100-80g'"):
        planned("tiny_base", "distributed.gpu=h100-80")


def test_a_run_that_does_not_fit_is_warned_of_and_not_refused(planned, tmp_path):
    small = asdict(DEVICES["h100-80g"]) | {"memory_bytes": 2**20}
    (tmp_path / "small.yaml").write_text(json.dumps(small))
    last = planned("tiny_base", "distributed.gpu=small.yaml").splitlines()[-1]
    assert "does not fit: " in last and "the largest item is " in last


def test_the_ten_lines_tell_a_place_where_no_run_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        (missing,) = command._no_place(place)
        assert missing.startswith(
            f"output_dir: there can be no folder '{place}': '{tmp_path / 'file'}' is none"
        )
    assert not list(command._no_place(tmp_path / "new" / "run"))


def test_the_ten_lines_tell_from_which_step_a_start_goes_on_or_that_it_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert command._place(folder.path, 9) == f"{folder.path}, begins"
    folder.open()
    folder.recipe_file.write_text("")
    folder.write_state("preempted", step=20)
    (checkpoint := folder.checkpoints / "step-000020").mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    record.write(folder, checkpoint, 20)
    folder.close()
    assert command._place(folder.path, 20).endswith("there already: a start goes on from step 20")
    assert command._place(folder.path, 12).endswith(
        "at step 20: a start of 12 steps is refused (training.steps)"
    )
