#!/usr/bin/env python
"""A SLURM cluster of two nodes on this one machine, for tests: real slurmctld, slurmd and network links.

    COMMAND up                    install what is missing, start, print the variables to export
    COMMAND run n1 -- hostname    run a command on a node, past SLURM
    COMMAND link n2 down          cut a node's network; `link n2 up` restores it
    COMMAND down                  end everything that `up` started, and remove its folder

COMMAND is `python -m tests.cluster.two_nodes.two_nodes`, as root, from the checkout.

Each node is a network namespace with an address of its own, joined by a bridge; processes, /tmp and the home
directory are shared. So a missing shared file system stays invisible here. Needs Linux, root, and Debian's
packages slurm-wlm, munge, iproute2, openssh-server and pdsh (`up` installs them by apt-get; their services
are not started).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bico_ds.config.arguments import local_path
from tests.cluster.two_nodes.settings import (
    ADDRESSES,
    BRIDGE,
    CONTROLLER_ADDRESS,
    NODES,
    namespace,
    write_settings,
)

PACKAGES = {
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
}
DEFAULT_FOLDER = Path("/tmp/bico-ds-cluster")
START_SECONDS = 30
SMALL_DISK_MB = 12


class ClusterError(RuntimeError):
    """The cluster cannot run here; the message gives the reason and what to do."""


class TwoNodes:
    """The cluster that lives in one folder: its configuration, logs, and the list of processes it started."""

    def __init__(self, folder: Path = DEFAULT_FOLDER) -> None:
        self.folder = folder
        self._record = folder / "processes.json"

    @property
    def environment(self) -> dict[str, str]:
        """What a shell needs to talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def up(self) -> None:
        """Install what is missing and start; returns when both nodes are idle. Raises `ClusterError`."""
        check_host()
        install_packages()
        if self._record.is_file():
            raise ClusterError(f"a cluster was started from {self.folder} already; run `down` first")
        if Path("/run/netns", namespace(NODES[0])).exists() or interface_exists(BRIDGE):
            raise ClusterError(
                f"the bridge {BRIDGE} or the namespace {namespace(NODES[0])} exists: "
                "another test cluster runs on this machine; end it with its own `down`"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        self._record.write_text("[]\n")
        try:
            write_settings(self.folder)
            make_network()
            self._mount_small_disk()
            self._start_daemons()
            self._wait_until_idle()
        except BaseException:
            self.down(keep_logs=True)
            raise

    def down(self, *, keep_logs: bool = False) -> None:
        """End the daemons, every process on the nodes, the network, and the folder. Safe to call twice."""
        if self._record.is_file():
            with contextlib.suppress(subprocess.SubprocessError, OSError):
                self.slurm("scancel", "--user", "root", check=False, timeout=10)
            end_processes(json.loads(self._record.read_text()))
            self._record.unlink()
            remove_network()
            for mount in mounts_below(self.folder):
                subprocess.run(["umount", "--lazy", mount], check=False)
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)

    def link(self, node: str, state: str) -> None:
        """Cut (`down`) or restore (`up`) a node's network cable."""
        run("ip", "link", "set", f"{namespace(node)}-br", state)

    def slurm(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Run a SLURM client on the controller's side; return its output."""
        done = subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def on_node(self, node: str, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a node, past SLURM."""
        return [*enter(node, self.folder), *command]

    def start_on(
        self, node: str, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process on a node that `down` ends."""
        return self._start(self.on_node(node, command), log, environment)

    @property
    def small_disk(self) -> Path:
        """A disk of a few MB that both nodes see, for what must happen when a disk is full."""
        return self.folder / "small-disk"

    def _mount_small_disk(self) -> None:
        self.small_disk.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m", "tmpfs", str(self.small_disk))

    def _start_daemons(self) -> None:
        folder = self.folder
        munge = [
            "munged", "--foreground", "--force",
            f"--socket={folder}/munge.sock", f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        ]  # fmt: skip
        self._start(munge, folder / "munged.out")
        wait_for(lambda: (folder / "munge.sock").exists(), "munged opens no socket", folder / "munged.log")
        self._start(["slurmctld", "-D", "-i", "-f", str(folder / "slurm.conf")], folder / "slurmctld.out")
        for node in NODES:
            slurmd = ["slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf")]
            self.start_on(node, slurmd, log=folder / f"slurmd.{node}.out")
            sshd = [
                "/usr/sbin/sshd",
                "-D",
                "-e",
                "-f",
                str(folder / "sshd_config"),
                "-o",
                f"ListenAddress={ADDRESSES[node]}",
            ]
            self.start_on(node, sshd, log=folder / f"sshd.{node}.out")

    def _start(
        self, command: list[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env=os.environ | self.environment | dict(environment or {}),
            )  # fmt: skip
        known = json.loads(self._record.read_text())
        self._record.write_text(json.dumps([*known, [process.pid, start_time(process.pid)]]) + "\n")
        return process

    def _wait_until_idle(self) -> None:
        def idle() -> bool:
            return self.slurm("sinfo", "--noheader", "--format=%T", check=False).split() == ["idle"]

        wait_for(idle, "the nodes do not become idle", self.folder / "slurmctld.log")


def check_host() -> None:
    """Raise `ClusterError` where the cluster cannot run."""
    if sys.platform != "linux":
        raise ClusterError("the test cluster needs Linux (network namespaces)")
    if os.geteuid() != 0:
        raise ClusterError(
            "the test cluster needs root (network namespaces, slurmd); run it with sudo or in a container"
        )


def install_packages() -> None:
    """Install the missing Debian packages, without starting their services."""
    search = os.environ["PATH"] + ":/usr/sbin:/sbin"
    os.environ["PATH"] = search
    missing = sorted({package for command, package in PACKAGES.items() if shutil.which(command) is None})
    if not missing:
        return
    by_hand = f"install them by hand: {' '.join(missing)}"
    if shutil.which("apt-get") is None:
        raise ClusterError(f"the test cluster needs Debian's packages, and there is no apt-get; {by_hand}")
    # At run level 1 invoke-rc.d starts nothing.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    for command in (install, ["apt-get", "update"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if command is install and done.returncode == 0:
            return
    raise ClusterError(f"apt-get failed: {done.stderr.strip()[-500:]}; {by_hand}")


def make_network() -> None:
    """A bridge with the controller's address, and a namespace with a cable to it for each node."""
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "addr", "add", f"{CONTROLLER_ADDRESS}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    for node in NODES:
        space = namespace(node)
        run("ip", "netns", "add", space)
        run("ip", "link", "add", f"{space}-br", "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", f"{space}-br", "master", BRIDGE, "up")
        run("ip", "-n", space, "addr", "add", f"{ADDRESSES[node]}/24", "dev", "eth0")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        run("ip", "-n", space, "link", "set", "lo", "up")


def remove_network() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", namespace(node)], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def enter(node: str, folder: Path) -> list[str]:
    """Command prefix that enters a node: its network, its host name, its /etc/hosts.

    Not `ip netns exec`, which mounts another /sys: slurmd then finds no cgroups and ends.
    """
    setup = f'hostname {node}; mount --bind {folder}/hosts /etc/hosts; mkdir -p /run/sshd; exec "$@"'
    return [
        "nsenter",
        f"--net=/run/netns/{namespace(node)}",
        "unshare",
        "--uts",
        "--mount",
        "sh",
        "-c",
        setup,
        "sh",
    ]


def end_processes(recorded: list[list[int]]) -> None:
    """End what was recorded, and all that lives in the nodes' namespaces: TERM, then KILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        pids = [pid for pid, started in recorded if start_time(pid) == started]
        pids += [pid for node in NODES for pid in processes_on(node)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(start_time(pid) is not None for pid in pids):
            reap()
            time.sleep(0.1)


def processes_on(node: str) -> list[int]:
    """Processes in a node's network namespace: nobody but this cluster starts any there."""
    done = subprocess.run(
        ["ip", "netns", "pids", namespace(node)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in done.stdout.split()]


def reap() -> None:
    """Collect dead children, which would look alive for ever."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def start_time(pid: int) -> int | None:
    """Kernel start time of a process: with the pid it names one process for ever; None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def mounts_below(folder: Path) -> list[str]:
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{folder}/")]


def interface_exists(name: str) -> bool:
    return name in {name for _, name in socket.if_nameindex()}


def wait_for(condition: Callable[[], bool], complaint: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            tail = "\n".join(log.read_text().splitlines()[-15:]) if log.is_file() else ""
            raise ClusterError(f"{complaint} within {START_SECONDS} s; the end of {log}:\n{tail}")
        time.sleep(0.2)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=local_path, default=DEFAULT_FOLDER, help=f"where it lives (default {DEFAULT_FOLDER})"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("up", help="start")
    down = actions.add_parser("down", help="end and remove")
    down.add_argument("--keep-logs", action="store_true", help="leave the folder for reading")
    link = actions.add_parser("link", help="cut or restore a node's network")
    link.add_argument("node", choices=NODES)
    link.add_argument("state", choices=("up", "down"))
    on_node = actions.add_parser("run", help="run a command on a node")
    on_node.add_argument("node", choices=NODES)
    on_node.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    cluster = TwoNodes(arguments.folder.resolve())
    try:
        return act(cluster, arguments)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def act(cluster: TwoNodes, arguments: argparse.Namespace) -> int:
    if arguments.action == "up":
        cluster.up()
        print("\n".join(f"export {name}={value}" for name, value in cluster.environment.items()))
    elif arguments.action == "down":
        cluster.down(keep_logs=arguments.keep_logs)
    elif arguments.action == "link":
        cluster.link(arguments.node, arguments.state)
    else:
        command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
        return subprocess.run(cluster.on_node(arguments.node, command), check=False).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
