"""tools/evaluate.py as a user runs it: on a folder, interrupted, on two ranks, and wrongly."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import GenerationConfig

from bico_ds.commands.evaluate import main
from bico_ds.common.errors import UserError
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.evaluation.loading import load_for_evaluation
from bico_ds.evaluation.request.asked import Request
from bico_ds.evaluation.request.run import run_request
from bico_ds.evaluation.results import load_result
from bico_ds.evaluation.scoring.share import PromptShare
from tests import ROOT


@pytest.fixture(scope="module")
def world(tiny_llama, tokenizer, tmp_path_factory) -> Path:
    """A folder with a model, two of the four tasks, and a running text."""
    folder = tmp_path_factory.mktemp("world")
    tiny_llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    records = [
        {"prompt": f"w{i} w{i + 1}", "completion": f" w{(3 * i) % 40}", "group": f"p{i // 2}"}
        for i in range(9)
    ]
    for name in ("p2d_prompts_test", "p2d_reverse_prompts_test"):
        (folder / "data" / f"{name}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
    (folder / "text.txt").write_text(" ".join(f"w{(7 * i) % 40}" for i in range(60)))
    return folder


def _request(world: Path, output: Path, **changes) -> Request:
    values = {
        "model": world / "model",
        "output": output,
        "data": world / "data",
        "tasks": ("n2d", "n2d_reverse"),
        "retention": (world / "text.txt",),
        "base": world / "model",
        "likelihood": True,
        "max_new_tokens": 6,
        "window": 16,
        "others": 3,
    }
    return Request(**(values | changes))


def _run(request: Request, should_stop=lambda: False, out: io.StringIO | None = None) -> bool:
    share = PromptShare(batch_size=4, should_stop=should_stop)
    return run_request(request, share, Console(file=out or io.StringIO(), width=120))


def _shown(request: Request) -> str:
    """What the command prints after its progress lines."""
    out = io.StringIO()
    assert _run(request, out=out)
    return "\n".join(line for line in out.getvalue().splitlines() if not line.endswith("…"))


def _copy_of_model(world: Path, folder: Path) -> Path:
    return shutil.copytree(world / "model", folder)


def test_an_interrupted_evaluation_goes_on_where_it_was_and_ends_the_same(world, tmp_path):
    uninterrupted, parted = tmp_path / "uninterrupted.json", tmp_path / "parted.json"
    assert _run(_request(world, uninterrupted))
    polls = iter(range(10**6))
    assert not _run(_request(world, parted), should_stop=lambda: next(polls) > 25)
    half = json.loads(parted.read_text())
    assert 0 < len(half["identities"]) < len(json.loads(uninterrupted.read_text())["identities"])
    half["tasks"]["n2d"]["new_tokens"] = -1  # a mark: what is there is not computed again
    parted.write_text(json.dumps(half))
    assert _run(_request(world, parted))
    ended, expected = json.loads(parted.read_text()), json.loads(uninterrupted.read_text())
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
        _run(_request(world, output, **small, model=tmp_path / "other"))


def test_the_parts_of_a_file_keep_their_identities_in_later_versions(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)  # a task's path is part of its identity
    output = tmp_path / "result.json"
    assert _run(_request(world, output, data=Path("data"), tasks=("n2d",), retention=(), base=None))
    assert json.loads(output.read_text())["identities"] == {
        "tasks/n2d": "7bc1ca4d7e2b54c3",
        "choice/n2d": "73d5701dac3b9f24",
    }


def test_answers_that_an_earlier_version_scored_are_scored_again_without_the_model(world, tmp_path):
    output = tmp_path / "result.json"
    small = {"likelihood": False, "retention": (), "base": None, "tasks": ("n2d",)}
    assert _run(_request(world, output, **small))
    old = json.loads(output.read_text())
    right = {row["line"]: row["answer"] for row in old["tasks"]["n2d"]["rows"]}
    del old["tasks"]["n2d"]["scoring"]
    for row in old["tasks"]["n2d"]["rows"]:  # no model says this: what is there was not generated again
        row["prediction"] = f"\u200b{right[row['line']].upper()}。"
    output.write_text(json.dumps(old))
    assert _run(_request(world, output, **small))
    new = load_result(output).tasks["n2d"]
    assert new.scoring == 2
    assert new.metrics == {"contains": 1.0, "prefix": 1.0, "exact": 1.0}
    assert new.new_tokens == old["tasks"]["n2d"]["new_tokens"]


def test_a_new_tokenizer_is_another_model(world, tmp_path):
    model, output = _copy_of_model(world, tmp_path / "model"), tmp_path / "result.json"
    small = {"model": model, "likelihood": False, "retention": (), "base": None, "tasks": ("n2d",)}
    assert _run(_request(world, output, **small))
    settings = model / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(UserError, match="other weights or another tokenizer"):
        _run(_request(world, output, **small))


def test_only_what_this_command_asks_is_shown_with_its_number_of_prompts(world, tmp_path):
    output = tmp_path / "result.json"
    small = {"likelihood": False, "retention": (), "base": None}
    assert _run(_request(world, output, **small, tasks=("n2d",), limit=4))
    shown = _shown(_request(world, output, **small, tasks=("n2d_reverse",)))
    assert re.search(r"n2d_reverse .* 9 │", shown)
    assert not re.search(r"n2d  ", shown)
    assert set(json.loads(output.read_text())["tasks"]) == {"n2d", "n2d_reverse"}


def test_perplexities_of_other_texts_or_windows_never_stand_side_by_side(world, tmp_path):
    text, output = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text((world / "text.txt").read_text())
    only = {"data": None, "tasks": (), "likelihood": False, "retention": (text,)}
    row = lambda **changes: re.search(  # noqa: E731
        r"text.txt +│(.*)│", _shown(_request(world, output, **only, **changes))
    )[1]
    assert "–" not in row()
    assert "–" not in row(base=None), "the base's figure of before, for the same text and window"
    assert row(base=None, window=8).count("–") == 2
    assert "–" not in row(base=None)
    text.write_text(text.read_text() + " w3")
    assert row(base=None).count("–") == 2


def test_a_window_is_no_longer_than_either_context_and_the_result_says_so(world, tmp_path):
    small = _copy_of_model(world, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 24}))
    only = {"data": None, "tasks": (), "likelihood": False}
    assert _run(_request(world, tmp_path / "r.json", **only, window=1000, base=small))
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["retention"]["text.txt"]["window"] == result["retention_before"]["text.txt"]["window"] == 24


def test_several_models_get_a_result_file_each_and_blends_are_named_by_their_run(
    world, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for share in ("0.50", "1.00"):
        _copy_of_model(world, tmp_path / "mine" / f"blend-{share}")
    asked = ["--model", "mine/blend-0.50", "mine/blend-1.00", "--retention", str(world / "text.txt")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *asked])
    assert main() == 0
    files = sorted((tmp_path / "runs" / "evaluation").iterdir())
    assert [file.name for file in files] == ["mine-blend-0.50.json", "mine-blend-1.00.json"]
    assert all("text.txt" in json.loads(file.read_text())["retention"] for file in files)


def test_of_several_models_a_missing_one_is_refused_before_the_first_is_asked(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    asked = ["--model", str(world / "model"), "nowhere/x/y", "--retention", str(world / "text.txt")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *asked])
    assert main() == 2
    assert "nowhere/x/y: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


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
        cwd=ROOT,
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
        ({"base": Path("nowhere")}, r"^--base nowhere: no such folder"),
        ({"window": 1}, r"--window 1: a window needs two tokens"),
        ({"output": Path("."), "likelihood": False}, r"--output \.: is a folder; name a file in it"),
        ({"output": Path(__file__) / "x.json"}, r"--output .*x.json: no result file can be kept there"),
        ({"output": Path("/proc/x.json")}, r"--output /proc/x.json: no result file can be kept there"),
        ({"output": Path(__file__)}, r"--output .*: is there already and no result file"),
    ],
)
def test_bad_input_is_named(world, tmp_path, changes, message):
    if "model" in changes:
        changes = {"model": Path(changes["model"].format(world=world))}
    with pytest.raises(UserError, match=message):
        _run(_request(world, **({"output": tmp_path / "result.json"} | changes)))


def test_texts_of_one_name_are_refused(world, tmp_path):
    other = tmp_path / "text.txt"
    other.write_text("w1 w2")
    with pytest.raises(UserError, match=rf"--retention {other}: another text is named text.txt too"):
        _run(_request(world, tmp_path / "r.json", retention=(world / "text.txt", other)))


def test_all_inputs_are_checked_before_anything_is_computed(world, tmp_path):
    output = tmp_path / "result.json"
    base = _copy_of_model(world, tmp_path / "base")
    (base / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"--base .*: no tokenizer in"):
        _run(_request(world, output, base=base))
    long = {"prompt": "w1", "completion": " w2" * 70, "group": "x"}
    short = {"prompt": "w1", "completion": " w3", "group": "y"}
    (tmp_path / "p2d_prompts_test.jsonl").write_text(f"{json.dumps(short)}\n{json.dumps(long)}\n")
    with pytest.raises(UserError, match=r"test.jsonl:1: prompt and answer have 72 tokens, .* context of 64"):
        _run(_request(world, output, data=tmp_path, tasks=("n2d",)))
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "d", "--tasks", ","], "--tasks names no task"),
        (["--pairs", "p", "--tasks", "n2d"], "give --data too"),
        (["--data", "d", "--base", "b"], "give --retention too"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        main(["--model", "m", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_without_tokenizer_or_with_weights_missing_is_refused(tmp_path, tiny_llama, tokenizer):
    from safetensors.torch import load_file, save_file

    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer in"):
        load_for_evaluation(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing keys, the first is model.layers.1.mlp.up_proj.weight"):
        load_for_evaluation(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        load_for_evaluation(tmp_path)


def test_a_mistake_ends_with_one_message_and_code_2(world, tmp_path):
    command = [sys.executable, "tools/evaluate.py", "--model", "nowhere/x/y", "--data", str(world / "data")]
    done = subprocess.run([*command, "--tasks", "n2d"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: --model nowhere/x/y: no such folder\n"


@pytest.mark.parametrize("add_bos", [True, False])
def test_prompts_begin_as_the_tokenizer_of_an_export_begins_texts(world, tmp_path, tokenizer, add_bos):
    model = _copy_of_model(world, tmp_path / "model")
    ExportedTokenizer(tokenizer, add_bos).save_pretrained(model)
    assert _request(world, tmp_path / "a.json", model=model).add_bos is add_bos
    for bos in (True, False):
        assert _request(world, tmp_path / "a.json", model=model, bos=bos).add_bos is bos
    small = {"model": model, "likelihood": False, "retention": (), "base": None, "tasks": ("n2d",)}
    shown = _shown(_request(world, tmp_path / "own.json", **small))
    begins = "begin with BOS <s>" if add_bos else "begin without BOS"
    assert f"prompts {begins}; answers end at </s>" in shown and "note:" not in shown
    shown = _shown(_request(world, tmp_path / "other.json", **small, bos=not add_bos))
    assert f"note: its tokenizer adds {'it' if add_bos else 'none'}" in shown


def test_a_model_whose_folder_says_nothing_of_bos_is_asked_with_it_as_ever(world, tmp_path):
    assert _request(world, tmp_path / "a.json").add_bos is True


def test_stops_and_settings_that_other_programs_heed_are_named(world, tmp_path):
    model = _copy_of_model(world, tmp_path / "model")
    GenerationConfig(eos_token_id=5, repetition_penalty=1.2).save_pretrained(model)
    small = {"model": model, "likelihood": False, "retention": (), "base": None, "tasks": ("n2d",)}
    shown = _shown(_request(world, tmp_path / "a.json", **small))
    assert "answers end at w2" in shown
    assert "note: its generation config does not stop at the tokenizer's EOS </s>" in shown
    assert "note: its generation config has repetition_penalty 1.2" in shown


def test_other_stop_tokens_are_computed_anew(world, tmp_path):
    model, output = _copy_of_model(world, tmp_path / "model"), tmp_path / "a.json"
    small = {"model": model, "likelihood": False, "retention": (), "base": None, "tasks": ("n2d",)}
    assert _run(_request(world, output, **small))
    before = json.loads(output.read_text())["identities"]
    GenerationConfig(eos_token_id=[2, 5]).save_pretrained(model)
    assert _run(_request(world, output, **small))
    assert json.loads(output.read_text())["identities"] != before
