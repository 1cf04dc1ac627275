"""A recipe with `~` or `${ROOM}` in every path: each command takes it where it can be expanded, and names the place
where it cannot.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from bico_ds.cluster.preflight.inputs import input_fingerprints, missing_inputs
from bico_ds.cluster.submission import write_batch_script
from bico_ds.commands import evaluate, preflight
from bico_ds.commands import export as export_hf
from bico_ds.commands.show import compare, inspect_batch
from bico_ds.commands.slurm import status, submit
from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.resources import DS_CONFIGS
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.model.build import build_model
from bico_ds.runtime.ds_config import build_ds_config
from bico_ds.runtime.run_folder import folder_of_run
from bico_ds.runtime.signals import StopFlag
from bico_ds.training import assembly
from bico_ds.training.dry_run import dry_run
from bico_ds.training.start import train
from tests import ROOT

BASE = """\
extends: tiny_base
training: {steps: 1, global_batch_bins: 1, micro_batch_bins: 1}
schedule: {name: constant, warmup_steps: 0, decay_steps: null}
evaluation: {tasks: [n2d], limit: 1, max_new_tokens: 2}
"""
EVERY_PATH = """\
extends: ROOM/base
output_dir: ROOM/run
model:
  path: ROOM/model
  tokenizer: ROOM/model
data:
  cache_dir: DATA/cache
  sources:
    - store: DATA/store
    - files:
        - DATA/texts-*.jsonl
deepspeed:
  config: ROOM/zero3.json
  overrides:
    flops_profiler:
      enabled: false
      output_file: ROOM/flops
evaluation:
  folder: DATA/tests
"""
DEEPSPEED_PATH = "deepspeed.overrides.flops_profiler.output_file"
LINES = {
    "extends": 1, "output_dir": 2, "model.path": 4, "model.tokenizer": 5, "data.cache_dir": 7,
    "data.sources.0.store": 9, "data.sources.1.files.0": 11, "deepspeed.config": 13,
    DEEPSPEED_PATH: 17, "evaluation.folder": 19,
}  # fmt: skip


@pytest.fixture(scope="module")
def furnished(tmp_path_factory) -> Path:
    """A home folder with everything that the recipe names, made once."""
    room = tmp_path_factory.mktemp("room")
    recipe = load_recipe("tiny_base", [f"data.cache_dir={room}/cache"])
    (store,) = assembly.prepare_stores(recipe, progress=False)
    store.rename(room / "store")
    facts = assembly.facts_folder(recipe.data)
    shutil.copytree(facts, room / "tests")
    load_tokenizer(facts / "tokenizer").save_pretrained(room / "model")
    LlamaForCausalLM(LlamaConfig(**recipe.model.config)).save_pretrained(room / "model")
    (room / "texts-1.jsonl").write_text(json.dumps({"text": "a b"}) + "\n")
    shutil.copy(DS_CONFIGS / "zero3_bf16.json", room / "zero3.json")
    (room / "base.yaml").write_text(BASE)
    return room


@pytest.fixture
def room(furnished, tmp_path, monkeypatch) -> Path:
    """The furnished folder as HOME and as the variables of recipes; another one to work in."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    monkeypatch.setenv("XDG_CACHE_HOME", cache)  # compiled kernels stay where they are
    for name in ("HOME", "ROOM", "DATA"):
        monkeypatch.setenv(name, str(furnished))
    monkeypatch.delenv("GONE", raising=False)
    monkeypatch.chdir(tmp_path)
    return furnished


def recipe_file(folder: Path, room: str, data: str | None = None, *, gone: str = "") -> Path:
    """The recipe with these words for its two folders; the path of the key `gone` begins with a variable that is
    not set."""
    lines = EVERY_PATH.replace("ROOM", room).replace("DATA", data or room).splitlines()
    if gone:
        line = lines[LINES[gone] - 1]
        lines[LINES[gone] - 1] = line.replace(room, "${GONE}")
    file = folder / "mine.yaml"
    file.write_text("\n".join(lines) + "\n")
    return file


def run(command, *words: object) -> int:
    return command.main([*map(str, words)])


SLURM = ("--nodes", 1, "--gpus-per-node", 0, "--ranks-per-node", 1, "--time", 10)


@pytest.mark.parametrize("written", ["~", "$ROOM", "${ROOM}"])
def test_all_that_reads_a_recipe_takes_its_paths_alike(room, tmp_path, capsys, written):
    file = recipe_file(tmp_path, written)
    recipe = load_recipe(str(file))
    assert list(missing_inputs(recipe)) == []
    assert len(input_fingerprints(recipe)) == 5
    assert "missing" not in input_fingerprints(recipe).values()
    dry_run(recipe)
    assert "is not on this machine" not in capsys.readouterr().out
    config = build_ds_config(recipe, world_size=1, hidden_size=8, on_cuda=False, run_folder=tmp_path)
    assert config["flops_profiler"]["output_file"] == str(room / "flops")
    build_model(recipe.model, seed=1, ds_config=None, device="cpu")
    assert folder_of_run(recipe, None) == room / "run"
    picture = f"{written}/{tmp_path.name}.png"
    assert run(inspect_batch, "--recipe", f"{written}/../{file}", "--png", picture) == 2  # no such file
    assert run(inspect_batch, "--recipe", file, "--png", picture) == 0
    assert (room / f"{tmp_path.name}.png").is_file()


