"""The best checkpoint of real runs: kept, exported, and the same after a resume as in a run that nothing interrupted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bico_ds.checkpoint import best
from bico_ds.config.load import load_recipe
from bico_ds.data.store import TokenStore
from bico_ds.evaluation.results import load_result
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.assembly import facts_folder, prepare_stores
from tests.distributed.launching import ROOT, environment, exported_weights, metrics, train

pytestmark = pytest.mark.distributed

EVERY, SAVED, STEPS = 4, 6, 24  # of evaluations, of checkpoints, of all


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of two ranks whose rate rises until it spoils what was learned, so that its best step lies inside."""
    folder = tmp_path_factory.mktemp("runs")
    cache = f"data.cache_dir={folder / 'cache'}"
    facts = facts_folder(load_recipe("tiny_base", [cache]).data)
    lines = (facts / "both_orders_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, own in (("held", lines[::10]), ("trained", [x for n, x in enumerate(lines) if n % 10])):
        (folder / f"{name}.jsonl").write_text("".join(own), encoding="utf-8")
    source = "data.sources=[{files: [%s], prompt_field: prompt, completion_field: completion}]"
    tokenizer = f"model.tokenizer={facts / 'tokenizer'}"
    (store,) = prepare_stores(
        load_recipe("tiny_base", [cache, tokenizer, source % (folder / "held.jsonl")]), progress=False
    )
    options = [
        cache, tokenizer, source % (folder / "trained.jsonl"), f"training.steps={STEPS}", "optimizer.lr=0.05",
        "schedule={name: constant, warmup_steps: 24, decay_steps: null}", "objectives=[{kind: ntp, probability: 0.5}, "
        "{kind: bico, probability: 0.5}]", f"evaluation.tasks=[{{kind: held_out, name: mine, store: {store}}}]",
        f"evaluation.every_steps={EVERY}", f"checkpoint.every_steps={SAVED}", "checkpoint.keep_last=1",
        f"checkpoint.keep_every_steps={SAVED}", "checkpoint.keep_best={metric: held_out/mine/ntp, mode: min}",
        "monitor.tensorboard=false", "training.on_spike=off",
    ]  # fmt: skip
    done = train("tiny_base", folder / "whole", *options)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, options=options, store=store, whole=folder / "whole", done=done)


def losses_of(run: Path) -> dict[int, float]:
    lines = metrics(run, "evaluation")
    return {line["step"]: line["evaluation/held_out/mine/ntp"] for line in lines}


def best_of(run: Path) -> Any:
    return best.read(RunFolder(run))


def test_the_best_step_is_kept_and_exported_and_its_loss_is_hugging_face_s(runs):
    losses, found = losses_of(runs.whole), best_of(runs.whole)
    assert list(losses) == list(range(0, STEPS + 1, EVERY)), "before training, too"
    trained = {step: loss for step, loss in losses.items() if step}
    assert found.step == min(trained, key=trained.__getitem__)
    assert found.value == trained[found.step]
    assert found.step % SAVED, (
        "a step of no checkpoint of its own, neither the first nor the last: else this shows little"
    )
    assert found.step not in (EVERY, STEPS)
    names = {path.name for path in (runs.whole / "checkpoints").iterdir()}
    kept = {f"step-{step:06d}" for step in (6, 12, 18, 24, found.step)}
    assert names == kept | {"latest", "best"}
    assert f"exported the best checkpoint ({found}), not the last step, {STEPS}, to " in runs.done.stdout
    assert str(found) in json.loads((runs.whole / "state.json").read_text())["reason"]
    assert by_hugging_face(runs.whole / "export", runs.store) == pytest.approx(found.value, abs=1e-5)
    (file,) = (runs.whole / "evaluation").glob(f"*{found.step:06d}.json")
    assert load_result(file).held_out["mine"]["ntp"]["loss"] == found.value


