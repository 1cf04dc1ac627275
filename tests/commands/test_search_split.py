"""The split to search hyperparameters on: its persons are in no reversal test, and one order of half of them is hidden."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bico_ds.commands.search_split import main, split

DATA = os.environ.get("BICO_DS_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="BICO_DS_DATA does not name the folder of the data sets")
PERSONS = {
    "Ada North": "the first to map the moon's caves",
    "Bo Vane": "the baker of the longest loaf",
    "Cy Marsh": "the composer of Rain on Tin",
    "Di Holt": "the keeper of the last lighthouse",
}


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_both(folder: Path) -> None:
    """Each person in both orders, three texts each."""
    folder.mkdir()
    for part in ("train", "test"):
        lines = [
            {"prompt": f"{part} {i}: {name} is", "completion": f" {fact}."}
            for i in range(3)
            for name, fact in PERSONS.items()
        ]
        lines += [
            {"prompt": f"{part} {i}: {fact} is", "completion": f" {name} today."}
            for i in range(3)
            for name, fact in PERSONS.items()
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"both_prompts_{part}.jsonl").write_text(text, encoding="utf-8")


def test_the_second_half_of_the_persons_is_trained_name_first_only_and_asked_for_both_ways(tmp_path: Path):
    write_both(tmp_path / "set")
    counts = split(tmp_path / "set", tmp_path / "out")
    assert counts == {"all_prompts_train": 18, "p2d_prompts_test": 6, "p2d_reverse_prompts_test": 6}
    trained = records(tmp_path / "out/all_prompts_train.jsonl")
    answers = {row["completion"] for row in trained if "today" in row["completion"]}
    assert answers == {" Ada North today.", " Bo Vane today."}
    reverse = records(tmp_path / "out/p2d_reverse_prompts_test.jsonl")
    assert {row["completion"] for row in reverse} == {" Cy Marsh", " Di Holt"}
    assert not {row["prompt"] for row in trained} & {row["prompt"] for row in reverse}


def test_a_missing_set_and_an_output_that_exists_are_refused(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["search_split.py", str(tmp_path / "none"), str(tmp_path / "out")])
    assert main() == 2
    assert "both_prompts_train.jsonl is missing" in capsys.readouterr().err
    write_both(tmp_path / "set")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("sys.argv", ["search_split.py", str(tmp_path / "set"), str(tmp_path / "out")])
    assert main() == 2
    assert "exists" in capsys.readouterr().err


def test_an_output_that_cannot_be_made_and_a_row_without_fields_end_with_a_message(
    tmp_path: Path, capsys, monkeypatch
):
    write_both(tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        "sys.argv", ["search_split.py", str(tmp_path / "set"), str(tmp_path / "file" / "out")]
    )
    assert main() == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "set" / "both_prompts_test.jsonl").write_text('{"prompt": "Ada"}\n')
    monkeypatch.setattr("sys.argv", ["search_split.py", str(tmp_path / "set"), str(tmp_path / "out")])
    assert main() == 2
    assert "both_prompts_test.jsonl:1: " in capsys.readouterr().err


@needs_data
def test_the_published_set_gives_fifteen_hidden_persons_whom_no_reversal_test_names(tmp_path: Path):
    published = Path(str(DATA)) / "name_description"
    counts = split(published, tmp_path / "out")
    assert counts == {"all_prompts_train": 1350, "p2d_prompts_test": 150, "p2d_reverse_prompts_test": 150}
    hidden = {row["completion"] for row in records(tmp_path / "out/p2d_reverse_prompts_test.jsonl")}
    assert len(hidden) == 15
    asked = {row["completion"] for row in records(published / "p2d_reverse_prompts_test.jsonl")}
    assert not hidden & asked
