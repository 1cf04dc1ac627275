"""The command `prepare`: exit codes, reports and inspection, and that it never loses what its user has."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bico_ds.commands.prepare.command import main
from bico_ds.commands.prepare.texts import _times
from bico_ds.data.prepare import ingest as ingest_module
from bico_ds.data.prepare.ingest import IngestFailure
from tests import ROOT
from tests.data.prepare.ingesting import ingest_files


@pytest.fixture
def command(tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch):
    """`command("files", "a.jsonl", "--output", "s")` in `tmp_path`, which holds a.jsonl: exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')

    def run(*arguments: str) -> int:
        tokenized = arguments[0] in ("files", "hub")
        return main([*arguments, *(("--tokenizer", bpe_tokenizer, "--processes", "1") if tokenized else ())])

    return run


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("words", [("files", "a.jsonl"), ("files", "precious"), ("facts",)])
@pytest.mark.parametrize("output", ["precious", "precious/b.jsonl", "."])
def test_force_replaces_nothing_that_the_command_did_not_write(command, tmp_path, capsys, words, output):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "b.jsonl").write_text('{"text": "three"}\n')
    before = _names(tmp_path)
    assert command(*words, "--output", output, "--force") == 2
    assert "was not written by this command, and --force replaces nothing else" in capsys.readouterr().err
    assert _names(tmp_path) == before


def test_force_never_replaces_a_store_that_holds_the_input(command, tmp_path, capsys):
    assert command("files", "a.jsonl", "--output", "s") == 0
    (tmp_path / "a.jsonl").rename(tmp_path / "s" / "a.jsonl")
    assert command("files", "s/a.jsonl", "--output", "s", "--force") == 2
    assert "'s/a.jsonl', which --force would remove" in capsys.readouterr().err
    assert (tmp_path / "s" / "a.jsonl").is_file()


def test_force_replaces_stores_facts_and_empty_folders_through_links_and_dots(command, tmp_path, monkeypatch):
    for words in (("files", str(tmp_path / "a.jsonl")), ("facts", "--both", "3")):
        (tmp_path / words[0] / "at").mkdir(parents=True)
        (tmp_path / f"{words[0]}_link").symlink_to(tmp_path / words[0] / "at")
        for output in (f"{words[0]}/at", f"{words[0]}/at", f"{words[0]}_link"):
            assert command(*words, "--output", output, "--force") == 0
        monkeypatch.chdir(tmp_path / words[0] / "at")
        assert command(*words, "--output", ".", "--force") == 0
        monkeypatch.chdir(tmp_path)
        assert [path.name for path in (tmp_path / words[0]).iterdir()] == ["at"]


