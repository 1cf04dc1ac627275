"""tools/evaluate.py as a user runs it: on a folder, interrupted, on two ranks, and wrongly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bico_ds.config.errors import UserError
from bico_ds.evaluation.command import Place, Request, run_request
from bico_ds.evaluation.generation import Ranks
from bico_ds.evaluation.loading import load_for_evaluation
from bico_ds.evaluation.suite import load_result

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tiny_llama, tokenizer, tmp_path_factory) -> Path:
    """A folder with a model, two of the four tasks, and a running text."""
    folder = tmp_path_factory.mktemp("world")
    tiny_llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    rows = [
        {"prompt": f"w{i} w{i + 1}", "completion": f" w{(3 * i) % 40}", "group": f"p{i // 2}"}
        for i in range(9)
    ]
    for name in ("p2d_prompts_test", "p2d_reverse_prompts_test"):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text(" ".join(f"w{(7 * i) % 40}" for i in range(60)))
    return folder


def _request(world: Path, output: Path, **changes) -> Request:
    values = {
        "model": str(world / "model"),
        "output": output,
        "data": world / "data",
        "tasks": ("n2d", "n2d_reverse"),
        "retention": (world / "text.txt",),
        "base": str(world / "model"),
        "likelihood": True,
        "batch_size": 4,
        "max_new_tokens": 6,
        "window": 16,
        "others": 3,
    }
    return Request(**(values | changes))


def _run(request: Request, should_stop=lambda: False) -> bool:
    place = Place(ranks=Ranks(), device=torch.device("cpu"), should_stop=should_stop)
    return run_request(request, place, Console(file=open(os.devnull, "w")))


def test_an_interrupted_evaluation_goes_on_where_it_was_and_ends_the_same(world, tmp_path):
    whole, parted = tmp_path / "whole.json", tmp_path / "parted.json"
    assert _run(_request(world, whole))
    polls = iter(range(10**6))
    assert not _run(_request(world, parted), should_stop=lambda: next(polls) > 25)
    half = json.loads(parted.read_text())
    assert 0 < len(half["identities"]) < len(json.loads(whole.read_text())["identities"])
    half["tasks"]["n2d"]["new_tokens"] = -1  # a mark: what is there is not computed again
    parted.write_text(json.dumps(half))
    assert _run(_request(world, parted))
    ended, expected = json.loads(parted.read_text()), json.loads(whole.read_text())
    assert ended["tasks"]["n2d"].pop("new_tokens") == -1
    assert expected["tasks"]["n2d"].pop("new_tokens") == 6
    assert ended == expected
    assert expected["retention"] == expected["retention_before"]


def test_other_options_are_computed_anew_and_other_weights_refused(world, tmp_path, tiny_llama, tokenizer):
    output = tmp_path / "result.json"
    small = {"likelihood": False, "retention": (), "tasks": ("n2d",)}
    assert _run(_request(world, output, **small))
    assert _run(_request(world, output, **small, max_new_tokens=3))
    assert load_result(output).tasks["n2d"].new_tokens == 3
    tiny_llama.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"holds results of other weights .*model"):
        _run(_request(world, output, **small, model=str(tmp_path / "other")))


@pytest.mark.distributed
def test_two_ranks_write_the_file_of_one(world, tmp_path):
    assert _run(_request(world, tmp_path / "one.json"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "tools/evaluate.py", "--model", world / "model", "--data", world / "data",
        "--tasks", "n2d,n2d_reverse", "--likelihood", "--retention", world / "text.txt",
        "--base", world / "model", "--batch-size", "4", "--max-new-tokens", "6", "--window", "16",
        "--others", "3", "--output", tmp_path / "two.json",
    ]  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["tasks"] == one["tasks"]
    assert two["retention"]["text.txt"]["perplexity"] == pytest.approx(
        one["retention"]["text.txt"]["perplexity"]
    )
    for task, values in one["choice"].items():
        assert two["choice"][task]["difference"] == pytest.approx(values["difference"], abs=1e-4)
        assert two["choice"][task]["rank"] == values["rank"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("d2n",)}, r"d2p_prompts_test.jsonl: no such file"),
        ({"model": "{world}"}, r"no config.json in it; did you mean .*model\?"),
        ({"model": "{world}/nowhere"}, r"nowhere: no such folder"),
        ({"max_new_tokens": 63}, r"p2d_prompts_test.jsonl:1: the prompt has 3 tokens; with 63 new ones"),
        ({"retention": (Path("nowhere.txt"),)}, r"--retention nowhere.txt: cannot be read"),
    ],
)
def test_bad_input_is_named(world, tmp_path, changes, message):
    changes = {key: value.format(world=world) if key == "model" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        _run(_request(world, tmp_path / "result.json", **changes))


def test_a_model_without_tokenizer_or_with_weights_missing_is_refused(tmp_path, tiny_llama, tokenizer):
    from safetensors.torch import load_file, save_file

    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer in"):
        load_for_evaluation(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing keys, the first is model.layers.1.mlp.up_proj.weight"):
        load_for_evaluation(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        load_for_evaluation(str(tmp_path))


def test_a_mistake_ends_with_one_message_and_code_2(world, tmp_path):
    command = [sys.executable, "tools/evaluate.py", "--model", "nowhere/x/y", "--data", str(world / "data")]
    done = subprocess.run(
        [*command, "--tasks", "n2d"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == "error: --model nowhere/x/y: no such folder\n"
