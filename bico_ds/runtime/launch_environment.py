"""What a launcher (deepspeed, torchrun, srun) writes into the environment of each process. No torch here.

Without a launcher a process is the only rank.
"""

from __future__ import annotations

import os
import socket


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The rank among those of this node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node() -> int | None:
    """Ranks of this node by torchrun's variable, or that of DeepSpeed's launcher; None without either."""
    text = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(text) if text else None


def free_port() -> int:
    """A TCP port that is free on this machine now, for a MASTER_PORT that no launcher set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slurm_job() -> str:
    """The id of the SLURM job that this process runs in; empty outside of one."""
    return os.environ.get("SLURM_JOB_ID", "")


def without_launcher() -> dict[str, str]:
    """This process's environment without what a launcher wrote into it: for a program that is to be the only rank."""
    names = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_", "CROSS_", "OMPI_", "PMI_", "PMIX_")
    return {k: v for k, v in os.environ.items() if k not in names and not k.startswith(prefixes)}