def test_what_is_passed_over_is_counted_and_named(command, tmp_path, capsys):
    assert command("files", "a.jsonl", "--output", "in/deep/store") == 0
    for name in ("b.jsonl", "c.csv", "d.txt.bz2", "deep/e.txt", ".hidden/f.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text('{"text": "three"}\n')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "broken.jsonl").symlink_to("nowhere")
    capsys.readouterr()
    for given in ("in", "i*"):
        assert command("files", given, "--output", "s", "--force") == 0
        shown = capsys.readouterr()
        assert "documents    2\n" in shown.out
        for line in (
            "1 (hidden): .hidden",
            "1 (link to a folder): link",
            "1 (no file): broken.jsonl",
            "1 (token store): store",
            "2 (unknown ending): c.csv, d.txt.bz2",
        ):
            assert f"passed over  {line}\n" in shown.out
            assert f"passed over: {line}\n" in shown.err
    assert (tmp_path / "s" / "report.txt").read_text() in shown.out


def test_patterns_reach_into_folders_but_never_into_stores(command, tmp_path, capsys):
    assert command("files", "a.jsonl", "--output", "in/store") == 0
    (tmp_path / "in" / "deep").mkdir()
    for name in ("b.jsonl", "deep/c.jsonl", "store/skipped.jsonl"):
        (tmp_path / "in" / name).write_text('{"text": "three"}\n')
    (tmp_path / "in" / "broken.jsonl").symlink_to("nowhere")
    capsys.readouterr()
    for given in ("in/*", "in/**/*.jsonl", "in/**"):
        assert command("files", given, "--output", "s", "--force") == 0
        shown = capsys.readouterr().out
        assert "documents    2\n" in shown
        assert "passed over  1 (no file): broken.jsonl\npassed over  1 (token store): store\n" in shown
    assert command("files", "in/store", "--output", "s", "--force") == 2
    assert "'in/store' has no input files" in (shown := capsys.readouterr().err)
    assert "passed over: in/store (token store)" in shown


@pytest.mark.parametrize("size", ["0", "-3"])
def test_a_vocabulary_has_at_least_one_id(command, capsys, size):
    with pytest.raises(SystemExit) as caught:
        command("files", "a.jsonl", "--output", "s", "--vocab-size", size)
    assert caught.value.code == 2
    assert f"must be at least 1, found {size}" in capsys.readouterr().err


def test_a_vocabulary_without_an_id_that_is_added_is_refused(command, tmp_path, capsys):
    small = ("files", "a.jsonl", "--output", "s", "--vocab-size", "1")
    assert command(*small) == 2
    assert "has EOS at id 1; give a larger one, or --no-eos" in capsys.readouterr().err
    assert command(*small, "--no-eos") == 2
    assert "a.jsonl:1: token id past the vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("words", [("files", "a.jsonl"), ("facts",)])
@pytest.mark.parametrize("output", ["a.jsonl/x", "/proc/nope"])
def test_an_output_that_cannot_be_made_is_named(command, tmp_path, capsys, words, output):
    assert command(*words, "--output", output) == 2
    assert f"cannot write to '{(tmp_path / output).parent}'" in capsys.readouterr().err
    assert _names(tmp_path) == ["a.jsonl"]


def test_a_store_without_its_tokenizer_is_shown_with_another_and_never_looked_for_on_the_hub(
    command, tmp_path, bpe_tokenizer, word_tokenizer, capsys
):
    assert command("files", "a.jsonl", "--output", "s") == 0
    shutil.rmtree(tmp_path / "s" / "tokenizer")
    assert command("--inspect", "s") == 2
    assert "store 's' does not hold its tokenizer" in capsys.readouterr().err
    assert command("--inspect", "s", "--tokenizer", word_tokenizer) == 2
    assert "made with another tokenizer" in capsys.readouterr().err
    assert command("--inspect", "s", "--tokenizer", bpe_tokenizer) == 0
    assert "'<s>one</s>'" in capsys.readouterr().out


@pytest.mark.parametrize("documents", [2, 3000])
def test_a_reader_that_has_seen_enough_is_no_failure(command, tmp_path, documents):
    (tmp_path / "a.jsonl").write_text('{"text": "one and more and more"}\n' * documents)
    assert command("files", "a.jsonl", "--output", "s") == 0
    arguments = ["--inspect", str(tmp_path / "s"), "--documents", *map(str, range(documents))]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "tools/prepare_data.py", *arguments],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_facts_then_their_store_then_its_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, store = str(tmp_path / "facts"), str(tmp_path / "store")
    persons = ["--both", "3", "--name-first", "2", "--description-first", "1"]
    assert main(["facts", "--output", facts, *persons]) == 0
    fields = ["--prompt-field", "prompt", "--completion-field", "completion", "--group-field", "group"]
    words = [
        "files",
        f"{facts}/all_train.jsonl",
        "--tokenizer",
        f"{facts}/tokenizer",
        "--output",
        store,
        *fields,
    ]
    assert main([*words, "--processes", "1"]) == 0
    shown = capsys.readouterr().out
    assert "documents    54" in shown
    assert (tmp_path / "store" / "lengths.png").stat().st_size > 1000
    assert main(["--inspect", store, "--documents", "0", "53", "--verify"]) == 0
    record = json.loads((tmp_path / "facts" / "all_train.jsonl").read_text().splitlines()[0])
    shown = capsys.readouterr().out
    assert f"'<s> {record['prompt']}'" in shown
    assert "document 53:" in shown
    assert main(["--inspect", store, "--documents", "54"]) == 2
    assert "has documents 0 to 53, not 54" in capsys.readouterr().err
    assert main(words) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["facts", "--output", facts]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a command (files, hub, facts, replay, teacher) or --inspect STORE"),
        (["files", "a.jsonl", "--output", "x"], "--tokenizer"),
        (["files", "a", "--output", "x", "--tokenizer", "t", "--processes", "0"], "must be at least 1"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_value_is_named_by_its_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["facts", "--output", str(tmp_path / "f"), "--test-prompts", "0"]) == 2
    assert "--test-prompts: must be at least 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    words = ["files", str(tmp_path / "a.jsonl"), "--tokenizer", "absent", "--output", str(tmp_path / "s")]
    done = subprocess.run(
        [sys.executable, "tools/prepare_data.py", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no tokenizer at 'absent'")


def test_a_store_keeps_where_its_texts_are_from_and_is_the_same_store_without(command, tmp_path, capsys):
    assert command("files", "a.jsonl", "--output", "plain") == 0
    assert command("files", "a.jsonl", "--output", "s", "--source", "a\nbook", "--licence", "CC0") == 0
    capsys.readouterr()
    assert main(["--inspect", "s"]) == 0
    assert "source: a book\nlicence: CC0\n" in capsys.readouterr().out
    assert (tmp_path / "s/manifest.json").read_bytes() == (tmp_path / "plain/manifest.json").read_bytes()
    assert main(["--inspect", "plain"]) == 0
    assert "licence" not in capsys.readouterr().out


def test_a_speed_is_that_of_tokenizing_alone_and_told_only_where_it_took_long_enough(
    command, tmp_path, capsys
):
    assert command("files", "a.jsonl", "--output", "s") == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("input: 0.0 MB in 1 file; starting to tokenize …\n")
    assert re.search(
        r"^s: [\d.]+ s, of which tokenizing took 0\.\d s \(too short to tell a speed\)$", shown.out, re.M
    )
    assert "tokens/s" not in shown.out + shown.err


@pytest.mark.parametrize("processes", [1, 2])
def test_the_time_of_tokenizing_is_counted_from_when_the_first_process_is_ready(
    tmp_path, bpe_tokenizer, processes
):
    files = []
    for number in range(2):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text('{"text": "one two three four"}\n' * 2000)
    started = time.monotonic()
    report = ingest_files(files, bpe_tokenizer, tmp_path / "s", processes=processes)
    assert report.tokenized == report.lengths.sum()
    assert 0 < report.seconds < time.monotonic() - started
    if processes > 1:  # they import for longer than these texts take
        assert report.seconds < 0.5 * (time.monotonic() - started)


def test_what_an_interrupted_run_tokenized_is_not_counted_again(tmp_path, bpe_tokenizer, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(ingest_module, "merge_parts", full)
    with pytest.raises(IngestFailure):
        ingest_files(tmp_path / "a.jsonl", bpe_tokenizer, tmp_path / "s")
    monkeypatch.undo()
    report = ingest_files(tmp_path / "a.jsonl", bpe_tokenizer, tmp_path / "s")
    assert report.tokenized == 0
    assert _times(report, 2.0) == "2.0 s; all shards were tokenized by an earlier run"
    timed = replace(report, tokenized=3000, seconds=1.5)
    assert _times(timed, 9.0) == "9.0 s, of which tokenizing took 1.5 s (2,000 tokens/s)"
