"""What tools/inspect_batch.py shows is what the objective was given."""

from __future__ import annotations

import importlib.util
import io
import sys

import numpy as np
import pytest
from rich.console import Console

from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.data.loading.inspect_batch import plot_visibility, print_batch, view_batch, visibility
from bico_ds.data.loading.loader import RankShare
from bico_ds.documents import Document, Documents
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.masks import TokenGrid
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.training import assembly
from tests import ROOT

HALF = BicoSpec(mask=MaskSpec(rate=0.5))


@pytest.fixture
def documents() -> Documents:
    rng = np.random.default_rng(0)
    return Documents.of(
        [Document(token_ids=rng.integers(10, 99, n), source=0, id=i) for i, n in enumerate((9, 1, 20, 5))]
    )


def test_the_view_gives_back_every_token_with_its_state(documents):
    objective, key = MaskDenoising(spec=HALF, placeholder_id=0), BatchKey(seed=1, epoch=0)
    views = view_batch(objective.build(documents, key))
    masked = np.split(objective.policy.draw(documents, TokenGrid.of(documents), key), documents.offsets[1:-1])
    for document, view, hidden in zip(documents, views, masked, strict=True):
        tokens = document.token_ids.tolist()
        assert [token.token for token in view.tokens] == tokens
        follows = [*hidden[1:], False]
        states = ["kept" if not m else "live" if n else "dead" for m, n in zip(hidden, follows, strict=True)]
        assert [token.state for token in view.tokens] == states
        assert [token.predicts for token in view.tokens] == [
            tokens[i + 1] if follows[i] else None for i in range(len(tokens))
        ]
        seen = visibility(view, "bidirectional")
        for query in range(len(tokens)):
            for place in range(len(tokens)):
                expected = 0 if hidden[place] else 1 if place <= query else 2
                assert seen[query, place] == (-1 if states[query] == "dead" else expected)


def test_ntp_views_are_causal(documents):
    batch = NextTokenPrediction(spec=NtpSpec()).build(documents, BatchKey(seed=1, epoch=0))
    for view in view_batch(batch):
        assert {token.state for token in view.tokens} == {"kept"}
        assert np.array_equal(visibility(view, "causal"), np.tri(len(view.tokens)))


def test_it_prints_and_draws(documents, tmp_path):
    batch = MaskDenoising(spec=HALF, placeholder_id=0).build(documents, BatchKey(seed=1, epoch=0))
    out = io.StringIO()
    print_batch(
        Console(file=out, width=160),
        batch,
        lambda token: f"t{token}",
        source_names=["books"],
        taken=35,
        room=40,
        most_documents=3,
        most_tokens=8,
    )
    text = out.getvalue()
    assert "35 of 40 tokens (fill 87.5%)" in text
    assert "books #2" in text
    assert "12 more tokens" in text
    assert "1 more documents" in text
    plot_visibility(
        view_batch(batch)[0], "bidirectional", lambda token: f"${token}", tmp_path / "a" / "v.png"
    )
    assert (tmp_path / "a" / "v.png").stat().st_size > 5000


def test_a_name_with_brackets_is_shown_as_it_is(documents):
    batch = NextTokenPrediction(spec=NtpSpec()).build(documents, BatchKey(seed=1, epoch=0))
    out = io.StringIO()
    print_batch(
        Console(file=out, width=160), batch, str,
        source_names=["[bold]books[/]"], taken=35, room=40, most_documents=1, most_tokens=1,
    )  # fmt: skip
    assert "[bold]books[/] #0" in out.getvalue()


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """`tool("--step", "3")`: exit code, output and errors of tools/inspect_batch.py on tiny_bico."""
    spec = importlib.util.spec_from_file_location("inspect_batch", ROOT / "tools" / "inspect_batch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> tuple[int, str, str]:
        command = ["inspect_batch.py", "--recipe", "tiny_bico", "--set", f"data.cache_dir={tmp_path}/cache"]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        try:
            code = module.main()
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
    code, _, said = tool("--objective", "bicco")
    assert code == 2
    assert "did you mean 'bico'" in said


@pytest.mark.parametrize(
    ("step", "rank", "ranks", "number"), [(0, 0, 1, 0), (5, 1, 2, 2), (5, 0, 2, 2), (4, 3, 4, 1)]
)
def test_the_tool_shows_the_micro_batch_that_this_rank_trains_on_in_this_step(
    tool, tmp_path, step, rank, ranks, number
):
    bins = ["training.global_batch_bins=8", "training.micro_batch_bins=1"]
    place = {
        "step": step,
        "rank": rank,
        "world-size": ranks,
        "micro-batch": number,
        "documents": 999,
        "tokens": 1,
    }
    options = [word for key, value in place.items() for word in (f"--{key}", str(value))]
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
        (["--world-size", "0"], "--world-size: must be at least 1, found 0"),
        (["--rank", "2", "--world-size", "2"], "--rank 2: ranks count from 0, and --world-size is 2"),
        (["--micro-batch", "99"], "--micro-batch 99: a step has"),
    ],
)
def test_the_tools_mistakes_are_named(tool, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, said = tool(*arguments)
    assert code == 2
    assert message in said


def test_documents_of_one_token_have_no_picture(tool, tmp_path):
    (tmp_path / "ones.jsonl").write_text('{"text": "|"}\n')
    source = f"data.sources=[{{files: [{tmp_path}/ones.jsonl], add_bos: false, add_eos: false}}]"
    tokenizer = (
        assembly.facts_folder(load_recipe("tiny_bico", [f"data.cache_dir={tmp_path}/cache"]).data)
        / "tokenizer"
    )
    code, _, said = tool(
        "--set", source, "--set", f"model.tokenizer={tokenizer}", "--set", "evaluation.tasks=[]",
        "--set", "objectives=[{kind: ntp}]", "--png", str(tmp_path / "v.png"),
    )  # fmt: skip
    assert code == 2
    assert "--png: no document of the batch has two tokens" in said
