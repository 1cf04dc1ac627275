"""The store of sampled texts: the same whoever samples it and however often that is interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from bico_ds.commands.prepare.command import main
from bico_ds.common.errors import UserError
from bico_ds.data.replay.sampled_store import SampleShare, SampleSpec, sample_store, start_token
from bico_ds.data.replay.sampling import sample_texts
from bico_ds.data.store import TokenStore
from tests import ROOT

CPU = torch.device("cpu")
BOS, EOS = 1, 2
SPEC = SampleSpec(tokens=300, most_tokens=9, seed=11, start=BOS, stops=(EOS,), model="tiny")


@pytest.fixture
def sample(tmp_path, tiny_llama, tokenizer):
    """`sample("name", spec, load=…)`: the store, and the report."""

    def run(name: str, spec: SampleSpec = SPEC, load=lambda: tiny_llama, batch_size: int = 8):
        share = SampleShare(device=CPU, batch_size=batch_size, progress=False)
        report = sample_store(load, tokenizer, spec, tmp_path / name, share, provenance="source: here\n")
        return TokenStore.open(tmp_path / name, verify="checksums"), report

    return run


def _texts(store: TokenStore) -> list[list[int]]:
    return [list(map(int, document.token_ids)) for document in store.whole(np.arange(len(store)))]


def _columns(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.bin"))}


def test_a_store_holds_the_different_texts_in_order_and_counts_the_others(sample, tiny_llama):
    """Two new tokens: texts repeat, and some end at once."""
    spec = SampleSpec(tokens=250, most_tokens=3, seed=5, start=BOS, stops=(EOS, 9), model="tiny")
    store, report = sample("s", spec)
    drawn = sample_texts(
        tiny_llama, np.arange(2_000), seed=5, start=BOS, stops=(EOS, 9), most_tokens=3, device=CPU
    )
    expected: list[list[int]] = []
    empty = repeated = 0
    for text in drawn:
        if sum(map(len, expected)) >= 250:
            break
        if text[1:] in ([EOS], [9]):
            empty += 1
        elif text in expected:
            repeated += 1
        else:
            expected.append(text)
    assert empty and repeated
    assert _texts(store) == expected
    assert (report.texts, report.tokens, report.empty, report.repeated) == (
        len(expected), sum(map(len, expected)), empty, repeated,
    )  # fmt: skip
    assert report.ended == sum(text[-1] in (EOS, 9) for text in expected)


def test_the_store_is_an_ordinary_one_of_the_models_tokenizer(sample, tokenizer):
    store, _ = sample("s")
    store.check_tokenizer(tokenizer)
    assert store.manifest.add_bos and not store.manifest.add_eos
    assert (store.path / "provenance.txt").read_text() == "source: here\n"
    assert all(text[-1] == EOS or len(text) == 9 for text in _texts(store))


def test_after_an_interruption_the_same_store_comes_out_and_no_shard_is_sampled_twice(
    sample, tmp_path, tiny_llama
):
    sample("whole")

    def counted(limit: int):
        calls = []

        def forward(**inputs):
            calls.append(inputs["input_ids"].shape[1])
            if len(calls) > limit:
                raise KeyboardInterrupt
            return tiny_llama(**inputs)

        return calls, forward

    all_calls, forward = counted(10**9)
    sample("counted", load=lambda: forward)
    limit = len(all_calls) // 2
    _, stopped = counted(limit)
    with pytest.raises(KeyboardInterrupt):
        sample("s", load=lambda: stopped)
    assert not (tmp_path / "s").exists()
    rest, forward = counted(10**9)
    sample("s", load=lambda: forward)
    assert _columns(tmp_path / "s") == _columns(tmp_path / "whole")
    assert len(all_calls) - limit <= len(rest) < len(all_calls) - limit + 9
    assert not (tmp_path / ".s.preparing").exists()


@pytest.mark.parametrize("change", [{"seed": 12}, {"most_tokens": 8}, {"model": "other"}, {"batch_size": 4}])
def test_shards_of_another_call_are_not_taken(sample, tmp_path, tiny_llama, change):
    calls = []

    def forward(**inputs):
        calls.append(0)
        if len(calls) > 16:
            raise KeyboardInterrupt
        return tiny_llama(**inputs)

    with pytest.raises(KeyboardInterrupt):
        sample("s", load=lambda: forward)
    batch_size = change.pop("batch_size", 8)
    spec = SampleSpec(**{**SPEC.__dict__, **change})
    sample("s", spec, batch_size=batch_size)
    sample("whole", spec, batch_size=batch_size)
    assert _columns(tmp_path / "s") == _columns(tmp_path / "whole")


def test_a_model_that_repeats_itself_is_an_error_and_not_an_endless_loop(sample):
    with pytest.raises(UserError, match="no more than [0-9,]+ tokens of different texts"):
        sample(
            "s",
            SampleSpec(tokens=10**6, most_tokens=2, seed=1, start=BOS, stops=(), model="tiny"),
            batch_size=256,
        )


def test_texts_begin_with_bos_else_eos_or_with_the_token_that_was_asked_for(tokenizer):
    assert [start_token(tokenizer, asked) for asked in ("auto", "bos", "eos", "w3")] == [BOS, BOS, EOS, 6]
    with pytest.raises(UserError, match="--separator w99: the tokenizer has no such token"):
        start_token(tokenizer, "w99")


@pytest.fixture
def model(tmp_path, tiny_llama, tokenizer) -> str:
    tiny_llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_writes_a_store_with_source_and_licence(model, tmp_path, capsys):
    words = ["replay", "--model", model, "--tokens", "300", "--max-length", "12", "--batch-size", "16"]
    assert main([*words, "--output", str(tmp_path / "s"), "--licence", "Apache 2.0"]) == 0
    assert "texts, 3" in capsys.readouterr().out
    assert main(["--inspect", str(tmp_path / "s")]) == 0
    shown = capsys.readouterr().out
    assert f"source: sampled from {model}, seed 1\nlicence: Apache 2.0\n" in shown
    assert main([*words, "--output", str(tmp_path / "s")]) == 2
    assert "exists: choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--max-length", "65"), "the model's context is 64"),
        (("--max-length", "1"), "needs a token after its first"),
        (("--separator", "<pad>"), "--separator <pad>: the tokenizer has no such token"),
        (("--model", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_weights_are_loaded(
    model, tmp_path, capsys, option, message
):
    words = ["replay", "--model", model, "--tokens", "300", "--max-length", "12"]
    assert main([*words, "--output", str(tmp_path / "s"), *option]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "s").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_that_were_killed_write_the_store_that_one_process_writes(model, tmp_path):
    words = ["replay", "--model", model, "--tokens", "4000", "--max-length", "12", "--batch-size", "16"]
    assert main([*words, "--output", str(tmp_path / "alone")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "bico_ds", "prepare", *words, "--output", str(tmp_path / "two")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as first:
        while not list(tmp_path.glob(".two.preparing/part-*.npz")):
            assert first.poll() is None
            time.sleep(0.01)
        for process in psutil.Process(first.pid).children(recursive=True):  # torchrun's ranks outlive it
            process.kill()
        first.kill()
    assert not (tmp_path / "two").exists()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("texts, 4,0") == 1
    assert _columns(tmp_path / "two") == _columns(tmp_path / "alone")
