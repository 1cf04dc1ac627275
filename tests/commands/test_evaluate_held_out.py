"""tools/evaluate.py --tasks-from measures a recipe's held-out stores by the model as it is trained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bico_ds.attention.backends import resolve
from bico_ds.commands.evaluate import main
from bico_ds.config.load import dump_recipe, load_recipe
from bico_ds.config.sections.data import FactsSpec
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.data.prepare.facts import write_facts
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.evaluation.held_out.loss import measure
from bico_ds.evaluation.scoring.share import ONE_PROCESS
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.weights.export_adapter import export_adapter
from bico_ds.model.weights.export_model import export_model
from bico_ds.training import assembly

OBJECTIVES = (
    "[{kind: ntp, probability: 0.5}, {kind: bico, probability: 0.25}, "
    "{kind: bico, probability: 0.25, mask: {rate: 0.5}}]"
)
NAMES = ["ntp", "bico", "bico_2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A base, a store that is trained on and a held-out one, and the recipe that names them."""
    folder = tmp_path_factory.mktemp("world")
    write_facts(FactsSpec(name_first=6, description_first=6, both=18, variants=2), folder / "facts")
    tokenizer = load_tokenizer(folder / "facts" / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    ExportedTokenizer(tokenizer, add_bos=True).save_pretrained(folder / "base")
    lines = (folder / "facts" / "both_orders_train.jsonl").read_text().splitlines(keepends=True)
    (folder / "held.jsonl").write_text("".join(lines[::3]))
    (folder / "trained.jsonl").write_text("".join(line for n, line in enumerate(lines) if n % 3))
    fields = "prompt_field: prompt, completion_field: completion"
    common = [
        f"model.path={folder}/base",
        "model.config=null",
        f"data.cache_dir={folder}/cache",
        "data.capacity=48",
    ]
    for name in ("held", "trained"):
        source = f"data.sources=[{{files: [{folder}/{name}.jsonl], {fields}}}]"
        (store,) = assembly.prepare_stores(
            load_recipe("tiny_bico", [*common, source, "evaluation.tasks=[]"]), progress=False
        )
        shutil.copytree(store, folder / f"{name}_store")
    own = [f"data.sources=[{{store: {folder}/trained_store}}]", f"objectives={OBJECTIVES}",
           f"evaluation.tasks=[{{kind: held_out, name: mine, store: {folder}/held_store}}]"]  # fmt: skip
    (folder / "mine.yaml").write_text(dump_recipe(load_recipe("tiny_bico", [*common, *own])))
    return folder


def adapted(world: Path, dtype: str) -> TrainableModel:
    """The model in training: a base with adapters that change it much; exported as adapters, and merged."""
    spec = ModelSpec(path=str(world / "base"), dtype=dtype, lora=LoraSpec(rank=4))
    model = build_model(spec, seed=1, ds_config=None, device="cpu")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (10 * torch.randn(parameter.shape)).to(parameter.dtype)
    tokenizer = ExportedTokenizer(load_tokenizer(world / "base"), add_bos=True)
    for name in ("adapters", "merged"):
        shutil.rmtree(world / name, ignore_errors=True)
    export_adapter(model, spec, tokenizer, world / "adapters", dtype)
    export_model(model, tokenizer, world / "merged", dtype)
    return model


def in_training(world: Path, model: TrainableModel) -> dict[str, dict[str, object]]:
    """What the run's evaluation measures of the model."""
    held_out = assembly.open_inputs(load_recipe(str(world / "mine.yaml"))).held_out
    backend = resolve("auto", model.causal_lm.dtype, 16, torch.device("cpu"))
    found = measure(model, held_out, ONE_PROCESS, backend.policy if backend else None)
    assert found is not None
    return found["mine"]


def run(world: Path, monkeypatch: pytest.MonkeyPatch, model: str, output: Path, *options: object):
    words = ["--model", world / model, "--tasks-from", world / "mine.yaml", "--output", output, *options]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    try:
        return main()
    except SystemExit as ended:
        return ended.code


def losses_in(file: Path) -> dict[str, dict[str, object]]:
    return json.loads(file.read_text())["held_out"]["mine"]


@pytest.mark.parametrize("name", ["adapters", "merged"])
def test_an_export_has_the_losses_of_the_model_in_training(world, tmp_path, monkeypatch, capsys, name):
    expected = in_training(world, adapted(world, "fp32"))
    base = in_training(
        world,
        build_model(ModelSpec(path=str(world / "base"), dtype="fp32"), seed=1, ds_config=None, device="cpu"),
    )
    assert run(world, monkeypatch, name, tmp_path / "r.json") == 0
    found = losses_in(tmp_path / "r.json")
    assert list(found) == NAMES
    changes = (abs(found[name]["loss"] - base[name]["loss"]) for name in NAMES)
    assert max(changes) > 1e-4, "else the adapters show nothing"
    shown = capsys.readouterr().out
    for objective, values in expected.items():
        ours = found[objective]
        # Live adapters are added to a layer's output, merged ones to its weights, in fp32.
        assert ours["loss"] == pytest.approx(values["loss"], abs=1e-5)
        assert (ours["targets"], ours["identity"]) == (values["targets"], values["identity"])
        shown_with = (f" {objective} ", f"{ours['loss']:.4f}", f"{ours['targets']:,}")
        assert all(word in shown for word in shown_with)
    assert "Held-out loss" in shown and " mine " in shown


def test_a_bf16_export_is_measured_in_bf16_and_by_dtype_in_fp32(world, tmp_path, monkeypatch):
    adapted(world, "bf16")
    for option, dtype in (("auto", "bf16"), ("fp32", "fp32")):
        output = tmp_path / f"{option}.json"
        assert run(world, monkeypatch, "merged", output, "--dtype", option) == 0
        built = build_model(
            ModelSpec(path=str(world / "merged"), dtype=dtype), seed=1, ds_config=None, device="cpu"
        )
        assert losses_in(output) == in_training(world, built)
    assert losses_in(tmp_path / "auto.json") != losses_in(tmp_path / "fp32.json")


def test_what_is_in_the_file_is_not_measured_again_and_other_texts_are(world, tmp_path, monkeypatch):
    output = tmp_path / "r.json"
    assert run(world, monkeypatch, "base", output) == 0
    marked = json.loads(output.read_text())
    whole = marked["held_out"]["mine"]["ntp"]["targets"]
    marked["held_out"]["mine"]["ntp"]["targets"] = -1
    output.write_text(json.dumps(marked))
    assert run(world, monkeypatch, "base", output) == 0
    assert losses_in(output)["ntp"]["targets"] == -1
    assert run(world, monkeypatch, "base", output, "--set", "evaluation.tasks.mine.limit=12") == 0
    assert 0 < losses_in(output)["ntp"]["targets"] < whole


def test_two_stores_questions_and_texts_are_measured_by_one_command(world, tmp_path, monkeypatch):
    """The model that is changed for the losses of one store serves the next, and the questions come before."""
    (world / "q.jsonl").write_text(json.dumps({"prompt": "so |", "answer": "never"}) + "\n")
    (world / "text.txt").write_text("so | so | so |")
    stores = ", ".join(
        f"{{kind: held_out, name: {name}, store: {world}/held_store}}" for name in ("one", "two")
    )
    others = f"{{kind: questions, name: q, file: {world}/q.jsonl}}, {{kind: text, name: t, file: {world}/text.txt}}"
    output, again = tmp_path / "r.json", tmp_path / "again.json"
    assert run(world, monkeypatch, "base", output, "--set", f"evaluation.tasks=[{stores}, {others}]") == 0
    assert run(world, monkeypatch, "base", again, "--set", f"evaluation.tasks=[{others}]") == 0
    found, plain = json.loads(output.read_text()), json.loads(again.read_text())
    assert found["held_out"]["one"] == found["held_out"]["two"]
    assert found["tasks"] == plain["tasks"] and found["texts"] == plain["texts"]


def gpt2(world: Path) -> str:
    """A model that no run trains, with the tokenizer of the others."""
    if not (world / "gpt2").exists():
        tokenizer = load_tokenizer(world / "base")
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)
        ).save_pretrained(world / "gpt2")
        ExportedTokenizer(tokenizer, add_bos=True).save_pretrained(world / "gpt2")
    return "gpt2"


@pytest.mark.parametrize(
    ("of", "options", "expected"),
    [
        (lambda world: "base", ("--train", "{world}/held_store"), "evaluation.tasks.0 (held-out store 'mine'): '"),
        (lambda world: "base", ("--set", "evaluation.tasks.mine.store={world}/trained_store"), "holds what is trained on"),
        (lambda world: "base", ("--set", "evaluation.tasks.mine.store={world}/nowhere"), "tasks.0 (held-out store"),
        (lambda world: "base", ("--set", "data.capacity=2", "--set", "data.overlong=drop"), "has no document that fits"),
        (gpt2, (), "gpt2: held-out losses are measured with the attention of training: "),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_weights_are_loaded(
    world, tmp_path, monkeypatch, capsys, of, options, expected
):
    options = [option.format(world=world) for option in options]
    assert run(world, monkeypatch, of(world), tmp_path / "r.json", *options) == 2
    told = capsys.readouterr().err
    assert expected in told and "Traceback" not in told
    assert not (tmp_path / "r.json").exists()
