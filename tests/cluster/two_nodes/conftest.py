"""The cluster of the session, the run that others are compared with, and the table of what happened."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.two_nodes.drill import PYTHON, ROOT, TINY, Run, Workspace, native_ops
from tests.cluster.two_nodes.settings import NODES
from tests.cluster.two_nodes.two_nodes import ClusterError, TwoNodes

TABLE = pytest.StashKey[list[tuple[str, str, float]]]()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[TwoNodes]:
    nodes = TwoNodes(tmp_path_factory.mktemp("cluster"))
    try:
        nodes.up()
    except ClusterError as error:
        pytest.exit(f"cluster tests cannot run here: {error}", returncode=1)
    try:
        yield nodes
    finally:
        nodes.down()


@pytest.fixture(scope="session")
def workspace(cluster, tmp_path_factory) -> Workspace:
    space = Workspace(cluster, tmp_path_factory.mktemp("workspace"))
    space.environment["TORCH_EXTENSIONS_DIR"] = str(native_ops())
    built = space.command("launch/slurm/native_ops.py", "tiny_base")
    assert built.returncode == 0, built.stderr
    return space


@pytest.fixture(autouse=True)
def _nothing_left_running(cluster) -> Iterator[None]:
    yield
    cluster.slurm("scancel", "--user", "root", check=False)
    for node in NODES:
        cluster.link(node, "up")
    deadline = time.monotonic() + 60
    while cluster.slurm("squeue", "-h").strip() or cluster.slurm("sinfo", "-h", "-o", "%T").split() != [
        "idle"
    ]:
        assert time.monotonic() < deadline, "the cluster is still busy"
        time.sleep(0.5)


@pytest.fixture(scope="session")
def reference(workspace) -> Run:
    """The same recipe, uninterrupted, on two ranks of this machine, without SLURM."""
    path = workspace.folder / "reference"
    overrides = [part for key in TINY for part in ("--set", key)]
    done = subprocess.run(
        [
            str(Path(PYTHON).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", "29741",
            str(ROOT / "launch" / "train.py"), "--recipe", "tiny_base", "--output-dir", str(path), *overrides,
        ],
        cwd=workspace.folder, env=workspace.variables(), capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Run(workspace.cluster, path, "")


@pytest.fixture
def note(request) -> Iterator[Callable[[str], None]]:
    """Note what happened, for the table at the end."""
    notes: list[str] = []
    started = time.monotonic()
    yield notes.append
    if notes:
        rows = request.config.stash.setdefault(TABLE, [])
        rows.append(
            (
                request.node.name.removeprefix("test_").replace("_", " "),
                "; ".join(notes),
                time.monotonic() - started,
            )
        )


def pytest_terminal_summary(terminalreporter, config) -> None:
    rows = config.stash.get(TABLE, [])
    if not rows:
        return
    lines = ["| drill | what happened | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {what} | {seconds:.0f} |" for name, what, seconds in rows]
    path = ROOT / "build" / "cluster-drills.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    terminalreporter.write_line("\n".join(["", *lines, f"(also in {path})"]))
