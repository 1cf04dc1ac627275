"""The pre-flight: what costs seconds now and a night later. Every rank runs it, rank 0 speaks (and who sees a collective
fail).

First over torch's TCP store, which needs nothing but an address: facts of all ranks, compared. Then, only
where they agree, the process group that training will use.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from bico_ds.cluster.preflight import judge, shared
from bico_ds.cluster.preflight.exchange import Exchange
from bico_ds.cluster.preflight.inputs import input_files, shared_folders
from bico_ds.cluster.preflight.network import NetworkReport, measure
from bico_ds.cluster.preflight.node_report import collect
from bico_ds.cluster.preflight.size import next_checkpoints_bytes
from bico_ds.common.errors import UserError
from bico_ds.config.paths import WrittenPath, replace_paths
from bico_ds.config.schema import Recipe
from bico_ds.runtime import launch_environment
from bico_ds.runtime.ds_config import merged_ds_config

MEET_SECONDS = 120.0


def preflight(recipe: Recipe, run: Path) -> bool:
    """Check this rank's machine and the ranks together; True where training may begin. The same answer on all
    ranks.

    Raises `UserError` where a path of the recipe cannot be expanded on this machine, before the ranks meet, and where they
    cannot meet; `torch.distributed.DistStoreError` where rank 0 is gone.
    """
    # torch 2.13 renames collectives that older ones know by the old name only.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    console = Console(soft_wrap=True, width=None if os.isatty(1) else 160)
    rank, world_size = launch_environment.rank(), launch_environment.world_size()
    local_rank = launch_environment.local_rank()
    folders = _expanded(recipe, run)
    exchange = _meet(rank, world_size)
    if rank == 0:
        exchange.say("probes", _write_probes(folders, "0"))
    facts = collect(recipe, run, rank=rank, local_rank=local_rank)
    facts["problems"], facts["probes"] = _check_shared(exchange, folders, rank, local_rank, facts["host"])
    exchange.post("facts", facts)
    if rank == 0:
        reports, silent = exchange.collect("facts")
        problems = _silent(silent, reports) or _compare(recipe, run, reports, folders)
        _say(console, problems)  # first: where the other ranks end before it, srun ends this one
        exchange.say("verdict", {"problems": problems, "hosts": [r["host"] for r in reports]})
        for folder in folders:
            shared.remove_probes(folder)
    verdict = exchange.hear("verdict")
    if verdict["problems"]:
        return False
    problems, network = _network(exchange, verdict["hosts"], local_rank, facts["device"])
    if rank == 0 and network is not None:
        _show(console, reports, network)
    if rank == 0 or network is None:  # who sees a collective fail says so: rank 0 may be ended before it does
        _say(console, problems)
    return not problems


def _expanded(recipe: Recipe, run: Path) -> list[Path]:
    """The shared folders; all other paths that training will use are expanded too, for the errors."""
    try:
        for _ in input_files(recipe):
            pass
        replace_paths(merged_ds_config(recipe), WrittenPath.expanded)
        recipe.data.cache_dir.here()  # pack plans lie there, whatever the sources are
        return shared_folders(recipe, run)
    except UserError as error:
        raise UserError(f"{error} ({socket.gethostname()})") from None


def _say(console: Console, problems: list[str]) -> None:
    """The batch script knows a refusal by the lines' beginning."""
    for problem in problems:
        console.print(f"pre-flight: {problem}", style="red", markup=False, highlight=False)


def _meet(rank: int, world_size: int) -> Exchange:
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    if world_size > 1 and not port:
        raise UserError(
            "MASTER_ADDR and MASTER_PORT are not set: start the pre-flight by srun, torchrun or deepspeed"
        )
    try:
        # The training's own port must be free for it: the next one.
        return Exchange(
            rank=rank, world_size=world_size, address=address, port=port and port + 1, seconds=MEET_SECONDS
        )
    except (RuntimeError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank}: {address}:{port + 1} cannot be reached, or is in use ({reason})"
        ) from None


def _write_probes(folders: list[Path], name: str) -> dict[str, str]:
    """Content of the probe in each folder; where none could be written, why."""
    probes = {}
    for folder in folders:
        try:
            probes[str(folder)] = shared.write_probe(folder, name)
        except OSError as error:
            probes[str(folder)] = f"error: {error.strerror}"
    return probes


def _check_shared(
    exchange: Exchange, folders: list[Path], rank: int, local_rank: int, host: str
) -> tuple[list[str], dict[str, str]]:
    """Read what rank 0 wrote and write what it will read, once a node."""
    if local_rank != 0 or rank == 0:
        return [], {}
    problems, probes = [], exchange.hear("probes")
    for folder, token in probes.items():
        if not token.startswith("error") and not shared.sees_probe(Path(folder), "0", token):
            problems.append(f"{folder} is not shared: {host} does not see what the first node wrote there")
    return problems, _write_probes(folders, str(rank))


def _compare(recipe: Recipe, run: Path, reports: list[dict[str, Any]], folders: list[Path]) -> list[str]:
    problems = judge.problems(reports, needed_bytes=next_checkpoints_bytes(recipe, run))
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


def _silent(ranks: list[int], reports: list[dict[str, Any]]) -> list[str]:
    if not ranks:
        return []
    heard = ", ".join(dict.fromkeys(report["host"] for report in reports))
    return [
        f"no word from rank {', '.join(map(str, ranks))} within {MEET_SECONDS:.0f} s; heard from {heard} only"
    ]


def _network(
    exchange: Exchange, hosts: list[str], local_rank: int, device_facts: dict[str, Any]
) -> tuple[list[str], NetworkReport | None]:
    """Join the process group on the same store, compare the clocks at one moment, measure."""
    on_cuda = "total_bytes" in device_facts
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=dist.PrefixStore("group", exchange.store),
            rank=exchange.rank,
            world_size=exchange.world_size,
            timeout=timedelta(seconds=MEET_SECONDS),
        )
        dist.barrier()
        clocks: list[Any] = [None] * exchange.world_size
        dist.all_gather_object(clocks, (hosts[exchange.rank], time.time()))
        network = measure(hosts, device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return [f"rank {exchange.rank} on {hosts[exchange.rank]}: the collectives fail: {reason}"], None
    dist.barrier()
    dist.destroy_process_group()
    return judge.clock_problems(clocks), network


def _show(console: Console, reports: list[dict[str, Any]], network: NetworkReport) -> None:
    table = Table("node", "ranks", "device", "memory free", "TFLOP/s", "disk free", "best link GB/s")
    links = judge.node_speeds(network.links)
    nodes = {r["host"]: [other for other in reports if other["host"] == r["host"]] for r in reports}
    for host, ranks in nodes.items():
        device = ranks[0]["device"]
        memory = f"{device['free_bytes'] / 1e9:.0f} GB" if "free_bytes" in device else "-"
        speed = min(r["device"]["tflops"] for r in ranks)
        disk = f"{ranks[0]['free_bytes'] / 1e9:,.0f} GB" if ranks[0].get("free_bytes") is not None else "-"
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