def test_a_submitted_recipe_keeps_the_text_as_written(room, tmp_path):
    file = recipe_file(tmp_path, "${ROOM}")
    write_batch_script(submit.make_job(submit.main.parse(["--recipe", str(file), *map(str, SLURM)])))
    submitted = load_recipe(str(room / "run" / "slurm" / "recipe.yaml"))
    assert submitted == load_recipe(str(file))
    assert str(submitted.model.path) == "${ROOM}/model"
    shutil.rmtree(room / "run")


# What a command needs of the recipe; the login node neither trains nor makes stores.
BEFORE_RANKS_MEET = {"extends", "output_dir", "model.path", "deepspeed.config", DEEPSPEED_PATH}
NEEDS = {
    "training": BEFORE_RANKS_MEET,
    "dry run": set(LINES),
    "pre-flight": set(LINES),
    "submit": set(LINES) - {"data.cache_dir", DEEPSPEED_PATH},
    "inspection": {key for key in LINES if key.startswith(("extends", "data", "evaluation", "model.tok"))},
}


def outcome(command: str, file: Path, capsys) -> tuple[int, str]:
    """Exit code of a command in this process, and what it writes to stderr."""
    mains = {
        "pre-flight": (preflight,),
        "submit": (submit, *SLURM, "--dry-run"),
        "inspection": (inspect_batch,),
    }
    if command in mains:
        main, *words = mains[command]
        return run(main, "--recipe", file, *words), capsys.readouterr().err
    start = (
        dry_run if command == "dry run" else partial(train, output_dir=None, resume="auto", stop=StopFlag())
    )
    with pytest.raises(UserError) as caught:
        start(load_recipe(str(file)))
    return caught.value.exit_code, f"error: {caught.value}\n"


@pytest.mark.parametrize(
    ("command", "key"), [(command, key) for command in NEEDS for key in sorted(NEEDS[command])]
)
def test_a_variable_that_is_not_set_is_named_with_key_file_and_line(room, tmp_path, capsys, command, key):
    file = recipe_file(tmp_path, "${ROOM}", gone=key)
    code, shown = outcome(command, file, capsys)
    assert code == 2
    assert shown.startswith(f"error: {file}:{LINES[key]}: {key}: '${{GONE}}/")
    assert "the environment variable GONE is not set on this machine" in shown
    assert shown.count("\n") == 1, "one message, no traceback"


@pytest.mark.parametrize(
    ("command", "key"), [(c, key) for c in ("submit", "inspection") for key in sorted(set(LINES) - NEEDS[c])]
)
def test_a_variable_that_a_command_does_not_need_may_be_unset(room, tmp_path, capsys, command, key):
    file = recipe_file(tmp_path, "${ROOM}", gone=key)
    assert outcome(command, file, capsys)[0] == 0


def test_a_run_records_the_text_and_later_commands_do_not_mind_the_data(room, tmp_path, monkeypatch, capsys):
    file = recipe_file(tmp_path, "${ROOM}", "${DATA}")
    command = [sys.executable, ROOT / "launch" / "train.py", "--recipe", file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    folder = room / "run"
    assert load_recipe(str(folder / "recipe.yaml")) == load_recipe(str(file))
    monkeypatch.delenv("DATA")
    assert run(status, folder) == 0
    assert run(compare, folder, "--output", "${ROOM}/comparison") == 0
    assert run(export_hf, "~/run", "~/exported", "--dtype", "fp32") == 0
    monkeypatch.delenv("ROOM")
    assert run(export_hf, "~/run", "by-its-own-tokenizer", "--dtype", "fp32") == 0
    shutil.rmtree(folder / "tokenizer")
    words = ("~/run", "again", "--dtype", "fp32")
    assert run(export_hf, *words) == 2
    shown = capsys.readouterr().err
    assert "manifest.json: model.tokenizer: '${ROOM}/model'" in shown and "--tokenizer" in shown
    assert run(export_hf, *words, "--tokenizer", "~/model") == 0  # the recipe has the architecture
    exported = (folder / "export", room / "exported", tmp_path / "by-its-own-tokenizer", tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert len({(path / name).read_bytes() for path in exported}) == 1, name


def test_evaluation_takes_its_paths_by_the_same_rule(room):
    words = [
        "--model",
        "~/model",
        "--data",
        "${ROOM}/tests",
        "--base",
        "$ROOM/model",
        "--retention",
        "~/t.txt",
    ]
    options = evaluate.main.parse(words)
    request = evaluate.request_of(options, *options.model)
    assert (request.model, request.base, request.data) == (room / "model", room / "model", room / "tests")
    assert request.retention == (room / "t.txt",)


def test_deepspeeds_own_file_may_name_paths_too(room, tmp_path, monkeypatch):
    config = json.loads((DS_CONFIGS / "zero3_offload_nvme.json").read_text())
    config["zero_optimization"]["offload_optimizer"]["nvme_path"] = "${ROOM}/nvme"
    (tmp_path / "mine.json").write_text(json.dumps(config))
    recipe = load_recipe("tiny_base", [f"deepspeed.config={tmp_path}/mine.json"])
    build = lambda **here: build_ds_config(  # noqa: E731
        recipe, world_size=1, hidden_size=8, on_cuda=False, run_folder=tmp_path, **here
    )["zero_optimization"]["offload_optimizer"]["nvme_path"]
    assert build() == str(room / "nvme")
    monkeypatch.delenv("ROOM")
    assert build(runs_here=False) == "${ROOM}/nvme"
    with pytest.raises(
        UserError, match=r"mine\.json: zero_optimization\.offload_optimizer\.nvme_path: .*ROOM is not"
    ):
        build()