def test_the_command_gives_the_export_the_losses_of_the_run(runs, tmp_path):
    """Of the step that was exported, under each objective, over the same targets, on two ranks."""
    output = tmp_path / "result.json"
    asked = [
        "-m", "bico_ds.commands.evaluate", "--model", runs.whole / "export", "--tasks-from", runs.whole / "recipe.yaml",
        "--output", output,
    ]  # fmt: skip
    shown = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *asked)
    (file,) = (runs.whole / "evaluation").glob(f"*{best_of(runs.whole).step:06d}.json")
    during, after = load_result(file).held_out["mine"], json.loads(output.read_text())["held_out"]["mine"]
    assert list(after) == list(during) == ["ntp", "bico"]
    for name, expected in during.items():
        assert after[name]["loss"] == pytest.approx(expected["loss"], abs=1e-6), name
        assert after[name]["targets"] == expected["targets"]
        assert after[name]["identity"] == expected["identity"]
        assert f"{expected['loss']:.4f}" in shown and f"{expected['targets']:,}" in shown


def python(*words: object) -> str:
    """What this command prints."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@torch.no_grad()
def by_hugging_face(export: Path, store: Path) -> float:
    """The mean loss of the store's tokens after the first of each document, in nats."""
    model, documents = AutoModelForCausalLM.from_pretrained(export), TokenStore.open(store)
    total, count = 0.0, 0
    for number in range(len(documents)):
        ids = torch.from_numpy(documents.whole(torch.tensor([number]).numpy()).token_ids)[None]
        log_probs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        total -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return total / count


def interrupted(runs: SimpleNamespace, name: str, step: int) -> Path:
    """The run as it was when it was killed some time after this step: its later checkpoints are not there yet."""
    copy = runs.folder / name
    shutil.copytree(runs.whole, copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for name in ("export", "lock.json"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (copy / "checkpoints" / "latest").write_text(f"step-{step:06d}\n")
    (copy / "last_checkpoint.json").write_text(
        json.dumps({"step": step, "path": f"checkpoints/step-{step:06d}", "time": None})
    )
    return copy


def test_a_run_killed_before_it_recorded_the_best_has_the_same_one_in_the_end(runs):
    """The best lies before the kill: what the checkpoint records of it is all that is left."""
    copy = interrupted(runs, "killed", 18)
    (copy / "best_checkpoint.json").unlink()
    (copy / "checkpoints" / "best").unlink()
    done = train("tiny_base", copy, *runs.options)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert best_of(copy) == best_of(runs.whole)
    assert losses_of(copy) == losses_of(runs.whole)
    expected, found = exported_weights(runs.whole / "export"), exported_weights(copy / "export")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_resume_before_the_best_by_another_number_of_ranks_finds_it_again_and_not_by_the_old_record(runs):
    copy, expected = interrupted(runs, "earlier", 12), best_of(runs.whole)
    assert best_of(copy).step > 12, "the record of a step that is done anew"
    done = train("tiny_base", copy, *runs.options, ranks=1)
    assert done.returncode == 0, done.stderr
    assert "best checkpoint so far: step 12," in done.stdout, "of its evaluation in the run folder"
    found = best_of(copy)
    assert (found.step, found.metric, found.mode) == (expected.step, expected.metric, expected.mode)
    assert found.value == pytest.approx(expected.value, abs=1e-2)
    assert by_hugging_face(copy / "export", runs.store) == pytest.approx(found.value, abs=1e-5)


def test_the_export_after_an_evaluation_meets_no_parameter_in_flight(runs):
    """ZeRO-3 fetches ahead once it knows the order of modules; with a small bucket a tiny model shows it, too."""
    zero = "{stage3_param_persistence_threshold: 0, stage3_prefetch_bucket_size: 2000}"
    few = [
        "schedule={name: constant, warmup_steps: 0, decay_steps: null}",
        "training.steps=2",
        "evaluation.every_steps=2",
        "checkpoint.every_steps=null",
        "checkpoint.keep_every_steps=null",
    ]
    options = [*runs.options, *few, f"deepspeed.overrides.zero_optimization={zero}"]
    done = train("tiny_base", runs.folder / "ahead", *options)
    assert done.returncode == 0, done.stderr
    assert exported_weights(runs.folder / "ahead" / "export")
