"""The store in which ranks meet: opened by rank 0, and on one node out of reach of other machines.

torch's own store listens on all interfaces, and asks nobody who he is: whoever reaches it can end a run. One process has a
store in its own memory; ranks of one node have one on the loopback interface. Several nodes need it on the network, where a
firewall has to keep others away; so does torchrun, which opens a store of its own before the ranks start.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
import time
from concurrent.futures import Future
from datetime import timedelta

from torch.distributed import DistNetworkError, HashStore, Store, TCPStore

from bico_ds.common.errors import RunError, UserError
from bico_ds.runtime import launch_environment
from bico_ds.runtime.signals import Interrupted, StopFlag

LOOPBACK = "127.0.0.1"
# A name server that does not answer may in a moment; torch itself would ask until its timeout, which is half an hour.
_NAME_SECONDS = 5.0
# A rank 0 that comes so soon after the stop has all ranks agree on it; one that was stopped, too, is not coming.
_STOPPED_SECONDS = 20.0
_POLL_SECONDS = 0.5
_WAITING_CONNECTIONS = 4096
_LOOPBACK_INTERFACE = "lo"


def open_store(
    *, rank: int, world_size: int, port_offset: int = 0, timeout: timedelta, stop: StopFlag | None = None
) -> Store:
    """The store of all ranks, by the launcher's MASTER_ADDR and MASTER_PORT, plus `port_offset`; it waits for nobody.

    Keeps gloo, too, on the loopback interface where all ranks are on this node. `timeout` bounds how long rank 0 is waited
    for, and every later operation. Raises `UserError` where an address or a port cannot be used, `RunError` where rank 0
    cannot be reached, and `Interrupted` where it does not come soon after `stop` was set.
    """
    launch_environment.check()
    if world_size == 1:
        stay_on_this_node()
        return HashStore()
    address, port = _meeting_point(port_offset)
    if port_offset == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):  # torchrun's own
        if launch_environment.is_one_node():
            stay_on_this_node()
        return _joined(rank, address, port, world_size, timeout, stop)
    if launch_environment.is_one_node() or _is_loopback(address):
        stay_on_this_node()
        # On all ranks alike: DeepSpeed names its shared memory by it.
        os.environ["MASTER_ADDR"] = address = LOOPBACK
        if rank == 0:
            return _served_on_loopback(port, world_size, timeout)
    _refuse_unknown(address)
    if rank == 0:
        return _served_on_all_interfaces(address, port, world_size, timeout)
    return _joined(rank, address, port, world_size, timeout, stop)


def stay_on_this_node() -> None:
    """Let gloo listen on the loopback interface alone, unless the user has named another; to be called before it begins."""
    if _LOOPBACK_INTERFACE in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)


def _meeting_point(port_offset: int) -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR"), launch_environment.master_port()
    if not address or port is None:
        missing = " and ".join(
            name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value
        )
        verb = "are" if " and " in missing else "is"
        raise UserError(f"{missing} {verb} not set: start several ranks by deepspeed, torchrun or srun")
    if port + port_offset > launch_environment.LARGEST_PORT:
        raise UserError(
            f"MASTER_PORT={port}: the {port_offset} ports after it are needed, too; choose a smaller one"
        )
    return address, port + port_offset


def _served_on_loopback(port: int, world_size: int, timeout: timedelta) -> Store:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
            listener.listen(_WAITING_CONNECTIONS)
        except OSError as error:
            raise _cannot_listen(port, error) from None
        return TCPStore(
            LOOPBACK,
            port,
            world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def _served_on_all_interfaces(address: str, port: int, world_size: int, timeout: timedelta) -> Store:
    with socket.socket() as probe:  # torch's message of a port in use has no errno
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise _cannot_listen(port, error) from None
    try:
        return TCPStore(address, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
    except DistNetworkError as error:
        raise UserError(
            f"MASTER_ADDR={address}: rank 0 does not reach itself there, so that no other rank can, or MASTER_PORT={port} "
            f"is in use ({_first_line(error)}); MASTER_ADDR is to name the node of rank 0"
        ) from None


def _joined(
    rank: int, address: str, port: int, world_size: int, timeout: timedelta, stop: StopFlag | None
) -> Store:
    """Torch waits in another thread: where it waits, no handler of a signal runs."""
    found: Future[Store] = Future()

    def join() -> None:
        try:
            found.set_result(
                TCPStore(address, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False)
            )
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=join, daemon=True).start()
    try:
        return _found_or_stopped(found, stop)
    except DistNetworkError as error:
        raise RunError(
            f"rank {rank} on {socket.gethostname()} does not reach rank 0 at MASTER_ADDR={address}, MASTER_PORT={port}: "
            f"it has not started, or a firewall is between ({_first_line(error)})"
        ) from None


def _found_or_stopped(found: Future[Store], stop: StopFlag | None) -> Store:
    patience = _STOPPED_SECONDS
    while True:
        try:
            return found.result(timeout=_POLL_SECONDS)
        except TimeoutError:
            if not stop:
                continue
            patience -= _POLL_SECONDS
            if patience < 0:
                raise Interrupted(stop.reason) from None


def _cannot_listen(port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"MASTER_PORT={port} is in use on {socket.gethostname()}, by another run perhaps: choose another port "
            "(deepspeed --master_port, torchrun --master-port)"
        )
    return UserError(f"MASTER_PORT={port}: cannot listen there: {error.strerror}; choose another port")


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _refuse_unknown(address: str) -> None:
    """Raise `UserError` for the name of no machine: torch would ask for it until its timeout."""
    deadline = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) != socket.EAI_AGAIN or time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR={address[:80]!r}: {socket.gethostname()} knows no machine of this name "
                    f"({getattr(error, 'strerror', None) or error}); it is to name the node of rank 0"
                ) from None
        time.sleep(0.5)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
