"""`bico-ds inspect` shows the micro-batch that a rank trains on, and names its user's mistakes."""

from __future__ import annotations

import pytest

from bico_ds.commands.show.inspect_batch import main
from bico_ds.config.load import load_recipe
from bico_ds.data.loading.loader import RankShare
from bico_ds.training import assembly
from tests.cpu_time import cpu_seconds_below


@pytest.fixture
def tool(tmp_path, capsys):
    """`tool("--step", "3")`: exit code, output and errors of `bico-ds inspect` on tiny_bico."""

    def run(*arguments: str) -> tuple[int, str, str]:
        recipe = ["--recipe", "tiny_bico", "--set", f"data.cache_dir={tmp_path}/cache"]
        try:
            code = main([*recipe, *arguments])
        except SystemExit as caught:
            code = caught.code
        return code, *capsys.readouterr()

    return run


def test_the_tool_shows_a_step_of_a_recipe(tool, tmp_path):
    code, shown, _ = tool("--png", str(tmp_path / "v.png"), "--objective", "bico")
    assert code == 0
    assert "bidirectional:" in shown
    assert "dead ones dropped" in shown
    assert (tmp_path / "v.png").is_file()
    code, _, errors = tool("--objective", "bicco")
    assert code == 2
    assert "did you mean 'bico'" in errors


@pytest.mark.parametrize(
    ("step", "rank", "ranks", "number"), [(0, 0, 1, 0), (5, 1, 2, 2), (5, 0, 2, 2), (4, 3, 4, 1)]
)
def test_the_tool_shows_the_micro_batch_that_this_rank_trains_on_in_this_step(
    tool, tmp_path, step, rank, ranks, number
):
    bins = ["training.global_batch_bins=8", "training.micro_batch_bins=1"]
    values = {
        "step": step,
        "rank": rank,
        "world-size": ranks,
        "micro-batch": number,
        "documents": 999,
        "tokens": 1,
    }
    options = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    code, shown, _ = tool("--set", bins[0], "--set", bins[1], *options)
    assert code == 0
    recipe = load_recipe("tiny_bico", [f"data.cache_dir={tmp_path}/cache", "data.workers=0", *bins])
    inputs = assembly.open_inputs(recipe, weights_needed=False)
    batches = assembly.build_loader(recipe, inputs, RankShare(rank=rank, world_size=ranks)).step(step).batches
    assert f"step {step} of " in shown
    assert f"rank {rank} of {ranks}, micro-batch {number} of {len(batches)}" in shown
    titles = [int(word[1:]) for word in shown.split() if word.startswith("#")]
    assert sorted(titles) == sorted(batches[number].documents[:, 1].tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--png", "v.xyz"], "--png: 'v.xyz' must end in .png"),
        (["--png", "/proc/x/y.png"], "--png: cannot write '/proc/x/y.png'"),
        (["--documents", "-1"], "--documents: must be at least 0, found -1"),
        (["--step", "-1"], "--step: must be at least 0, found -1"),
        (["--step", str(10**12)], "--step: must be at most"),
        (["--step", "nan"], "--step: 'nan' is not an integer"),
        (["--step", str(2**31 - 1)], "--step 2147483647: the run has"),
        (["--world-size", str(2**31 - 1)], "training.global_batch_bins (4) must be a multiple of"),
        (["--world-size", "0"], "--world-size: must be at least 1, found 0"),
        (["--rank", "2", "--world-size", "2"], "--rank 2: ranks count from 0, and --world-size is 2"),
        (["--micro-batch", "99"], "--micro-batch 99: a step has"),
    ],
)
def test_the_tools_mistakes_are_named(tool, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = tool(*arguments)
    assert code == 2
    assert message in errors


FAR = [
    "training={steps: 1000000000}",
    "objectives=[{kind: ntp, probability: 0.9}, {kind: masked_ft, probability: 0.1}]",
]


@pytest.mark.parametrize(
    ("overrides", "step", "message"),
    [
        (
            FAR,
            999_999_999,
            "the objectives of all steps before it would have to be drawn; give at most 10000000",
        ),
        (
            [FAR[0], "data.sources.0.epochs=1.5"],
            999_999_999,
            "all data epochs before it would have to be mixed",
        ),
    ],
)
def test_a_step_that_would_not_be_found_in_seconds_is_refused(tool, overrides, step, message):
    options = [word for override in overrides for word in ("--set", override)]
    with cpu_seconds_below(20):
        code, _, errors = tool(*options, "--set", "training.epochs=null", "--step", str(step))
    assert code == 2
    assert message in errors


def test_an_objective_that_no_later_step_has_is_not_searched_without_end(tool):
    rare = "objectives=[{kind: ntp, probability: 0.999999999}, {kind: bico, probability: 1e-9}]"
    code, _, errors = tool("--set", rare, "--objective", "bico", "--step", "3")
    assert code == 2
    assert "--objective bico: none of the run's" in errors


def test_documents_of_one_token_have_no_picture(tool, tmp_path):
    (tmp_path / "ones.jsonl").write_text('{"text": "|"}\n')
    source = f"data.sources=[{{files: [{tmp_path}/ones.jsonl], add_bos: false, add_eos: false}}]"
    tokenizer = (
        assembly.facts_folder(load_recipe("tiny_bico", [f"data.cache_dir={tmp_path}/cache"]).data)
        / "tokenizer"
    )
    code, _, errors = tool(
        "--set", source, "--set", f"model.tokenizer={tokenizer}", "--set", "evaluation.tasks=[]",
        "--set", "objectives=[{kind: ntp}]", "--png", str(tmp_path / "v.png"),
    )  # fmt: skip
    assert code == 2
    assert "--png: no document of the batch has two tokens" in errors


def test_the_tool_shows_a_batch_without_a_target_and_then_why_training_would_refuse_it(tool, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n' * 3)
    facts = assembly.facts_folder(load_recipe("tiny_bico", [f"data.cache_dir={tmp_path}/cache"]).data)
    source = f"data.sources=[{{files: [{tmp_path}/texts.jsonl], add_bos: false, add_eos: false}}]"
    code, shown, errors = tool("--set", f"model.tokenizer={facts}/tokenizer", "--set", source)
    assert code == 2
    assert "0 predictions" in shown
    assert "source 'texts.jsonl': 3 of 3 documents have no target" in errors


def test_the_tool_counts_documents_without_a_target(tool, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n' * 3 + '{"text": ". . ."}\n')
    facts = assembly.facts_folder(load_recipe("tiny_bico", [f"data.cache_dir={tmp_path}/cache"]).data)
    source = f"data.sources=[{{files: [{tmp_path}/texts.jsonl], add_bos: false}}]"
    code, shown, _ = tool("--set", f"model.tokenizer={facts}/tokenizer", "--set", source)
    assert code == 0
    assert "warning: source 'texts.jsonl': 3 of 4 documents have no target for objectives[1] (bico)" in shown
