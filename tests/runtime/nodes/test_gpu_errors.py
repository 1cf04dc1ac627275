"""GPU errors of a node, read by stand-ins for nvidia-smi, dmesg and journalctl: what they print, and what they never do."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

from bico_ds.runtime.nodes import gpu_errors
from bico_ds.runtime.nodes.failed_node import node_name, node_reports, write_node_report
from bico_ds.runtime.nodes.gpu_errors import fault, read_gpu_errors

SMI = """case "$1" in
*retired_pages*) printf '00000000:3B:00.0, [N/A], [N/A]\\n' ;;
*remapped*) printf '00000000:3B:00.0, 0, 1, No, No\\n00000000:AF:00.0, 0, 0, No, No\\n' ;;
*) printf '00000000:3B:00.0, 0, NVIDIA H100, 4, 2, 3\\n00000000:AF:00.0, 1, NVIDIA H100, 0, 0, 0\\n' ;;
esac"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A folder that is all of PATH but for the shell's own commands."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")

    def add(**texts: str) -> None:
        for name in ("nvidia-smi", "dmesg", "journalctl"):
            text = texts.get(name.replace("-", "_"), "exit 1")
            (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
            (folder / name).chmod(0o755)

    add()
    return add


def said(*lines: str) -> str:
    return "cat <<'END'\n" + "\n".join(lines) + "\nEND"


def xid(code: int, gpu: str = "PCI:0000:3b:00") -> str:
    return f"NVRM: Xid ({gpu}): {code}, pid=1234, name=python, GPU has fallen off the bus."


def uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def test_counters_of_all_queries_are_put_together_by_gpu(commands):
    commands(nvidia_smi=SMI)
    first, second = read_gpu_errors(0)["gpus"]
    assert (first["gpu"], first["index"], first["name"]) == ("00000000:3B:00.0", 0, "NVIDIA H100")
    assert first["ecc.errors.uncorrected.volatile.total"] == 2
    assert (first["remapped_rows.uncorrectable"], first["remapped_rows.failure"]) == (1, False)
    assert "retired_pages.pending" not in first, "not supported is no number"
    assert second["index"] == 1
    assert fault({"gpus": [first, second], "xids": []}) == "2 uncorrected ECC errors of GPU 0"
    assert fault({"gpus": [second], "xids": []}) == ""


def test_xids_since_the_start_are_found_whichever_clock_stands_before_them(commands):
    age = min(uptime() / 2, 60)  # this machine may have been started a moment ago
    since = time.time() - age
    now, old = uptime() - age / 2, uptime() - 1.5 * age
    local = time.strftime("%a %b %d %H:%M:%S %Y")
    commands(
        dmesg=said(f"[{old:12.6f}] {xid(62)}", f"[{now:12.6f}] {xid(79)}", f"[{local}] {xid(48)}", xid(74)),
        journalctl=said(f"{since - 9:.6f} host kernel: {xid(64)}", f"{since + 9:.6f} host kernel: {xid(95)}"),
    )
    told = read_gpu_errors(since)
    assert [found["code"] for found in told["xids"]] == [79, 48, 74, 95]
    assert told["xids"][0]["gpu"] == "0000:3b:00"
    assert "fallen off the bus" in told["xids"][0]["text"]
    assert fault(told) == "Xid 79 of GPU 0000:3b:00"


def test_an_xid_that_both_logs_have_counts_once_and_those_of_programs_blame_no_node(commands):
    line = xid(31)
    commands(dmesg=said(line, line), journalctl=said(f"{time.time():.3f} n1 kernel: {line}"))
    told = read_gpu_errors(time.time() - 60)
    assert [found["code"] for found in told["xids"]] == [31]
    assert fault(told) == ""


def test_a_command_that_hangs_or_fails_costs_seconds_and_nothing_else(commands, monkeypatch):
    monkeypatch.setattr(gpu_errors, "SECONDS", 1.5)  # enough for the command that answers on a busy machine
    commands(
        nvidia_smi="sleep 30",
        dmesg="echo denied >&2; exit 1",
        journalctl=said(f"{time.time():.3f} {xid(79)}"),
    )
    begun = time.monotonic()
    told = read_gpu_errors(time.time() - 60)
    assert time.monotonic() - begun < 20
    assert (told["gpus"], [found["code"] for found in told["xids"]]) == ([], [79])


def test_whatever_the_commands_print_the_answer_is_small_and_plain(commands, tmp_path):
    letters = [
        xid(79),
        "NVRM: Xid (",
        "[N/A]",
        ",",
        "\n",
        "[",
        "]",
        "\x00",
        "é",
        "9" * 30,
        "Yes",
        " ",
        "1.5 ",
        "[99999999999999.9] ",
    ]
    for number in range(8):
        noise = tmp_path / f"noise{number}"
        text = "".join(random.choice(letters) for _ in range(2000))
        noise.write_bytes(text.encode() + bytes(random.randrange(256) for _ in range(200)))
        commands(nvidia_smi=f"cat {noise}", dmesg=f"cat {noise}", journalctl=f"cat {noise}")
        told = read_gpu_errors(time.time() - 60)
        assert len(json.dumps(told, allow_nan=False)) < 100_000
        fault(told)


def test_a_node_s_report_is_found_by_its_run_and_others_are_passed_over(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    commands(nvidia_smi=SMI)
    write_node_report(tmp_path, "run-1")
    assert node_name() == "n7"
    (tmp_path / "node-empty.json").touch()
    (tmp_path / "node-list.json").write_text("[1]")
    (tmp_path / "node-odd.json").write_text('{"run_id": "run-1", "host": "n8", "gpus": [1], "xids": []}')
    assert list(node_reports(tmp_path, "run-1")) == ["n7"]
    assert node_reports(tmp_path, "run-2") == {}
    assert node_reports(tmp_path / "none", "run-1") == {}


def test_a_report_that_cannot_be_written_is_left_out(commands, tmp_path):
    write_node_report(tmp_path / "nowhere", "run-1")
    assert os.listdir(tmp_path) == ["commands"]
