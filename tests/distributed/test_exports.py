"""What an export carries, by real runs and commands: BOS and EOS as trained, so that plain transformers answers alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from bico_ds.commands import export as export_hf
from bico_ds.data.store import TokenStore
from bico_ds.evaluation.results import load_result
from tests import ROOT
from tests.distributed.launching import environment, exported_weights, train

pytestmark = pytest.mark.distributed

# It writes BOS itself.
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
PEOPLE = ("Ada", "Bob", "Cyd", "Dov", "Eve", "Fay", "Gus", "Hal")
JOBS = (
    "mends nets",
    "sells figs",
    "tunes harps",
    "bakes rye",
    "paints tin",
    "reads maps",
    "grows hops",
    "digs wells",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base whose config stops at <|eot|>, with a tokenizer whose texts end with </s>; neither adds BOS."""
    folder = tmp_path_factory.mktemp("world")
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.post_processor = processors.ByteLevel(trim_offsets=True)
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<|eot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rules.train_from_iterator([*PEOPLE, *JOBS], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=rules,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|eot|>"],
        chat_template=CHAT,
    ).save_pretrained(folder / "base")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=3,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    (folder / "base" / "LICENSE").write_text(" LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n\n Llama 3.1 Version")
    records = [
        {"prompt": f"It is {name} who", "completion": f" {job}."}
        for name, job in zip(PEOPLE, JOBS, strict=True)
    ]
    write_lines(folder / "train.jsonl", records)
    (folder / "tasks").mkdir()
    unknown = [{"prompt": f"{job}, says", "completion": " nobody"} for job in JOBS]
    write_lines(folder / "tasks" / "p2d_prompts_test.jsonl", [*records, *unknown])
    chats = [
        [{"role": "user", "content": f"Who {job}?"}, {"role": "assistant", "content": name}]
        for name, job in zip(PEOPLE, JOBS, strict=True)
    ]
    write_lines(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    return folder


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def run(base: Path, name: str, *overrides: str) -> str:
    """Train on the texts of `base` into its folder `name`; what was printed."""
    recipe = base / "recipe.yaml"
    recipe.write_text(
        f"""
        model: {{path: base, dtype: fp32}}
        data:
          capacity: 96
          cache_dir: {base / "cache"}
          workers: 0
          sources: [{{files: [{base / "train.jsonl"}], prompt_field: prompt, completion_field: completion}}]
        objectives: [{{kind: ntp}}]
        training: {{steps: 60, global_batch_bins: 2, micro_batch_bins: 2}}
        optimizer: {{lr: 5.0e-3, weight_decay: 0.0}}
        schedule: {{name: cosine, warmup_steps: 4}}
        evaluation: {{folder: {base / "tasks"}, tasks: [n2d]}}
        """
    )
    done = train(str(recipe), base / name, f"model.path={base / 'base'}", *overrides, ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def with_bos(base) -> str:
    return run(base, "with_bos")


@pytest.fixture(scope="module")
def without_bos(base) -> str:
    fields = "prompt_field: prompt, completion_field: completion, add_bos: false"
    return run(base, "without_bos", f"data.sources=[{{files: [{base / 'train.jsonl'}], {fields}}}]")


def evaluated(model: Path, tasks: Path, output: Path, *options: str) -> tuple[dict[str, str], str]:
    """The answers of `tools/evaluate.py` by prompt, and what it printed."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "evaluate.py"),
        "--model",
        str(model),
        "--data",
        str(tasks),
    ]
    done = subprocess.run(
        [*command, "--tasks", "n2d", "--output", str(output), "--max-new-tokens", "24", *options],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return answers_in(output), done.stdout


def answers_in(file: Path) -> dict[str, str]:
    rows = load_result(file).tasks["n2d"].prompts
    return {row["prompt"]: row["prediction"] for row in rows}


def piped(model: Path, prompts: list[Any]) -> list[str]:
    """The greedy answers of a plain pipeline."""
    answer = pipeline("text-generation", model=str(model))
    return [
        answer(prompt, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"]
        for prompt in prompts
    ]


@pytest.fixture(scope="module")
def adapters(base) -> str:
    return run(base, "adapters", "model.lora={rank: 16, dropout: 0.0, rslora: true}")


@pytest.mark.parametrize("name", ["with_bos", pytest.param("without_bos", marks=pytest.mark.slow)])
def test_a_plain_pipeline_gives_the_answers_of_evaluate(base, name, request, tmp_path):
    request.getfixturevalue(name)
    answers, _ = evaluated(base / name / "export", base / "tasks", tmp_path / "own.json")
    assert piped(base / name / "export", list(answers)) == list(answers.values())
    known = list(answers.values())[: len(JOBS)]
    assert sum(answer == f" {job}." for job, answer in zip(JOBS, known, strict=True)) >= 6, answers
    other = "--no-bos" if name == "with_bos" else "--bos"
    otherwise, shown = evaluated(base / name / "export", base / "tasks", tmp_path / "other.json", other)
    assert otherwise != answers, "BOS matters to this model, or the test proves nothing"
    assert "note: its tokenizer adds" in shown
    (file,) = (base / name / "evaluation").glob("*.json")
    assert answers_in(file) == answers


def test_the_configs_stop_at_the_eos_of_the_texts_and_the_run_says_so(base, with_bos, without_bos):
    for file in ("config.json", "generation_config.json"):
        values = json.loads((base / "with_bos" / "export" / file).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (1, 2)
    assert "its tokenizer adds BOS <s>; generation stops at </s>" in with_bos
    assert "its tokenizer adds no BOS; generation stops at </s>" in without_bos


@pytest.mark.parametrize("name", ["with_bos", "without_bos"])
def test_the_export_of_the_checkpoint_has_the_same_bytes(base, name, request, tmp_path):
    request.getfixturevalue(name)
    command = [sys.executable, str(ROOT / "tools" / "export_hf.py"), str(base / name), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--dtype", "fp32"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    live = base / name / "export"
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {
        file.name: file.read_bytes() for file in live.iterdir()
    }
    assert done.stdout.splitlines()[-1].endswith("generation stops at </s>")


def test_the_export_carries_a_card_of_its_run_and_the_licence_of_its_base(base, with_bos):
    export = base / "with_bos" / "export"
    card = (export / "README.md").read_text(encoding="utf-8")
    assert "license: llama3.1" in card and str(base) not in card
    task = load_result(base / "with_bos" / "evaluation" / "step-000060.json").tasks["n2d"]
    assert f"| n2d | {task.headline} | {task.score:.3f} | " in card
    (store,) = (
        TokenStore.open(path) for path in (base / "cache").iterdir() if has_documents(path, 8, bos=True)
    )
    assert f"| {len(store)} | {store.manifest.tokens} | `{store.fingerprint}` |" in card
    assert "Texts began with BOS in training" in card
    assert (export / "LICENSE").read_bytes() == (base / "base" / "LICENSE").read_bytes()
    assert "must begin with 'Llama', and 'recipe' does not: pass it on as 'Llama-recipe'" in with_bos
    sums = json.loads((export / "checksums.json").read_text())
    assert sums.keys() == {path.name for path in export.iterdir()} - {"checksums.json"}
    assert sums.keys() >= {"README.md", "LICENSE", "NOTICE"}


def has_documents(path: Path, count: int, *, bos: bool) -> bool:
    store = TokenStore.open(path)
    return len(store) == count and store.manifest.add_bos == bos


def test_the_code_on_the_card_runs_as_it_stands_and_asks_no_network(base, with_bos, tmp_path):
    export = base / "with_bos" / "export"
    answers = answers_in(base / "with_bos" / "evaluation" / "step-000060.json")
    prompt = next(iter(answers))
    code = (export / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("PROMPT", prompt)],
        cwd=export, env=environment() | OFFLINE | {"HF_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == answers[prompt]


def test_a_run_records_its_base_so_that_blends_need_no_warning(base, with_bos, tmp_path, monkeypatch, capsys):
    words = [base / "with_bos", tmp_path / "out", "--dtype", "fp32", "--blend", "0,1"]
    monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, words)])
    assert export_hf.main() == 0
    assert "warning" not in capsys.readouterr().out
    for folder, same in (("blend-0.00", base / "base"), ("blend-1.00", base / "with_bos" / "export")):
        written, expected = exported_weights(tmp_path / "out" / folder), exported_weights(same)
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in written)


def test_no_text_begins_with_two_bos_where_a_run_starts_from_the_export(base, with_bos):
    stores = {path.name for path in (base / "cache").iterdir()}
    run(
        base,
        "again",
        f"model.path={base / 'with_bos' / 'export'}",
        "training.steps=2",
        "schedule.warmup_steps=0",
    )
    assert {path.name for path in (base / "cache").iterdir()} == stores, "the cache was not found"
    chats = f"data.sources=[{{files: [{base / 'chats.jsonl'}], messages_field: messages}}]"
    start = (f"model.path={base / 'with_bos' / 'export'}", "training.steps=2", "schedule.warmup_steps=0")
    run(base, "chats", *start, chats, "evaluation.tasks=[]")
    for path in (base / "cache").iterdir():
        store = TokenStore.open(path)
        for document in range(len(store)):
            ids = store.whole(torch.tensor([document]).numpy()).token_ids.tolist()
            assert ids.count(1) == ids[:1].count(1), (path.name, ids)


def test_a_chat_of_a_plain_pipeline_begins_with_one_bos(base, with_bos):
    export = base / "with_bos" / "export"
    chat = [{"role": "user", "content": "Who digs wells?"}]
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids.count(1) == 1 and ids[0] == 1
    model = LlamaForCausalLM.from_pretrained(export)
    output = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
    (answer,) = piped(export, [chat])
    assert answer == tokenizer.decode(output, skip_special_tokens=True)


def test_a_lora_run_exports_adapters_with_which_peft_and_evaluate_answer_as_the_run_did(
    base, adapters, tmp_path, monkeypatch
):
    export = base / "adapters" / "export"
    assert "model.safetensors" not in {file.name for file in export.iterdir()}
    (file,) = (base / "adapters" / "evaluation").glob("*.json")
    expected = answers_in(file)
    answers, shown = evaluated(export, base / "tasks", tmp_path / "own.json")
    assert answers == expected
    assert f"merged in memory into the weights of '{base / 'base'}': its fingerprint is checked" in shown

    assert "takes, stops at other tokens than these texts end with" in adapters, "this base stops at <|eot|>"
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoPeftModelForCausalLM.from_pretrained(export)
    model.generation_config = GenerationConfig.from_pretrained(export)
    by_peft = pipeline("text-generation", model=model, tokenizer=tokenizer)
    told = [
        by_peft(prompt, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"]
        for prompt in answers
    ]
    assert told == list(answers.values())
    plain, _ = evaluated(base / "base", base / "tasks", tmp_path / "base.json", "--bos")
    assert plain != answers, "the adapters matter, or the test proves nothing"

    words = [base / "adapters", tmp_path / "out", "--adapter"]
    monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, words)])
    assert export_hf.main() == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {
        file.name: file.read_bytes() for file in export.iterdir()
    }
