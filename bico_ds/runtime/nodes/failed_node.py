"""A file for each node of a run that failed, and what of it goes into the state file. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any, TypeGuard

import psutil

from bico_ds.common.files import write_atomically
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.runtime.nodes.gpu_errors import SECONDS, read_gpu_errors

_MOST_BYTES = 1 << 20
_POLL_SECONDS = 0.1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}", re.ASCII)


def node_name() -> str:
    """The name of this node: SLURM's, by which it can be excluded, or else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_node_name(name: object) -> TypeGuard[str]:
    """Whether a value may be a node's name: names go to the batch system's commands."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def write_node_report(logs: Path, run_id: str) -> None:
    """Read this node's GPU errors since this process began, and write them to LOGS/node-NAME.json; takes some seconds.

    Never fails: it is called when something else already has.
    """
    with contextlib.suppress(OSError, psutil.Error):
        errors = read_gpu_errors(psutil.Process().create_time())
        content = {"host": node_name(), "run_id": run_id, "time": time.time(), **errors}
        write_atomically(_file(logs, node_name()), json.dumps(content) + "\n")


def await_node_report(logs: Path, run_id: str, host: str) -> None:
    """Wait until a node has written its report, as long as that may take."""
    deadline = time.monotonic() + SECONDS + 1
    while host not in node_reports(logs, run_id) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def node_reports(logs: Path, run_id: str) -> dict[str, dict[str, Any]]:
    """The reports of this start's nodes by name: `gpus` and `xids`. Files that are broken are passed over."""
    found = {}
    for path in sorted(logs.glob("node-*.json")):
        with contextlib.suppress(JsonError):
            report = read_object(path, most_bytes=_MOST_BYTES)
            if report.get("run_id") == run_id and _is_whole(report):
                found[report["host"]] = {"gpus": report["gpus"], "xids": report["xids"]}
    return found


def failure_facts(logs: Path, run_id: str, rank: int | None, host: str | None) -> dict[str, Any]:
    """For the state file: which rank failed, on which node, and the GPU errors of all nodes that have told some.

    Waits some seconds for that node's report, unless its ranks do not answer, so that `rank` is None. None: not known.
    """
    if host is not None and rank is not None:
        await_node_report(logs, run_id, host)
    reports = node_reports(logs, run_id)
    return {
        "failed_rank": rank,
        "failed_host": host,
        "nodes": {name: told for name, told in reports.items() if told["gpus"] or told["xids"]},
    }


def _file(logs: Path, host: str) -> Path:
    return logs / f"node-{host.replace('/', '_')}.json"


def _is_whole(report: dict[str, Any]) -> bool:
    """Whether a report has what `gpu_errors.fault` reads."""
    gpus, xids = report.get("gpus"), report.get("xids")
    return (
        is_node_name(report.get("host"))
        and isinstance(gpus, list)
        and isinstance(xids, list)
        and all(isinstance(gpu, dict) and "gpu" in gpu for gpu in gpus)
        and all(isinstance(xid, dict) and {"gpu", "code"} <= xid.keys() for xid in xids)
    )
