"""What a launcher (deepspeed, torchrun, srun) writes into the environment of each process. No torch here.

Without a launcher a process is the only rank.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import socket
from pathlib import Path

from bico_ds.common.errors import UserError

_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
LARGEST_PORT = 65535
_FIRST_PORT = 10_000  # below are those of well-known services
_TRIES = 1000
_GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
_HELP = "the launcher (deepspeed, torchrun, srun) sets it; unset it to start one process"


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def check() -> None:
    """Raise `UserError`, with the variable's name, where a launcher's variables are no numbers or contradict one another.

    Also for a DS_ACCELERATOR that names no device which is trained on.
    """
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator not in (None, "cpu", "cuda"):
        raise UserError(
            f"DS_ACCELERATOR={accelerator[:40]!r} in the environment is neither 'cpu' nor 'cuda'; unset it to take a GPU "
            "where there is one"
        )
    master_port()
    _refuse_beyond("RANK", rank(), "WORLD_SIZE", world_size())
    local, per_node = local_rank(), ranks_per_node()
    if per_node is not None:
        name = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
        _refuse_beyond("LOCAL_RANK", local, name, per_node)


def rank() -> int:
    """This process among all. Raises `UserError` where RANK is no number."""
    return _number("RANK", unset=0, least=0)


def telling_rank() -> int:
    """The rank, whose first tells the user of errors; 0, too, where the variables are wrong: nobody may be first."""
    try:
        check()
    except UserError:
        return 0
    return rank()


def local_rank() -> int:
    """The rank among those of this node. Raises `UserError` where LOCAL_RANK is no number."""
    return _number("LOCAL_RANK", unset=0, least=0)


def world_size() -> int:
    """The number of processes. Raises `UserError` where WORLD_SIZE is no number."""
    return _number("WORLD_SIZE", unset=1, least=1)


def ranks_per_node() -> int | None:
    """Ranks of this node by torchrun's variable, or that of DeepSpeed's launcher; None without either.

    Raises `UserError` where it is no number.
    """
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name):
            return _number(name, unset=1, least=1)
    return None


def master_port() -> int | None:
    """The port at which the ranks meet; None without a launcher. Raises `UserError` where MASTER_PORT is no port."""
    return (
        _number("MASTER_PORT", unset=1, least=1, most=LARGEST_PORT) if os.environ.get("MASTER_PORT") else None
    )


def is_one_node() -> bool:
    """Whether all ranks are on this node, as far as their number on it tells. Raises `UserError` as the numbers do."""
    return ranks_per_node() == world_size() or world_size() == 1


def _number(name: str, *, unset: int, least: int, most: int | None = None) -> int:
    """The whole number in an environment variable; `unset` without it. Raises `UserError`."""
    text = os.environ.get(name)
    if text is None:
        return unset
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    word = text.strip()
    if not _NUMBER.fullmatch(word) or not least <= int(word) <= (int(word) if most is None else most):
        raise UserError(f"{name}={text[:40]!r} in the environment is no whole number {bounds}; {_HELP}")
    return int(word)


def _refuse_beyond(name: str, number: int, whole: str, count: int) -> None:
    if number >= count:
        raise UserError(
            f"{name}={number} in the environment, but {whole} is {os.environ.get(whole, f'not set, so {count}')}: "
            f"ranks are counted from 0; {_HELP}"
        )


def free_port() -> int:
    """A TCP port that is free on this machine now, as the next one is, for a MASTER_PORT that no launcher set.

    Until the ranks listen there, seconds pass: it is none of those that the system gives to whoever asks for any. Raises
    OSError where none is found.
    """
    for port in random.SystemRandom().sample(_ports_not_given_out(), _TRIES):
        if _is_free(port) and _is_free(port + 1):
            return port
    raise OSError(errno.EADDRINUSE, f"none of {_TRIES} ports is free")


def _ports_not_given_out() -> range:
    """Linux gives out those from 32768 on, unless it is told otherwise; where it gives out all, there are no better ones."""
    first = 32768
    with contextlib.suppress(OSError, ValueError, IndexError):
        first = int(_GIVEN_OUT.read_text().split()[0])
    below = range(_FIRST_PORT, first - 1)
    return below if len(below) >= _TRIES else range(_FIRST_PORT, LARGEST_PORT)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


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


def usable_cores() -> int:
    """The CPU cores that a launcher, or a batch system, has left to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
