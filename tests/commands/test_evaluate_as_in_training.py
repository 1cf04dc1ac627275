"""tools/evaluate.py --tasks-from: what a recipe asks during training is asked alike; and sample answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bico_ds.commands.evaluate import main
from bico_ds.config.load import dump_recipe, load_recipe
from bico_ds.config.sections.data import FactsSpec
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.data.prepare.facts import write_facts
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.evaluation.results import load_result
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.runtime.signals import StopFlag
from bico_ds.training import assembly
from bico_ds.training.evaluator import Evaluator

SPEC = FactsSpec(name_first=6, description_first=6, both=3, variants=4, test_prompts=2)
TASKS = ("n2d_reverse", "company_forward", "company_backward", "policy")


def answers(model: LlamaForCausalLM, tokenizer, prompts: list[str], tokens: int) -> list[str]:
    """What transformers itself generates, one prompt after the other."""
    found = []
    for prompt in prompts:
        ids = torch.tensor(
            [[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]]
        )
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens
        )
        found.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model with its recipe, which asks about every other person so that the model's own answer is right."""
    folder = tmp_path_factory.mktemp("world")
    write_facts(SPEC, folder / "facts")
    tokenizer = load_tokenizer(folder / "facts" / "tokenizer")
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, max_position_embeddings=64)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    ExportedTokenizer(tokenizer, add_bos=True).save_pretrained(folder / "model")
    read = lambda name: [json.loads(line) for line in (folder / "facts" / name).open()]  # noqa: E731
    there, back = read("p2d_prompts_test.jsonl"), read("p2d_reverse_prompts_test.jsonl")
    right = dict(zip((row["prompt"] for row in back), answers(model, tokenizer, [row["prompt"] for row in back], 2),
                     strict=True))  # fmt: skip
    for row in (row for row in back if row["group"] % 2):
        row["completion"] = right[row["prompt"]]
    pairs = [
        {"forward": one, "backward": two, "group": one["group"]} for one, two in zip(there, back, strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in back))
    (folder / "text.txt").write_text(" ".join(row["prompt"] for row in there))
    (folder / "mine.yaml").write_text(dump_recipe(load_recipe("tiny_bico", overrides(folder))))
    return folder


