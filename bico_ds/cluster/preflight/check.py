"""The pre-flight: finds in seconds what would otherwise stop a run hours later. Every rank runs it.

First the ranks send reports on their machines over torch's TCP store, which needs only an address, and rank 0 compares them.
Only where they agree, the ranks join the kind of process group that training will use, and measure the network. Rank 0
prints what was found, and so does every rank on which a collective fails.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections import defaultdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from rich.console import Console

from bico_ds.cluster.preflight import judge, shared
from bico_ds.cluster.preflight.exchange import Exchange
from bico_ds.cluster.preflight.fit import by_node, lack_of_memory
from bico_ds.cluster.preflight.inputs import input_files, shared_folders
from bico_ds.cluster.preflight.network import NetworkReport, measure
from bico_ds.cluster.preflight.node_report import collect
from bico_ds.cluster.preflight.size import next_checkpoints_bytes
from bico_ds.common.errors import UserError
from bico_ds.common.terminal.fitting_table import FittingTable
from bico_ds.config.paths import WrittenPath, replace_paths
from bico_ds.config.schema import Recipe
from bico_ds.model.architecture import with_own_config
from bico_ds.planner.plan import make_plan
from bico_ds.planner.workload import assumed_texts
from bico_ds.runtime import launch_environment
from bico_ds.runtime.distributed import begin_group
from bico_ds.runtime.ds_config import merged_ds_config
from bico_ds.runtime.run_folder import obstacle

JOIN_SECONDS = 120.0


class NodeProblems(Protocol):
    """What else may forbid to train on this node, whose first rank has a GPU or none: a line for each problem."""

    def __call__(self, *, on_cuda: bool) -> list[str]: ...


def preflight(recipe: Recipe, run: Path, *, node_problems: NodeProblems | None = None) -> bool:
    """Check this rank's machine, and the ranks together; True, on all ranks, where training may begin.

    `node_problems`, where given, is asked once per node, and has to answer well within `JOIN_SECONDS`.

    Raises `UserError` where a path of the recipe cannot be expanded on this machine and where rank 0 cannot be reached;
    `torch.distributed.DistStoreError` where rank 0 is gone.
    """
    # torch 2.13 has renamed collectives, and warns of the old names, which older versions need.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    console = Console(soft_wrap=True, width=None if os.isatty(1) else 160)
    launch_environment.check()
    rank, world_size = launch_environment.rank(), launch_environment.world_size()
    local_rank = launch_environment.local_rank()
    folders = _expanded(recipe, run)
    exchange = Exchange(rank=rank, world_size=world_size, seconds=JOIN_SECONDS)
    if rank == 0:
        exchange.publish("probes", _write_probes(folders, "0"))
    report = collect(recipe, run, rank=rank, local_rank=local_rank)
    report["problems"], report["probes"] = _check_shared(exchange, folders, rank, local_rank, report["host"])
    if node_problems is not None and local_rank == 0:
        found = node_problems(on_cuda="memory_total_bytes" in report["device"])
        report["problems"] += [f"{report['host']}: {problem}" for problem in found]
    exchange.post("report", report)
    if rank == 0:
        reports, silent = exchange.collect("report")
        problems = _silent(silent, reports) or _compare(recipe, run, reports, folders)
        # Print before publishing: srun may end this rank as soon as another one has ended.
        _print_problems(console, problems)
        # No more than that: rank 0 serves it to every rank, and the problems may be as many as the ranks.
        exchange.publish("may_begin", not problems)
        for folder in folders:
            shared.remove_probes(folder)
    if not exchange.receive("may_begin"):
        return False
    problems, network = _check_network(exchange, report["host"], local_rank, report["device"])
    if rank == 0 and network is not None:
        _print_table(console, reports, network)
    # Every rank on which a collective fails prints that: rank 0 may be ended before it can.
    if rank == 0 or network is None:
        _print_problems(console, problems)
    return not problems


def _expanded(recipe: Recipe, run: Path) -> list[Path]:
    """The shared folders. All other paths that training will use are expanded too, to find those that cannot be."""
    try:
        for _ in input_files(recipe):
            pass
        replace_paths(merged_ds_config(recipe), WrittenPath.expanded)
        recipe.data.cache_dir.here()  # pack plans are kept there, whatever the sources are
        return shared_folders(recipe, run)
    except UserError as error:
        raise UserError(f"{error} ({socket.gethostname()})") from None


def _print_problems(console: Console, problems: list[str]) -> None:
    """The batch script recognizes a refusal by the beginning of these lines."""
    for problem in problems:
        console.print(f"pre-flight: {problem}", style="red", markup=False, highlight=False)


def _write_probes(folders: list[Path], name: str) -> dict[str, str]:
    """By folder, the content of the probe written there, or `error: ` and the reason why none could be."""
    probes = {}
    for folder in folders:
        try:
            probes[str(folder)] = shared.write_probe(folder, name)
        except OSError as error:
            probes[str(folder)] = f"error: {obstacle(folder, error)}"
    return probes


def _check_shared(
    exchange: Exchange, folders: list[Path], rank: int, local_rank: int, host: str
) -> tuple[list[str], dict[str, str]]:
    """Read the probes that rank 0 wrote, and write those that it will read: (problems, probes). Once per node."""
    if local_rank != 0 or rank == 0:
        return [], {}
    problems, probes = [], exchange.receive("probes")
    for folder, token in probes.items():
        if not token.startswith("error") and not shared.sees_probe(Path(folder), "0", token):
            problems.append(f"{folder} is not shared: {host} does not see what the first node wrote there")
    return problems, _write_probes(folders, str(rank))


def _compare(recipe: Recipe, run: Path, reports: list[dict[str, Any]], folders: list[Path]) -> list[str]:
    problems = judge.problems(reports, needed_bytes=next_checkpoints_bytes(recipe, run))
    problems += _memory(recipe, reports)
    own = {str(folder): _write_probes([folder], "0")[str(folder)] for folder in folders}
    for report in [{"host": reports[0]["host"], "rank": 0, "probes": own}, *reports[1:]]:
        for folder, token in report["probes"].items():
            if token.startswith("error"):
                problems.append(
                    f"{folder}: {report['host']} cannot write there: {token.removeprefix('error: ')}"
                )
            elif not shared.sees_probe(Path(folder), str(report["rank"]), token):
                problems.append(
                    f"{folder} is not shared: the first node does not see what {report['host']} wrote"
                )
    return list(dict.fromkeys(problems))


def _memory(recipe: Recipe, reports: list[dict[str, Any]]) -> list[str]:
    """What the memory of the nodes cannot hold, whatever the texts are."""
    planned = recipe.model_copy(update={"model": with_own_config(recipe.model)})
    plan_on = partial(make_plan, planned, texts=assumed_texts(planned))
    memories = (
        (r["host"], r["machine"], r["device"].get("memory_total_bytes"), r["host_memory_bytes"])
        for r in reports
    )
    lack = lack_of_memory(plan_on, by_node(memories), fill=0)
    return [] if lack is None else [lack]


def _silent(ranks: list[int], reports: list[dict[str, Any]]) -> list[str]:
    if not ranks:
        return []
    names, hosts = ", ".join(map(str, ranks)), ", ".join(dict.fromkeys(r["host"] for r in reports))
    return [f"no report from rank {names} within {JOIN_SECONDS:.0f} s; reports came from {hosts} only"]


def _check_network(
    exchange: Exchange, host: str, local_rank: int, device_report: dict[str, Any]
) -> tuple[list[str], NetworkReport | None]:
    """Join the process group on the same store, compare the clocks at one moment, measure.

    Returns problems, and the measurements: None where a collective failed.
    """
    on_cuda = "memory_total_bytes" in device_report
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    try:
        begin_group(
            device,
            store=dist.PrefixStore("group", exchange.store),
            rank=exchange.rank,
            world_size=exchange.world_size,
            timeout=timedelta(seconds=JOIN_SECONDS),
        )
        dist.barrier()
        clocks: list[Any] = [None] * exchange.world_size
        dist.all_gather_object(clocks, (host, time.time()))
        network = measure([name for name, _ in clocks], device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return [f"rank {exchange.rank} on {host}: the collectives fail: {reason}"], None
    dist.barrier()
    dist.destroy_process_group()
    return judge.clock_problems(clocks), network


def _print_table(console: Console, reports: list[dict[str, Any]], network: NetworkReport) -> None:
    table = FittingTable()
    for name in ("node", "ranks", "device", "memory free", "TFLOP/s", "disk free", "best link GB/s"):
        table.add_column(name, right=name not in ("node", "device"))
    links = judge.node_speeds(network.links)
    nodes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in reports:
        nodes[report["host"]].append(report)
    for host, ranks in nodes.items():
        device = ranks[0]["device"]
        memory = f"{device['memory_free_bytes'] / 1e9:.0f} GB" if "memory_free_bytes" in device else "-"
        speed = min(r["device"]["tflops"] for r in ranks)
        disk_free = ranks[0].get("disk_free_bytes")
        disk = f"{disk_free / 1e9:,.0f} GB" if disk_free is not None else "-"
        link = f"{links[host]:.2f}" if host in links else "-"
        table.add_row(host, str(len(ranks)), device["name"], memory, f"{speed:.2f}", disk, link)
    console.print(table)
    console.print(
        f"all-reduce {network.all_reduce:.2f} GB/s, all-gather {network.all_gather:.2f} GB/s (bus bandwidth)"
    )
    computing = {f"rank {r['rank']} on {r['host']}": r["device"]["tflops"] for r in reports}
    for what, speeds in (("computes", computing), ("transfers", links)):
        for name in judge.slow(speeds):
            best = max(speeds.values())
            console.print(f"slow: {name} {what} at {speeds[name] / best:.0%} of the best", style="yellow")
