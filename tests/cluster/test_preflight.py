"""What the pre-flight concludes from the ranks' reports, and the complete pre-flight on two ranks of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from bico_ds.cluster.preflight import judge, shared
from bico_ds.cluster.preflight.check import preflight
from bico_ds.cluster.preflight.inputs import damaged_stores, input_fingerprints
from bico_ds.config.load import load_recipe
from bico_ds.runtime.launch_environment import free_port
from tests import ROOT
from tests.data.stores import write_store


def report(rank, host, **changes):
    values = {
        "rank": rank,
        "host": host,
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "same": {"program": "aa", "recipe": "bb"},
        "inputs": {"data.sources.0.store (d)": "cc"},
        "disk_free_bytes": 1e12,
        "device": {
            "allocated": 1, "visible": 1, "name": "H100", "memory_free_bytes": 79e9, "memory_total_bytes": 80e9,
            "tflops": 600.0, "right": True,
        },
    }  # fmt: skip
    return values | changes


def problems(*changes, needed=1e9):
    return judge.problems(
        [report(n, f"n{n}", **change) for n, change in enumerate(changes)], needed_bytes=needed
    )


def test_equal_nodes_have_no_problems():
    assert problems({}, {}, {}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"versions": {"torch": "2.12.1", "deepspeed": "0.19.8"}},
            ["torch", "2.12.1 on n1", "2.13.0 on n0, n2"],
        ),
        ({"versions": {"torch": "2.13.0"}}, ["deepspeed", "None on n1"]),
        ({"same": {"program": "xx", "recipe": "bb"}}, ["program", "xx on n1"]),
        (
            {"inputs": {"data.sources.0.store (d)": "missing"}},
            ["data.sources.0.store (d)", "not there on n1"],
        ),
        ({"inputs": {"data.sources.0.store (d)": "zz"}}, ["content of", "zz on n1"]),
        ({"damaged": ["data.sources.0.store: token store 'd' is damaged"]}, ["'d' is damaged (n1)"]),
        ({"disk_free_bytes": 1e6}, ["0.001 GB free on n1", "1.000 GB"]),
        ({"device": report(0, "")["device"] | {"visible": 0}}, ["rank 1 on n1", "torch sees 0"]),
        (
            {"device": report(0, "")["device"] | {"memory_free_bytes": 20e9}},
            ["20.0 of 80.0 GB free", "another process"],
        ),
        ({"device": report(0, "")["device"] | {"right": False}}, ["rank 1 on n1", "wrong results"]),
        ({"device": report(0, "")["device"] | {"error": "ECC"}}, ["rank 1 on n1", "ECC"]),
    ],
)
def test_the_odd_node_is_named(change, words):
    found = problems({}, change, {})
    assert len(found) == 1
    assert all(word in found[0] for word in words), found


def test_the_slow_node_is_named_and_its_neighbours_are_not():
    links = {("n0", "n1"): 20.0, ("n1", "n2"): 3.0, ("n2", "n3"): 3.0, ("n3", "n0"): 21.0}
    assert judge.slow(judge.node_speeds(links)) == ["n2"]
    assert judge.slow({"rank 0": 600.0, "rank 1": 590.0, "rank 2": 100.0}) == ["rank 2"]


def test_a_wrong_clock_is_named():
    assert judge.clock_problems([("n0", 1000.0), ("n1", 1001.0)]) == []
    assert "n1 is +60 s" in judge.clock_problems([("n0", 1000.0), ("n1", 1060.0)])[0]


def test_a_folder_that_is_not_shared_is_noticed(tmp_path):
    token = shared.write_probe(tmp_path / "here", "0")
    assert shared.sees_probe(tmp_path / "here", "0", token, seconds=0)
    assert not shared.sees_probe(tmp_path / "there", "0", token, seconds=0)
    assert not shared.sees_probe(tmp_path / "here", "0", "of another start", seconds=0)


def test_a_changed_byte_changes_the_fingerprint(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "tokens.bin").write_bytes(bytes(3 << 20))
    recipe = load_recipe("tiny_base", [f"data.sources.0={{store: {store}}}"])
    before = input_fingerprints(recipe)
    with open(store / "tokens.bin", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert input_fingerprints(recipe) != before


def test_a_store_with_impossible_columns_is_named(tmp_path):
    store = write_store(tmp_path / "s", [3, 4, 5])
    recipe = load_recipe("tiny_bico", [f"data.sources=[{{store: {store.path}}}]"])
    assert list(damaged_stores(recipe)) == []
    np.array([0, 8, 7, 12]).tofile(store.path / "offsets.bin")
    (problem,) = damaged_stores(recipe)
    assert problem.startswith("data.sources.0.store: ") and "offsets.bin: document 1" in problem


def test_an_objective_of_the_users_own_must_be_the_same_on_every_node(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("VERSION = 1\n")
    recipe = load_recipe("tiny_base", [f"imports=[{mine}]"])
    before = input_fingerprints(recipe)
    assert next(iter(before)) == f"imports.0 ({mine})"
    mine.write_text("VERSION = 2\n")
    assert input_fingerprints(recipe) != before


@pytest.mark.parametrize("without", [[0], [1], [2], [0, 1, 2]])
@pytest.mark.parametrize("inputs", [{}, {"model.path (m/x)": "missing"}])
def test_an_input_that_is_not_on_every_node_is_named_with_the_nodes(without, inputs):
    """A node without the folder may take `m/x` for a hub name, and then does not report it."""
    if len(without) == 3 and not inputs:
        inputs = {"model.path (m/x)": "missing"}
    there = {"inputs": {"model.path (m/x)": "cc"}}
    found = problems(*({"inputs": inputs} if node in without else there for node in range(3)))
    assert found == [f"model.path (m/x) is not there on {', '.join(f'n{node}' for node in without)}"]


def test_a_disk_of_checkpoints_that_is_not_mounted_is_noticed_on_its_node(tmp_path, capsys):
    recipe = load_recipe("tiny_base", [f"data.cache_dir={tmp_path / 'data'}"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to("/nowhere/mounted")
    assert not preflight(recipe, run)
    assert "cannot write there: it is a link to '/nowhere/mounted', which is not there" in flat(capsys)
    (run / "checkpoints").unlink()
    disk = tmp_path / "disk"
    disk.mkdir()
    (run / "checkpoints").symlink_to(disk)
    assert preflight(recipe, run), capsys.readouterr()
    assert list(disk.iterdir()) == []


def test_a_node_whose_attention_backends_are_wrong_is_refused_by_name(tmp_path, capsys):
    recipe = load_recipe("tiny_base", [f"data.cache_dir={tmp_path / 'data'}"])
    asked = []

    def check(*, on_cuda: bool) -> list[str]:
        asked.append(on_cuda)
        return ["the check of the attention backends: wrong: aten-cuda"] * (len(asked) == 1)

    assert not preflight(recipe, tmp_path / "run", node_problems=check)
    assert f"pre-flight: {socket.gethostname()}: the check of the attention backends: wrong" in flat(capsys)
    assert preflight(recipe, tmp_path / "run", node_problems=check)
    assert asked == [torch.cuda.is_available()] * 2


def flat(capsys) -> str:
    """What was printed, on one line."""
    return " ".join("".join(capsys.readouterr()).split())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([[], []], "all-reduce"),
        ([[], ["--set", "seed=9"]], "this recipe differs"),
        (
            [
                [
                    "--set",
                    "model.config.intermediate_size=16000000",
                    "--set",
                    "model.config.num_hidden_layers=12",
                ]
            ]
            * 2,
            "of memory, and this run needs at least",
        ),
    ],
)
def test_two_ranks_agree_whether_training_may_begin(tmp_path, changes, says):
    """With another recipe on rank 1, and where no memory holds the model, both must refuse."""
    port = free_port()
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [
            sys.executable,
            str(ROOT / "launch" / "preflight.py"),
            "--recipe",
            "tiny_base",
            *changes[rank],
        ]
        ranks.append(
            subprocess.Popen(
                [*command, "--output-dir", "run"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [int(says != "all-reduce")] * 2, outputs
    assert says in outputs[0] and says not in outputs[1]
    assert list((tmp_path / "run").glob(".preflight-*")) == [], "probes are cleaned away"