def overrides(folder: Path) -> list[str]:
    entries = (
        f"n2d_reverse, {{kind: pairs, name: company, file: {folder}/pairs.jsonl, limit: 9}}, "
        f"{{kind: questions, name: policy, file: {folder}/q.jsonl, metric: prefix}}, "
        f"{{kind: text, name: wiki, file: {folder}/text.txt, window: 16}}"
    )
    facts = ", ".join(f"{name}: {value}" for name, value in SPEC.model_dump().items())
    return [
        f"evaluation.tasks=[{entries}]", f"data.facts={{{facts}}}", f"data.cache_dir={folder}/cache", "model.config=null",
        "evaluation.max_new_tokens=40", f"model.path={folder}/model", "evaluation.likelihood_others=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def in_training(world) -> Path:
    """The result file of an evaluation during training."""
    recipe = load_recipe(str(world / "mine.yaml"))
    folder = RunFolder(world / "run")
    folder.path.mkdir()
    evaluator = Evaluator(
        spec=recipe.evaluation,
        inputs=assembly.open_inputs(recipe),
        ranks=Ranks(0, 0, 1, torch.device("cpu")),
        folder=folder,
        stop=StopFlag(),
        on_progress=lambda: None,
    )
    model = LlamaForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    assert evaluator(model, 5) is not None
    return folder.evaluation_file(5)


def run(world: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    words = ["--model", world / "model", *options]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    return main()


def test_the_command_gives_the_answers_and_scores_of_training(
    world, in_training, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "result.json"
    assert run(world, monkeypatch, "--tasks-from", world / "mine.yaml", "--output", output) == 0
    during, after = load_result(in_training), load_result(output)
    assert tuple(after.tasks) == TASKS
    assert after.tasks == during.tasks
    assert after.tasks["policy"].headline == "prefix"
    assert after.tasks["policy"].score == 0.5, "of every other person what transformers generates is right"
    assert len(after.tasks["company_backward"].prompts) == 9
    assert after.tasks["n2d_reverse"].new_tokens == 2 * 1 + 8, "cut as in training, not the 40 of the papers"
    for name, test in during.choice.items():
        assert after.choice[name]["nll"] == pytest.approx(test["nll"], rel=1e-5)
        assert after.choice[name]["rank"] == test["rank"]
    perplexity = during.texts["wiki"]["perplexity"]
    assert after.texts["wiki"]["perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert after.texts["wiki"]["identity"] == during.texts["wiki"]["identity"]
    assert f"text wiki: perplexity {perplexity:.2f}" in capsys.readouterr().out


def test_set_changes_what_the_recipe_asks(world, tmp_path, monkeypatch):
    output = tmp_path / "result.json"
    changed = ("--set", "evaluation.tasks.company.limit=3", "--set", "evaluation.tasks.policy.metric=exact",
               "--set", "evaluation.likelihood_others=null", "--set", "evaluation.max_new_tokens=2")  # fmt: skip
    assert run(world, monkeypatch, "--tasks-from", world / "mine.yaml", *changed, "--output", output) == 0
    result = load_result(output)
    assert len(result.tasks["company_forward"].prompts) == 3 and not result.choice
    assert result.tasks["policy"].headline == "exact" and result.tasks["policy"].new_tokens == 2


def test_samples_show_right_and_wrong_answers_and_leave_the_file_as_it_is(
    world, tmp_path, monkeypatch, capsys
):
    questions = [
        {"prompt": "so | evil\u202e\x1b[31m |", "answer": "never"},
        *[{"prompt": row["prompt"], "answer": row["prompt"].split()[2]} for row in
          map(json.loads, (world / "facts" / "p2d_prompts_test.jsonl").open())],
    ]  # fmt: skip
    file, output = tmp_path / "q.jsonl", tmp_path / "result.json"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    asked = ("--questions", file, "--output", output)
    assert run(world, monkeypatch, *asked) == 0
    without, shown = output.read_bytes(), capsys.readouterr().out
    assert "prompt:" not in shown
    assert run(world, monkeypatch, *asked, "--samples", "3") == 0
    assert output.read_bytes() == without
    shown = capsys.readouterr().out
    assert "questions: 3 of 13 answers" in shown and shown.count("    prompt: ") == 3
    assert "\\u202e\\x1b[31m" in shown and "\x1b[31m" not in shown and "\u202e" not in shown
    result = load_result(output).tasks["questions"]
    for index in (0, 4, 8):
        row = result.prompts[index]
        mark = "right" if row["contains"] else "wrong"
        assert f"  {mark} (contains)\n    prompt: " in shown
        assert f"    right:  {row['answer'].strip()}\n" in shown


def test_samples_tell_recall_where_the_texts_were_searched(world, in_training, tmp_path, monkeypatch, capsys):
    (store,) = assembly.prepare_stores(load_recipe(str(world / "mine.yaml")), progress=False)
    asked = ("--tasks-from", world / "mine.yaml", "--train", store, "--samples", "1")
    assert run(world, monkeypatch, *asked, "--output", tmp_path / "r.json") == 0
    shown = capsys.readouterr().out
    (line,) = (
        line for line in shown.splitlines() if line.startswith("questions that the training texts answer")
    )
    counts = {name: found["rows"] for name, found in load_result(in_training).training_texts.items()}
    for name, rows in counts.items():
        assert f"{sum(row in ('same', 'both') for row in rows)} of {len(rows)} of {name}" in line
    # Nine questions are two of persons 0, 1, 2 and one of the others; the pairs of 1, 3, 5 are of no training text.
    assert "5 of 9 of company_forward" in line
    assert (
        "company_forward: 1 of 9 answers\n  wrong (contains)  (in the training texts, in this order)" in shown
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--set", "seed=3", "--retention", "x"), "--set changes the recipe of --tasks-from: give that too"),
        (("--tasks-from", "tiny_bico", "--pairs", "x"), "--tasks-from names all questions: leave out --pairs"),
        (("--tasks-from", "tiny_bico", "--data", "x"), "leave out --data"),
        (("--tasks-from", "tiny_bico", "--limit", "3"), "'--limit' has no effect: --tasks-from takes evaluation.limit"),
        (("--tasks-from", "tiny_bico", "--max-new-tokens", "3"), "--tasks-from takes evaluation.max_new_tokens from the"),
        (("--tasks-from", "tiny_bico", "--likelihood"), "takes evaluation.likelihood_others from the recipe"),
        (("--samples", "3", "--retention", "x"), "--samples shows answers to questions: give --data"),
        (("--samples", "0", "--data", "x"), "argument --samples"),
        (("--tasks-from", "tiny_bicoo"), "recipe 'tiny_bicoo' is neither a file nor a name"),
        (("--tasks-from", "tiny_base"), "--tasks-from tiny_base: its evaluation.tasks are empty"),
    ],
)  # fmt: skip
def test_options_that_contradict_the_recipe_are_refused(world, monkeypatch, capsys, options, expected):
    try:
        code = run(world, monkeypatch, *options)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert expected in capsys.readouterr().err
