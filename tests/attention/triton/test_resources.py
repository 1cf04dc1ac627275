"""The Triton kernels, compiled without a GPU, by the same command that writes docs/benchmarks/triton_resources.md.

In processes of their own: Triton compiles nothing where its interpreter is on, as in the tests beside this one.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec

import pytest

from bico_ds.attention.triton.tilings import TILINGS
from tests import ROOT

PAGE = (ROOT / "docs" / "benchmarks" / "triton_resources.md").read_text(encoding="utf-8")
RECORDED = re.search(r"With Triton (\S+) ", PAGE).group(1)

if find_spec("triton") is None:
    pytest.skip("Triton is installed on Linux x86-64 only (a dev dependency)", allow_module_level=True)
if metadata.version("triton") != RECORDED:
    # 3.6.0 needs stack where 3.7.1 needs none (docs/benchmarks/lowest_versions.md).
    pytest.skip(f"what kernels take is recorded for Triton {RECORDED}", allow_module_level=True)

TOOL = ROOT / "tools" / "bench" / "triton_resources.py"
ATTENTION = {"forward", "query_gradient", "key_gradient"}
KERNELS = {"rotate", "rotated", "merged", "gathered", "summed"} | ATTENTION
# What a program may have at the most, in bytes, and the tensor-core instruction (CUDA C++ Programming Guide).
SHARED = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
PRODUCTS = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "sm_120": "mma.sync",
}
ARCHITECTURES = [f"sm_{10 * major + minor}" for major, minor in TILINGS]


@functools.cache
def compiled(*options: str) -> list[dict]:
    return json.loads(run_python(str(TOOL), "--json", *options).splitlines()[-1])["rows"]


def run_python(*arguments: str) -> str:
    """Its output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tools" / "bench")))
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def one_tiling(architecture: str) -> list[dict]:
    options = ("--head-dim", "128", "--dtype", "bfloat16", "--mode", "bidirectional")
    return compiled("--architecture", architecture, *options)


def check(rows: list[dict], architecture: str) -> None:
    """What holds for every tiling."""
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["shared"] <= SHARED[architecture] * 1024, row
        assert row["stack"] <= ceilings()[key(row)], row
        if row["kernel"] in ATTENTION:
            assert row["products"] == PRODUCTS[architecture], row


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_fit_every_architecture(architecture):
    check(one_tiling(architecture), architecture)


def test_no_kernel_uses_the_stack_on_hopper():
    assert all(row["stack"] == 0 for row in one_tiling("sm_90"))


def test_loads_of_tiles_are_in_flight_while_others_are_used():
    """Only the numbers of the rows of the key-gradient kernel's gradients are waited for."""
    for row in one_tiling("sm_90"):
        if row["loads"]:
            ahead, of = map(int, row["loads"].split(" of "))
            assert ahead == (of - 2 if row["kernel"] == "key_gradient" else of), row


def test_a_batch_of_another_size_needs_no_other_compilation():
    """Training would stop for seconds at each: sizes are arguments that Triton must not specialize on."""
    done = run_python(
        "-c",
        """if True:
        from tools.bench.triton_resources import compiled, launches, torch

        one, other = (
            launches((9, 0), 128, torch.bfloat16, causal=False, rows=rows, kept=kept)
            for rows, kept in ((8192, 8000), (8191, 7777))
        )
        print(*(compiled(a, (9, 0)) is compiled(b, (9, 0)) for a, b in zip(one, other, strict=True)))
        """,
    )
    assert done.split() == ["True"] * 8


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", ["32", "64", "96", "128", "256"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tiling_fits_its_architecture(architecture, head_dim):
    rows = compiled("--architecture", architecture, "--head-dim", head_dim)
    check(rows, architecture)
    if architecture == "sm_90" and head_dim != "256":
        assert {row["dtype"] for row in rows} == {"bfloat16", "float16"}
        assert {row["mode"] for row in rows} == {"causal", "bidirectional"}
        assert all(row["stack"] == 0 for row in rows), rows


def key(row: dict) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("architecture", "head_dim", "dtype", "mode", "kernel"))


@functools.cache
def ceilings() -> dict[tuple[str, ...], int]:
    """The stack of each kernel that the page records."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"
    ]
    header, _, *rows = lines
    named = [dict(zip((name.replace(" ", "_") for name in header), row, strict=True)) for row in rows]
    return {key(row): int(row["stack"]) for row in named}
