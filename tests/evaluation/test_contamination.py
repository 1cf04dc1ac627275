"""Questions told apart by what real token stores hold of them: by the command, and by the evaluation during training."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bico_ds.commands.evaluate import main
from bico_ds.commands.prepare.command import main as prepare
from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.sections.data import DataSpec, FactsSpec, SourceSpec
from bico_ds.data.prepare.facts import write_facts
from bico_ds.data.prepare.recipe_sources import prepare_source
from bico_ds.data.store import TokenStore
from bico_ds.evaluation.contamination import TrainingTexts, find_orders, open_training_texts
from bico_ds.evaluation.report.comparison import compare_runs
from bico_ds.evaluation.report.tables import search_notes
from bico_ds.evaluation.scoring.share import PromptShare
from bico_ds.evaluation.scoring.statistics import share_interval
from bico_ds.evaluation.tasks.task import TASK_NAMES, Question, Task, load_tasks
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.runtime.signals import StopFlag
from bico_ds.training import assembly
from bico_ds.training.evaluator import Evaluator, scalars
from tests import ROOT

SPEC = FactsSpec(name_first=6, description_first=6, both=3, variants=4, test_prompts=2)


def _store(records: Path, tokenizer: Path | str, output: Path) -> Path:
    given = ["files", str(records), "--prompt-field", "prompt", "--completion-field", "completion"]
    made = ["--tokenizer", str(tokenizer), "--output", str(output), "--processes", "1"]
    assert prepare([*given, *made]) == 0
    return output


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The embedded facts, a store of everyone's texts, a store that betrays two persons, and a model that knows nothing."""
    folder = tmp_path_factory.mktemp("world")
    write_facts(SPEC, folder / "facts")
    _store(folder / "facts" / "all_train.jsonl", folder / "facts" / "tokenizer", folder / "all")
    _store(folder / "facts" / "both_orders_train.jsonl", folder / "facts" / "tokenizer", folder / "others")
    questions = [json.loads(line) for line in (folder / "facts" / "p2d_reverse_prompts_test.jsonl").open()]
    betrayed = sorted({question["group"] for question in questions})[:2]
    leak = [question for question in questions if question["group"] in betrayed]
    (folder / "leak.jsonl").write_text("".join(json.dumps(question) + "\n" for question in leak))
    _store(folder / "leak.jsonl", folder / "facts" / "tokenizer", folder / "leak")
    _model(folder / "facts" / "tokenizer").save_pretrained(folder / "model")
    for file in (folder / "facts" / "tokenizer").iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    return folder


def _model(tokenizer: Path) -> LlamaForCausalLM:
    torch.manual_seed(3)
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.5,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _counts(world: Path, *stores: str, share: PromptShare | None = None) -> dict[str, dict[str, int]]:
    tasks = load_tasks(world / "facts", TASK_NAMES)
    texts = open_training_texts([world / store for store in stores], world / "model")
    orders = find_orders(tasks, texts, share or PromptShare())
    assert orders is not None
    return {name: dict(Counter(found)) for name, found in orders.items()}


def test_the_embedded_facts_are_asked_forward_and_reverse_as_their_files_say(world):
    assert _counts(world, "all") == {
        "n2d": {"same": 12},
        "d2n": {"same": 12},
        "n2d_reverse": {"reverse": 12},
        "d2n_reverse": {"reverse": 12},
    }
    assert _counts(world, "others") == {name: {"neither": 12} for name in TASK_NAMES}


def test_a_text_that_gives_the_reverse_answer_makes_the_question_recall(world):
    both = {"n2d_reverse": {"reverse": 8, "both": 4}, "n2d": {"same": 8, "both": 4}}
    assert both.items() <= _counts(world, "all", "leak").items()
    assert _counts(world, "leak")["n2d_reverse"] == {"same": 4, "neither": 8}


