"""The command line of tools/prepare_data.py: exit codes, report, inspection."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bico_ds.commands.prepare import main
from tests import ROOT


def test_facts_then_their_store_then_its_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, store = str(tmp_path / "facts"), str(tmp_path / "store")
    assert (
        main(["facts", "--output", facts, "--both", "3", "--name-first", "2", "--description-first", "1"])
        == 0
    )
    fields = ["--prompt-field", "prompt", "--completion-field", "completion", "--group-field", "group"]
    command = [
        "files",
        f"{facts}/all_train.jsonl",
        "--tokenizer",
        f"{facts}/tokenizer",
        "--output",
        store,
        *fields,
    ]
    assert main([*command, "--processes", "1"]) == 0
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
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["facts", "--output", facts]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a command (files, hub, facts) or --inspect STORE"),
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
    assert "--test-prompts: Input should be greater than or equal to 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    command = [
        sys.executable,
        "tools/prepare_data.py",
        "files",
        str(tmp_path / "a.jsonl"),
        "--tokenizer",
        "absent",
    ]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "s")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no tokenizer at 'absent'")
