"""Configuration files of the test cluster: slurm.conf and what belongs to it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

NODES = ("n1", "n2")
BRIDGE = "bico-ci0"
CONTROLLER_ADDRESS = "10.77.0.1"
ADDRESSES = {"n1": "10.77.0.11", "n2": "10.77.0.12"}

SLURM_CONF = """\
ClusterName=bico-ci
SlurmctldHost={host}({controller})
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# 120 s by default, for which a requeued job waits
AuthInfo=socket={folder}/munge.sock,cred_expire={credential_seconds}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# the nodes may claim more cores than the machine has
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
ReturnToService=2
# a node that is cut off is missed after 10 s
SlurmdTimeout=10
# Shorter than KillWait, as in SLURM's defaults (10 s and 30 s): the controller then repeats the end of a step
# that was slow to die, which the batch script must survive.
MessageTimeout=5
KillWait={kill_wait}
JobRequeue=1
GresTypes=gpu
NodeName=n[1-2] NodeAddr=10.77.0.1[1-2] CPUs=2 RealMemory=8000 Gres=gpu:1 State=UNKNOWN
PartitionName=ci Nodes=ALL Default=YES MaxTime=30 State=UP
"""

CGROUP_CONF = """\
CgroupPlugin=cgroup/{version}
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
"""

# A device file of its own: a bare Count= marks the nodes invalid. Jobs with --gpus-per-node can be scheduled;
# no GPU is there.
GRES_CONF = """\
AutoDetect=off
NodeName=n[1-2] Name=gpu File={folder}/gpu0
"""

SSHD_CONFIG = """\
HostKey {folder}/ssh_key
AuthorizedKeysFile {folder}/ssh_key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
"""

SSH_CONFIG = """\
IdentityFile {folder}/ssh_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""

CREDENTIAL_SECONDS = 5
KILL_WAIT_SECONDS = 10  # between SIGTERM and SIGKILL of a job that is requeued or cancelled


def namespace(node: str) -> str:
    """The network namespace that is a node."""
    return f"bico-{node}"


def write_settings(folder: Path) -> None:
    """Write everything that the daemons read, keys included."""
    (folder / "state").mkdir(exist_ok=True)
    for node in NODES:
        (folder / f"spool.{node}").mkdir(exist_ok=True)
    values = {
        "folder": folder, "host": socket.gethostname(), "controller": CONTROLLER_ADDRESS,
        "kill_wait": KILL_WAIT_SECONDS, "credential_seconds": CREDENTIAL_SECONDS, "version": cgroup_version(),
    }  # fmt: skip
    templates = {
        "slurm.conf": SLURM_CONF, "cgroup.conf": CGROUP_CONF, "gres.conf": GRES_CONF,
        "sshd_config": SSHD_CONFIG, "ssh_config": SSH_CONFIG,
    }  # fmt: skip
    for name, template in templates.items():
        (folder / name).write_text(template.format(**values))
    hosts = ["127.0.0.1 localhost", f"{CONTROLLER_ADDRESS} {socket.gethostname()}"]
    hosts += [f"{address} {node}" for node, address in ADDRESSES.items()]
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    write_keys(folder)
    os.mknod(folder / "gpu0", 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def write_keys(folder: Path) -> None:
    munge_key = folder / "munge.key"
    munge_key.write_bytes(os.urandom(1024))
    munge_key.chmod(0o400)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "ssh_key")], check=True)


def cgroup_version() -> str:
    return "v2" if Path("/sys/fs/cgroup/cgroup.controllers").is_file() else "v1"