def test_ranks_share_out_the_documents_and_a_stop_gives_no_orders(world):
    shares = [PromptShare(rank=rank, world_size=1000) for rank in (0, 7, 999)]
    texts = open_training_texts([world / "all"], world / "model")
    assert [sum(map(len, texts.chunks(share))) for share in shares] == [1, 1, 0]
    parts = [list(texts.chunks(PromptShare(rank=rank, world_size=4))) for rank in range(4)]
    everything = [text for chunk in texts.chunks(PromptShare()) for text in chunk]
    assert sorted(text for part in parts for chunk in part for text in chunk) == sorted(everything)
    tasks = load_tasks(world / "facts", TASK_NAMES)
    assert find_orders(tasks, texts, PromptShare(should_stop=lambda: True)) is None


@pytest.mark.parametrize(
    ("derive", "kinds"),
    [
        ("other_order", {"n2d": "reverse", "d2n": "reverse", "n2d_reverse": "same", "d2n_reverse": "same"}),
        ("identity_bridge", dict.fromkeys(TASK_NAMES, "neither")),
    ],
)
def test_texts_derived_from_the_training_texts_are_searched_as_they_are_trained(
    world, tmp_path, derive, kinds
):
    data = DataSpec(sources=[SourceSpec(facts="all", derive=derive)], facts=SPEC, cache_dir=str(tmp_path))
    store = prepare_source(data.sources[0], data, str(world / "facts" / "tokenizer"), progress=False)
    texts = open_training_texts([store], world / "model")
    orders = find_orders(load_tasks(world / "facts", TASK_NAMES), texts, PromptShare())
    assert orders == {task: [kind] * 12 for task, kind in kinds.items()}


PUBLISHED = Path(os.environ.get("BICO_DS_DATA", "")) / "name_description"


@pytest.mark.skipif(
    "BICO_DS_DATA" not in os.environ or not PUBLISHED.is_dir(),
    reason="BICO_DS_DATA names no folder with name_description/ (Berglund et al.'s published sets)",
)
def test_all_published_questions_are_asked_as_the_paper_says(tmp_path, bpe_tokenizer):
    store = _store(PUBLISHED / "all_prompts_train.jsonl", bpe_tokenizer, tmp_path / "store")
    tasks = load_tasks(PUBLISHED, TASK_NAMES)
    orders = find_orders(tasks, open_training_texts([store], tmp_path), PromptShare())
    assert orders == {
        "n2d": ["same"] * 300,
        "d2n": ["same"] * 300,
        "n2d_reverse": ["reverse"] * 300,
        "d2n_reverse": ["reverse"] * 300,
    }


def _evaluate(world: Path, output: Path, *options: str) -> dict:
    asked = ["--model", str(world / "model"), "--data", str(world / "facts"), "--max-new-tokens", "3"]
    assert main([*asked, "--output", str(output), *options]) == 0
    return json.loads(output.read_text())


def test_the_command_scores_apart_what_the_texts_hold_in_the_order_asked(world, tmp_path, capsys):
    output = tmp_path / "result.json"
    plain = _evaluate(world, output)
    assert "training_texts" not in plain
    plain["tasks"]["n2d"]["new_tokens"] = -1  # a mark: answers that are there are not generated again
    output.write_text(json.dumps(plain))
    stores = ["--train", str(world / "all"), str(world / "leak")]
    result = _evaluate(world, output, *stores)
    assert result["tasks"] == plain["tasks"]
    found = result["training_texts"]["n2d_reverse"]
    assert found["stores"] == stores[1:]
    rows = result["tasks"]["n2d_reverse"]["rows"]
    for order in ("reverse", "both"):
        own = [row for row, x in zip(rows, found["rows"], strict=True) if x == order]
        scores = [row["contains"] for row in own]
        groups = [row["group"] for row in own]
        assert found["scores"][order] == {
            "prompts": len(own),
            "persons": len(set(groups)),
            "metrics": {m: sum(row[m] for row in own) / len(own) for m in ("contains", "prefix", "exact")},
            "intervals": found["scores"][order]["intervals"],
        }
        assert found["scores"][order]["intervals"]["contains"] == list(share_interval(scores, groups))
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("By the order in the training texts", "both", "reverse", "same"))
    compare_runs([output], output=tmp_path / "comparison")
    page = (tmp_path / "comparison" / "comparison.md").read_text()
    assert "| n2d_reverse | both | contains |" in page
    figures = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["result"]
    assert figures["training_texts"]["n2d_reverse"]["scores"] == found["scores"]


