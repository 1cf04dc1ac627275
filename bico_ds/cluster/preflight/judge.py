"""From all ranks' reports to what forbids the run, and what is only worth knowing. Pure functions, no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

MEMORY_FREE_FRACTION = 0.9  # less means that another process holds memory of this GPU
SLOW_FRACTION = 0.6  # of the best one's speed
CLOCK_SECONDS = 10.0  # for those who read the nodes' logs and records side by side: no lock depends on it
GB = 1e9


def problems(reports: Sequence[dict[str, Any]], *, needed_bytes: float) -> list[str]:
    """What forbids the run, each with the nodes it was found on."""
    return [
        *differing("version of", [(r["host"], r["versions"]) for r in reports]),
        *differing("this", [(r["host"], r["same"]) for r in reports if "same" in r]),
        *_inputs([r for r in reports if "inputs" in r]),
        *(f"{problem} ({r['host']})" for r in reports for problem in r.get("damaged", [])),
        *_disk([r for r in reports if "disk_free_bytes" in r], needed_bytes),
        *(problem for r in reports for problem in r.get("problems", [])),
        *(problem for r in reports for problem in _device(r)),
    ]


def differing(what: str, values: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """A line for each key whose value is not the same on all nodes: the values, and where each was found."""
    lines = []
    for key in sorted({key for _, value in values for key in value}):
        hosts: dict[Any, list[str]] = defaultdict(list)
        for host, value in values:
            hosts[value.get(key)].append(host)
        if len(hosts) > 1:
            found = ", ".join(f"{value} on {_names(names)}" for value, names in hosts.items())
            lines.append(f"{what} {key} differs: {found}")
    return lines


def slow(speeds: dict[str, float]) -> list[str]:
    """Names whose speed is under `SLOW_FRACTION` of the best one's, slowest first."""
    best = max(speeds.values(), default=0.0)
    return sorted((n for n in speeds if speeds[n] < SLOW_FRACTION * best), key=lambda n: speeds[n])


def node_speeds(links: dict[tuple[str, str], float]) -> dict[str, float]:
    """A node's network speed is that of its best link: a good node with a slow neighbour has a fast link elsewhere."""
    speeds: dict[str, float] = defaultdict(float)
    for pair, speed in links.items():
        for name in pair:
            speeds[name] = max(speeds[name], speed)
    return dict(speeds)


def clock_problems(clocks: Sequence[tuple[str, float]]) -> list[str]:
    """Nodes whose clock, read at one moment, is far from the first node's."""
    first = clocks[0][1]
    return [
        f"the clock of {host} is {time - first:+.0f} s from that of {clocks[0][0]}: run NTP on both"
        for host, time in dict(clocks).items()
        if abs(time - first) > CLOCK_SECONDS
    ]


def _inputs(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Inputs that some nodes lack, or that differ; an input that a node did not report counts as missing there.

    A node without the folder takes its path for a hub name where it looks like one, and does not report it.
    """
    lines, everywhere = [], []
    for key in dict.fromkeys(key for r in reports for key in r["inputs"]):
        missing = [r["host"] for r in reports if r["inputs"].get(key, "missing") == "missing"]
        if missing:
            lines.append(f"{key} is not there on {_names(missing)}")
        else:
            everywhere.append(key)
    found = [(r["host"], {key: r["inputs"][key] for key in everywhere}) for r in reports]
    return lines + differing("the content of", found)


def _disk(reports: Sequence[dict[str, Any]], needed: float) -> list[str]:
    full = [r for r in reports if r["disk_free_bytes"] is not None and r["disk_free_bytes"] < needed]
    return [
        f"the run folder's disk has {r['disk_free_bytes'] / GB:.3f} GB free on {r['host']}, "
        f"the next checkpoints need {needed / GB:.3f} GB; make room, or lower checkpoint.keep_last"
        for r in full[:1]
    ]


def _device(report: dict[str, Any]) -> list[str]:
    device, where = report["device"], f"rank {report['rank']} on {report['host']}"
    if device["allocated"] > device["visible"]:
        return [
            f"{where}: SLURM gave {device['allocated']} GPUs, torch sees {device['visible']}: "
            "a torch without CUDA, or a broken driver (see nvidia-smi)"
        ]
    if "error" in device:
        return [f"{where}: {device['name']} fails: {device['error']}"]
    if not device["right"]:
        return [f"{where}: {device['name']} computes wrong results; take the node out"]
    if "memory_total_bytes" not in device:
        return []
    free, total = device["memory_free_bytes"] / GB, device["memory_total_bytes"] / GB
    if free >= MEMORY_FREE_FRACTION * total:
        return []
    return [
        f"{where}: {device['name']} has {free:.1f} of {total:.1f} GB free; another process holds the rest"
    ]


def _names(hosts: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(hosts))
