"""What this node's GPUs and kernel tell of hardware errors: Xid messages and ECC counters, best effort. No torch here.

Xid: https://docs.nvidia.com/deploy/xid-errors. Counters: `nvidia-smi --help-query-gpu` and `--help-query-remapped-rows`.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

SECONDS = 4.0  # for all commands together; a lost GPU can keep nvidia-smi for ever
_MOST_XIDS = 20
_MOST_LETTERS = 200
_ECC = (
    "pci.bus_id",
    "index",
    "name",
    "ecc.errors.corrected.volatile.total",
    "ecc.errors.uncorrected.volatile.total",
    "ecc.errors.uncorrected.aggregate.total",
)
_RETIRED = ("pci.bus_id", "retired_pages.double_bit.count", "retired_pages.pending")
_REMAPPED = (
    "gpu_bus_id",
    "remapped_rows.correctable",
    "remapped_rows.uncorrectable",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
_TABLE = ("--format=csv,noheader,nounits",)
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)[^)]*\): (\d{1,5})(?:, *(.*))?")
# Faults of a program, or what is left of an earlier one: they blame no node.
XIDS_OF_PROGRAMS = frozenset({13, 31, 43, 45, 68, 69})


def read_gpu_errors(since: float) -> dict[str, Any]:
    """Counters of each GPU (`gpus`), and Xid messages since a time in seconds (`xids`: gpu, code, text, time or None).

    Takes at most `SECONDS`. What cannot be read is left out: no driver, no right to read the kernel's messages.
    """
    commands = {
        "ecc": ["nvidia-smi", f"--query-gpu={','.join(_ECC)}", *_TABLE],
        "retired": ["nvidia-smi", f"--query-gpu={','.join(_RETIRED)}", *_TABLE],
        "remapped": ["nvidia-smi", f"--query-remapped-rows={','.join(_REMAPPED)}", *_TABLE],
        "dmesg": ["dmesg"],
        "journal": ["journalctl", "-k", "-q", "--no-pager", "-o", "short-unix", f"--since=@{int(since)}"],
    }
    told = _run_all(commands)
    gpus: dict[str, dict[str, Any]] = {}
    for kind, names in (("ecc", _ECC), ("retired", _RETIRED), ("remapped", _REMAPPED)):
        for bus, counters in _table(told.get(kind, ""), names):
            gpus.setdefault(bus, {"gpu": bus}).update(counters)
    return {"gpus": list(gpus.values()), "xids": _xids(told.get("dmesg", ""), told.get("journal", ""), since)}


def fault(errors: dict[str, Any]) -> str:
    """The first hardware error in what `read_gpu_errors` returned, in words; empty where there is none.

    Xids of programs are none. Counters are those since the driver was loaded, so an error of before may be among them.
    """
    for xid in errors["xids"]:
        if xid["code"] not in XIDS_OF_PROGRAMS:
            return f"Xid {xid['code']} of GPU {xid['gpu']}"
    for gpu in errors["gpus"]:
        which = f"GPU {gpu.get('index', gpu['gpu'])}"
        if (count := gpu.get("ecc.errors.uncorrected.volatile.total")) and count is not True:
            return f"{count} uncorrected ECC errors of {which}"
        for what in ("remapped_rows.failure", "remapped_rows.pending", "retired_pages.pending"):
            if gpu.get(what):
                return f"{what} of {which}"
    return ""


def _run_all(commands: dict[str, list[str]]) -> dict[str, str]:
    """The output of each command that ends in time, all at once."""
    told: dict[str, str] = {}

    def run(name: str, command: list[str]) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
                check=True,
                env=os.environ | {"LC_ALL": "C"},
            )
            told[name] = done.stdout.decode("utf-8", errors="replace")

    # Daemons, because a process that waits for a lost GPU cannot be killed, and is not waited for.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in commands.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return dict(told)


def _table(text: str, names: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Bus number and known counters of each line that has all columns."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [
        (row[0].upper(), {name: value for name, cell in zip(names[1:], row[1:], strict=True)
                          if (value := _value(cell)) is not None})
        for row in rows if len(row) == len(names)
    ]  # fmt: skip


def _value(cell: str) -> int | bool | str | None:
    if cell.startswith(("[", "N/A")):  # [N/A], [Not Supported], [Unknown Error]
        return None
    if cell in ("Yes", "No"):
        return cell == "Yes"
    return int(cell) if cell.isdecimal() and len(cell) < 20 else cell[:_MOST_LETTERS]


def _xids(dmesg: str, journal: str, since: float) -> list[dict[str, Any]]:
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for line in (*dmesg.splitlines(), *journal.splitlines()):
        if (match := _XID.search(line)) is None:
            continue
        moment = _moment(line[: match.start()])
        if moment is not None and moment < since:
            continue
        gpu, code, text = match[1], int(match[2]), (match[3] or "").strip()[:_MOST_LETTERS]
        found[gpu, code, text] = {"gpu": gpu, "code": code, "text": text, "time": moment}
    return list(found.values())[-_MOST_XIDS:]


def _moment(prefix: str) -> float | None:
    """Seconds since the epoch of what stands before a message of the kernel; None where that is no known time."""
    if match := re.match(r"\[ *(\d{1,12}\.\d+)\]", prefix):  # since the machine was started
        with contextlib.suppress(OSError, ValueError, IndexError):
            uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
            return time.time() - uptime + float(match[1])
        return None
    if match := re.match(r"(\d{9,11}\.\d+) ", prefix):
        return float(match[1])
    with contextlib.suppress(ValueError, OverflowError):
        if match := re.match(r"\[([^\]]+)\]", prefix):
            return datetime.strptime(match[1], "%a %b %d %H:%M:%S %Y").timestamp()
        return datetime.fromisoformat(prefix.split(" ")[0].replace(",", ".")).timestamp()
    return None