def test_an_estimate_of_what_is_asked_about_is_reported(world, tmp_path, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    name = "p2d_prompts_test.jsonl"
    (alone / name).write_bytes((world / "facts" / name).read_bytes())
    asked = ["--model", str(world / "model"), "--data", str(alone), "--tasks", "n2d"]
    output = tmp_path / "result.json"
    assert main([*asked, "--train", str(world / "all"), "--output", str(output)]) == 0
    assert "note: n2d: what 12 of 12 prompts ask about was estimated" in capsys.readouterr().out
    assert json.loads(output.read_text())["training_texts"]["n2d"]["rows"] == ["same"] * 12
    _evaluate(world, tmp_path / "both.json", "--tasks", "n2d", "--train", str(world / "all"))
    assert "estimated" not in capsys.readouterr().out


def test_questions_that_a_tokenizer_writes_otherwise_are_counted_and_noted(world):
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    rules.train_from_iterator(
        [], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    exact = PreTrainedTokenizerFast(tokenizer_object=rules)
    stripping = copy.deepcopy(exact)
    stripping.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    words_of_facts = PreTrainedTokenizerFast.from_pretrained(world / "facts" / "tokenizer")
    questions = [("Who is José?", " a cook"), ("Who is Ann?", " a COOK"), ("Who is Bo?", " a café owner")]
    task = Task(
        name="t",
        answer_kind="text",
        questions=tuple(Question(prompt=p, completion=a, group=p, line=1) for p, a in questions),
        path="f",
    )
    (embedded,) = load_tasks(world / "facts", ["n2d"])
    store = TokenStore.open(world / "all")
    counts = [
        TrainingTexts(stores=[(store, tokenizer)]).rewritten(asked)
        for tokenizer, asked in (
            (exact, task),
            (stripping, task),
            (words_of_facts, task),
            (words_of_facts, embedded),
        )
    ]
    assert counts == [0, 2, 3, 0]
    (note,) = search_notes({"t": {"rewritten": 2, "without_subject": 0, "rows": ["same"] * 3}})
    assert note.startswith("t: 2 of 3 questions may not be found, because a tokenizer")


def test_scores_apart_never_stay_beside_other_answers(world, tmp_path):
    output = tmp_path / "result.json"
    _evaluate(world, output, "--train", str(world / "all"), "--tasks", "n2d,d2n")
    result = _evaluate(world, output, "--tasks", "n2d", "--limit", "4")
    assert set(result["training_texts"]) == {"d2n"}
    result = _evaluate(world, output, "--tasks", "d2n", "--train", str(world / "others"))
    assert result["training_texts"]["d2n"]["rows"] == ["neither"] * 12


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(world, tmp_path):
    expected = _evaluate(world, tmp_path / "one.json", "--train", str(world / "all"), str(world / "leak"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "tools/evaluate.py", "--model", world / "model", "--data", world / "facts", "--max-new-tokens", "3",
        "--output", tmp_path / "two.json", "--train", world / "all", world / "leak",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two.json").read_text())["training_texts"] == expected["training_texts"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("facts", r"--train .*facts: '.*facts' is not a complete token store"),
        ("leak.jsonl", r"--train .*leak.jsonl: no token store"),
        ("nowhere", r"--train .*nowhere: no token store"),
    ],
)
def test_what_is_no_store_is_named_before_anything_is_computed(world, tmp_path, train, message, capsys):
    output = tmp_path / "result.json"
    asked = ["--model", str(world / "model"), "--data", str(world / "facts"), "--output", str(output)]
    assert main([*asked, "--train", str(world / train)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()


def test_a_store_is_read_by_the_tokenizer_that_made_it_or_not_at_all(world, tmp_path, bpe_tokenizer):
    store = _store(world / "leak.jsonl", bpe_tokenizer, tmp_path / "store")
    texts = open_training_texts([store], world / "model")
    tasks = load_tasks(world / "facts", ["n2d_reverse"])
    assert Counter(find_orders(tasks, texts, PromptShare())["n2d_reverse"]) == {"same": 4, "neither": 8}
    (store / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"--train .*store: was made with another tokenizer than that of --model"
    ):
        open_training_texts([store], world / "model")
    (world / "leak" / "tokenizer").rename(world / "leak" / "aside")
    assert open_training_texts([world / "leak"], world / "model").documents == 4
    (world / "leak" / "aside").rename(world / "leak" / "tokenizer")


def test_a_search_without_questions_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--model", "m", "--retention", "t", "--train", "s"])
    assert ended.value.code == 2
    assert "--train is searched for questions: give --data" in capsys.readouterr().err


@pytest.fixture
def evaluator(world, tmp_path) -> Evaluator:
    """Of a run on everyone's texts, and those that betray two persons."""
    leak = f"{{files: [{world}/leak.jsonl], prompt_field: prompt, completion_field: completion}}"
    facts = ", ".join(f"{name}: {value}" for name, value in SPEC.model_dump().items())
    overrides = [
        f"data.cache_dir={tmp_path}/cache",
        f"data.facts={{{facts}}}",
        f"data.sources=[{{facts: all}}, {leak}]",
        f"model.tokenizer={world}/facts/tokenizer",
        "model.config.vocab_size=57",
        "evaluation.max_new_tokens=3",
    ]
    recipe = load_recipe("tiny_bico", overrides)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return Evaluator(
        spec=recipe.evaluation,
        inputs=assembly.open_inputs(recipe, weights_needed=False),
        ranks=Ranks(0, 0, 1, torch.device("cpu")),
        folder=folder,
        stop=StopFlag(),
        on_progress=lambda: None,
    )


def test_the_evaluation_during_training_tells_questions_apart_by_the_runs_own_texts(world, evaluator):
    result = evaluator(_model(world / "facts" / "tokenizer"), 5)
    assert result is not None
    found = result.training_texts["n2d_reverse"]
    assert Counter(found["rows"]) == {"reverse": 8, "both": 4}
    written = json.loads(evaluator.folder.evaluation_file(5).read_text())
    assert written["training_texts"]["n2d_reverse"]["scores"] == json.loads(json.dumps(found["scores"]))
    score = found["scores"]["both"]["metrics"]["contains"]
    assert scalars(result)["evaluation/n2d_reverse/both/contains"] == score
    assert list(evaluator.messages(result, step=3, total_steps=5)) == [], "between the first and the last"
    answered, message = evaluator.messages(result, step=5, total_steps=5)
    assert answered.startswith("questions that the training texts answer already, in the order asked: ")
    assert "4 of 12 of n2d_reverse" in answered
    assert f"both {score:.3f} (4 prompts)" in message


def test_a_run_on_too_many_tokens_says_that_it_did_not_search_them(world, evaluator, monkeypatch):
    monkeypatch.setattr("bico_ds.training.evaluator.SEARCHED_TOKENS", 100)
    result = evaluator(_model(world / "facts" / "tokenizer"), 5)
    assert result is not None and not result.training_texts
    (message,) = evaluator.messages(result, step=5, total_steps=5)
    assert message.startswith("the training texts have more than 100 tokens per rank and were not searched")
