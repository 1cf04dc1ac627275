"""What the launchers tell a process."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch

from bico_ds.common.errors import UserError
from bico_ds.runtime import launch_environment
from bico_ds.runtime.distributed import read_ranks
from tests import ROOT

NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "SLURM_JOB_ID",
    "MASTER_PORT",
    "DS_ACCELERATOR",
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_the_only_rank():
    assert not launch_environment.is_launched()
    assert (launch_environment.rank(), launch_environment.local_rank()) == (0, 0)
    assert launch_environment.world_size() == 1
    assert launch_environment.ranks_per_node() is None
    assert launch_environment.slurm_job() == ""


@pytest.mark.parametrize("ranks_per_node", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_each_launchers_variables_are_read(monkeypatch, ranks_per_node):
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", ranks_per_node: "4"}.items():
        monkeypatch.setenv(name, value)
    assert launch_environment.is_launched()
    assert (launch_environment.rank(), launch_environment.local_rank()) == (5, 1)
    assert (launch_environment.world_size(), launch_environment.ranks_per_node()) == (8, 4)


@pytest.mark.parametrize(
    "text", ["two", "-1", "", "1.0", "²", "٣", "0x1", "9" * 20, "1 2", "\n", "1_0", "+1"]
)
@pytest.mark.parametrize(
    "name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT"]
)
def test_a_variable_that_is_no_number_is_named(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    if not text and name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT"):
        launch_environment.check()  # as if it were not set
        return
    with pytest.raises(UserError, match=f"{name}=.* in the environment is no whole number"):
        launch_environment.check()
    assert launch_environment.telling_rank() == 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 in the environment, but WORLD_SIZE is 2"),
        ({"RANK": "1"}, "RANK=1 in the environment, but WORLD_SIZE is not set, so 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' .* at least 1"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0' .* at least 1"),
        ({"LOCAL_RANK": "2", "LOCAL_SIZE": "2"}, "LOCAL_RANK=2 in the environment, but LOCAL_SIZE is 2"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0' .* from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000' .* from 1 to 65535"),
    ],
)
def test_variables_that_contradict_one_another_are_named(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        launch_environment.check()
    assert launch_environment.telling_rank() == 0, "or nobody would tell it"


def test_torchrun_and_we_mean_the_same(tmp_path):
    """Each rank answers in a file of its own: what ranks print into one pipe may be mixed within a line."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import pathlib, sys\n"
        "from bico_ds.runtime import launch_environment as e\n"
        "place = f'{e.rank()} {e.local_rank()} {e.world_size()} {e.ranks_per_node()}'\n"
        "pathlib.Path(sys.argv[1], f'rank-{e.rank()}').write_text(place)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, str(script), str(tmp_path)], cwd=ROOT, timeout=120, check=True)
    places = {file.name: file.read_text() for file in tmp_path.glob("rank-*")}
    assert places == {"rank-0": "0 0 2 2", "rank-1": "1 1 2 2"}


@pytest.mark.parametrize("text", ["", "nope", "CPU", "xpu"])
def test_an_accelerator_that_is_not_trained_on_is_named_with_those_that_are(monkeypatch, text):
    monkeypatch.setenv("DS_ACCELERATOR", text)
    with pytest.raises(
        UserError, match=f"DS_ACCELERATOR='{text}' in the environment is neither 'cpu' nor 'cuda'"
    ):
        launch_environment.check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_an_accelerator_that_the_machine_lacks_is_refused(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match="DS_ACCELERATOR='cuda' .* finds no CUDA device"):
        read_ranks()


@pytest.mark.parametrize(
    ("given_out", "last"), [("12000\t60999\n", 11_998), ("1024\t65535\n", 65_534), ("", 32_766)]
)
def test_a_free_port_is_none_that_the_system_gives_out_where_there_are_others(
    tmp_path, monkeypatch, given_out, last
):
    (tmp_path / "range").write_text(given_out)
    monkeypatch.setattr(launch_environment, "_GIVEN_OUT", tmp_path / "range")
    port = launch_environment.free_port()
    assert 10_000 <= port <= last
    with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
        pass
