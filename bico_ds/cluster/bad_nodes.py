"""Nodes that a job leaves out when it is requeued: which one a start failed on, and how many may go. No torch here.

A node is suspected where its GPUs or its kernel told of a hardware error, or where a rank on it failed of what is no mistake
in two starts of one job. slurm/excluded.json keeps the nodes of failed starts, and those that were left out since.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.common.files import write_atomically
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.runtime.nodes.failed_node import is_node_name, node_reports
from bico_ds.runtime.nodes.gpu_errors import fault
from bico_ds.runtime.run_folder import RunFolder, read_state


@dataclass(frozen=True)
class Suspect:
    """The node of a failed start, and what speaks against it; `why` is empty where that is not enough to leave it out."""

    host: str
    why: str


def excluded_file(run: Path) -> Path:
    return run / "slurm" / "excluded.json"


def excluded_nodes(run: Path, job: str) -> list[str]:
    """The nodes that this job leaves out, oldest first."""
    return [entry["host"] for entry in _read(run)["excluded"] if entry.get("job") == job]


def suspect(run: Path, *, job: str, before: str | None) -> Suspect | None:
    """The node on which the last start of a job failed; None where it did not fail, or nobody knows on which.

    `before`: the run id that the state file had before that start.
    """
    folder = RunFolder(run)
    state = read_state(folder.state_file) or {}
    run_id = state.get("run_id")
    if run_id == before or not isinstance(run_id, str) or state.get("state") not in ("failed", "running"):
        return None
    faults = {host: why for host, told in node_reports(folder.logs, run_id).items() if (why := fault(told))}
    # The node of the rank that failed comes first: another one's error may be older.
    known = [str(host) for host in (state.get("failed_host"), *sorted(faults)) if is_node_name(host)]
    if not known:
        return None
    host = next((host for host in known if host in faults), known[0])
    if host in faults:
        return Suspect(host, faults[host])
    earlier = [entry for entry in _read(run)["failed"] if entry.get("job") == job and entry["host"] == host]
    return Suspect(host, "a second start failed on it" if earlier else "")


def note(run: Path, found: Suspect, *, job: str, is_excluded: bool) -> None:
    """Keep on which node a start failed, and whether the job leaves it out from now on."""
    content = _read(run)
    entry = {"job": job, "host": found.host, "why": found.why, "time": time.time()}
    content["failed"].append(entry)
    if is_excluded:
        content["excluded"].append(entry)
    path = excluded_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def _read(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Both lists; a file that is missing or broken holds nothing."""
    try:
        content = read_object(excluded_file(run))
    except JsonError:
        content = {}
    return {key: _entries(content.get(key)) for key in ("failed", "excluded")}


def _entries(found: object) -> list[dict[str, Any]]:
    entries = found if isinstance(found, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and is_node_name(entry.get("host"))]
