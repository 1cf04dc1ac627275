"""Where the ranks' store listens, and what is said of an address or a port that cannot be used."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import psutil
import pytest

from bico_ds.common.errors import RunError, UserError
from bico_ds.runtime.launch_environment import free_port
from bico_ds.runtime.meeting import rendezvous
from bico_ds.runtime.meeting.rendezvous import open_store
from bico_ds.runtime.signals import Interrupted, StopFlag

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
SECONDS = timedelta(seconds=20)


@pytest.fixture
def launched(monkeypatch):
    """Sets a launcher's variables; all are put back afterwards."""
    for name in (*NAMES, "GLOO_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def set_variables(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


def listening() -> set[tuple[str, int]]:
    return {
        (c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"
    }


def test_a_process_alone_listens_nowhere(launched):
    before = listening()
    store = open_store(rank=0, world_size=1, timeout=SECONDS)
    store.set("a", "b")
    assert store.get("a") == b"b"
    assert listening() <= before


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", socket.gethostname()])
def test_ranks_of_one_node_meet_where_no_other_machine_reaches_them(launched, address):
    port, before = free_port(), listening()
    launched(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR=address, MASTER_PORT=port)
    first = open_store(rank=0, world_size=2, timeout=SECONDS)
    assert listening() - before == {("127.0.0.1", port)}
    assert [os.environ["MASTER_ADDR"], os.environ["GLOO_SOCKET_IFNAME"]] == ["127.0.0.1", "lo"]
    second = open_store(rank=1, world_size=2, timeout=SECONDS)
    second.set("a", "b")
    assert first.get("a") == b"b"


def test_several_nodes_meet_on_the_network(launched):
    port = free_port()
    launched(WORLD_SIZE=2, LOCAL_WORLD_SIZE=1, MASTER_ADDR=socket.gethostname(), MASTER_PORT=port)
    store = open_store(rank=0, world_size=2, timeout=SECONDS)
    assert {ip for ip, number in listening() if number == port} <= {"::", "0.0.0.0"}
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    del store


@pytest.mark.parametrize("per_node", [1, 2])
def test_a_port_in_use_is_named(launched, per_node):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        launched(WORLD_SIZE=2, LOCAL_SIZE=per_node, MASTER_ADDR=socket.gethostname(), MASTER_PORT=port)
        with pytest.raises(UserError, match=rf"MASTER_PORT={port} is in use on .*--master_port"):
            open_store(rank=0, world_size=2, timeout=SECONDS)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT are not set: start several ranks by deepspeed, torchrun or srun"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "", "MASTER_PORT": 29500}, "MASTER_ADDR is not set"),
        (
            {"MASTER_ADDR": "no such host", "MASTER_PORT": 29500},
            "MASTER_ADDR='no such host': .* knows no machine",
        ),
        ({"MASTER_ADDR": "x" * 300, "MASTER_PORT": 29500}, "MASTER_ADDR='xxx.*knows no machine"),
        ({"MASTER_ADDR": "a..b", "MASTER_PORT": 29500}, r"MASTER_ADDR='a\.\.b': .* knows no machine"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_address_that_cannot_be_used_is_named_on_every_rank(launched, variables, message, rank):
    launched(WORLD_SIZE=2, **variables)
    with pytest.raises(UserError, match=message):
        open_store(rank=rank, world_size=2, timeout=SECONDS)


def test_the_port_after_the_last_one_is_refused(launched):
    launched(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=65535)
    with pytest.raises(UserError, match="MASTER_PORT=65535: the 1 ports after it are needed"):
        open_store(rank=0, world_size=2, port_offset=1, timeout=SECONDS)


def test_a_first_rank_that_does_not_come_is_one_message(launched):
    launched(WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=free_port())
    with pytest.raises(RunError, match="rank 1 on .* does not reach rank 0 at MASTER_ADDR=127.0.0.1"):
        open_store(rank=1, world_size=2, timeout=timedelta(seconds=1))


@pytest.fixture
def stop(monkeypatch):
    """Set by SIGUSR2; a rank 0 that has not come a second later is not waited for."""
    monkeypatch.setattr(rendezvous, "_STOPPED_SECONDS", 1.0)
    stop = StopFlag()
    former = signal.signal(signal.SIGUSR2, lambda number, frame: stop.set("SIGUSR2"))
    yield stop
    signal.signal(signal.SIGUSR2, former)


def after(seconds: float, what: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=lambda: (time.sleep(seconds), what()), daemon=True)
    thread.start()
    return thread


def test_a_rank_that_is_stopped_while_it_waits_for_the_first_does_not_wait_on(launched, stop):
    launched(WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=free_port())
    after(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    started = time.monotonic()
    with pytest.raises(Interrupted, match="SIGUSR2"):
        open_store(rank=1, world_size=2, timeout=timedelta(seconds=200), stop=stop)
    assert time.monotonic() - started < 100


def test_a_first_rank_that_comes_soon_after_the_stop_is_still_met(launched, stop, monkeypatch):
    monkeypatch.setattr(rendezvous, "_STOPPED_SECONDS", 100.0)
    launched(WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=free_port())
    first = []
    stop.set("SIGUSR2")
    coming = after(1.0, lambda: first.append(open_store(rank=0, world_size=2, timeout=SECONDS)))
    second = open_store(rank=1, world_size=2, timeout=timedelta(seconds=100), stop=stop)
    coming.join()
    second.set("a", "b")
    assert first[0].get("a") == b"b"
