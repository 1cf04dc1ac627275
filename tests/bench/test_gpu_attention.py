"""tools/bench/gpu_attention.py, rehearsed on a CPU: what it measures on a GPU has run before, and it finds what is wrong."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time

import attention_cases
import pytest
import torch
from attention_cases import Ended

from bico_ds.attention.oracle import oracle_attention
from bico_ds.attention.plan import build_plan
from tests import ROOT
from tests.proof.rehearsal import checked, reads_rehearsal
from tools.bench import gpu_attention, gpu_policy

BENCH = ROOT / "tools" / "bench"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@reads_rehearsal
def test_the_rehearsal_times_every_way_to_compute_attention(rehearsal):
    assert rehearsal.log("speed").startswith("REHEARSAL")
    found = rehearsal.findings("speed")
    timed = found["tables"][0]
    plain = "cpu-flash with torch's operations around it"
    ways = ["cpu-flash", "cpu-flash alone", plain, "the authors' dense form"]
    assert timed["columns"] == ["documents", *ways, *(["triton"] if HAS_TRITON else [])]
    names = [row["name"] for row in found["rows"]]
    assert "the op on cpu-flash beside cpu-flash alone, 24 tokens, causal" in names
    assert {f"the op on cpu-flash beside {plain}, 12 tokens, {mode}" for mode in gpu_attention.MODES} <= {
        *names
    }
    assert any("beside the authors' dense form, 12 tokens, bidirectional" in name for name in names)
    if HAS_TRITON:
        assert "triton beside two passes on cpu-flash, 24 tokens, bidirectional, 3% live" in names
        # Launches, without live rows and with some.
        assert {row[1] for row in found["tables"][1]["rows"]} == {5, 7}


WITH_BAD_KERNELS = """
import os, sys
sys.path.insert(0, {bench!r})
import gpu_attention
from bico_ds.attention.kernels.cpu_flash import CpuFlash


class OffByOnePercent(CpuFlash):
    name = "off-by-one-percent"

    def forward(self, *inputs, **settings):
        out, lse = super().forward(*inputs, **settings)
        return out * 1.01, lse


class Dies(CpuFlash):
    name = "dies"

    def forward(self, *inputs, **settings):
        os._exit(7)


class Raises(CpuFlash):
    name = "raises"

    def forward(self, *inputs, **settings):
        raise RuntimeError("an illegal memory access")


class NotFinite(CpuFlash):
    name = "not-finite"

    def forward(self, *inputs, **settings):
        out, lse = super().forward(*inputs, **settings)
        return out * float("nan"), lse


for kernel in (OffByOnePercent(), Dies(), Raises(), NotFinite()):
    gpu_attention.KERNELS[kernel.name] = kernel
if __name__ == "__main__":
    gpu_attention.main.start(["--part", "check", "--rehearse", "--json", "--seconds", "270"])
"""


def test_a_wrong_a_raising_and_a_dying_backend_are_named_and_cost_no_other_its_figures(tmp_path):
    script = tmp_path / "with_bad_kernels.py"
    script.write_text(WITH_BAD_KERNELS.format(bench=str(BENCH)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    found = checked(done.stdout.splitlines()[-1])
    said = "\n".join(found["wrong"])
    (table,) = found["tables"]
    right = {(name, dtype): count for name, dtype, _, count, *_ in table["rows"]}
    bad = ("off-by-one-percent", "not-finite")
    good = {"cpu-flash": 4, "dense tiles": 2, **({"triton": 4} if HAS_TRITON else {})}
    dtypes = ("float32", "float16")
    assert right == {(name, dtype): f"{n} of {n}" for name, n in good.items() for dtype in dtypes} | {
        (name, dtype): "0 of 4" for name in bad for dtype in dtypes
    }
    assert "off-by-one-percent, causal, float16, head dimension 16: scale 1.0e-02" in said
    assert "not-finite, bidirectional, float32, head dimension 16: scale not finite" in said
    assert "check: raises: RuntimeError: an illegal memory access" in said
    assert "check: dies: its process died, exit code 7" in said
    assert "cpu-flash" not in said and "triton" not in said and "tiles" not in said.replace("in tiles", "")


def hangs(send):
    time.sleep(1000)


# By the second, none has begun too late to be judged, however long its start took on a busy machine.
@pytest.mark.parametrize(("patience", "excused"), [(30.0, True), (-1000.0, False)])
def test_a_backend_that_hangs_is_wrong_and_one_that_began_too_late_is_not(patience, excused, monkeypatch):
    monkeypatch.setattr(attention_cases, "FIRST_FIGURE_S", patience)
    started = time.monotonic()
    (ended,) = attention_cases.each_alone(hangs, deadline=started + 0.2)
    assert ended == Ended(problem="was not done within --seconds", excused=excused, late=True)
    assert time.monotonic() - started < 200


def hangs_when_it_is_done(send):
    threading.Thread(target=time.sleep, args=(1000,)).start()


def test_a_process_that_hangs_when_it_is_done_has_done_its_work(monkeypatch):
    monkeypatch.setattr(attention_cases, "_SECONDS_TO_LEAVE", 0.1)
    started = time.monotonic()
    (ended,) = attention_cases.each_alone(hangs_when_it_is_done, deadline=started + 200)
    assert ended == Ended(problem=None)
    assert time.monotonic() - started < 200


@pytest.mark.parametrize(("part", "left_out"), [("check", ["cpu-flash", "dense tiles"]), ("speed", [])])
def test_a_check_says_which_backends_it_had_no_time_for(part, left_out, monkeypatch):
    late = Ended(problem="was not done within --seconds", excused=True, late=True)
    monkeypatch.setattr(gpu_attention, "each_alone", lambda *_, deadline: iter([late]))
    monkeypatch.setattr(gpu_attention, "AUTO_ORDER", ("cpu-flash",))
    monkeypatch.setattr(
        gpu_attention, "refusal", lambda name, _: None if name in ("cpu-flash", "dense tiles") else "is away"
    )
    found = gpu_attention.Findings()
    assert gpu_attention.measure(part, gpu_attention.ON_CPU, 0.0, found) == []
    assert found.left_out == left_out and not found.wrong


def test_the_authors_form_is_the_formula():
    length, documents, heads = 9, 3, (4, 2)
    q, k, v = (
        torch.randn(length * documents, n, 16, dtype=torch.float64, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    angle = torch.randn(length * documents, 8, dtype=torch.float64).repeat(1, 2)
    tables = angle.cos(), angle.sin()
    plan = build_plan("bidirectional", kept_lengths=[length] * documents)
    expected = oracle_attention(q, k, v, *tables, plan, None)
    found = gpu_attention.authors_dense(q, k, v, *tables, length=length)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # its softmax is in fp32


def test_operations_are_those_that_the_mask_needs():
    shape = gpu_attention.Shape(heads=3, head_dim=16)
    causal = build_plan("causal", kept_lengths=[2, 3])
    live = build_plan("bidirectional", kept_lengths=[2, 3], live_document=[1], live_split=[2])
    per_pair = (
        3.5 * 2 * 2 * 3 * 16
    )  # two products forward, five backward, of a multiplication and an addition
    assert gpu_attention.teraflop(causal, shape) * 1e12 == pytest.approx((3 + 6) * per_pair)
    assert gpu_attention.teraflop(live, shape) * 1e12 == pytest.approx((4 + 9 + 3) * per_pair)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("bench", [gpu_attention, gpu_policy])
def test_without_a_gpu_there_is_one_line_and_exit_code_2(bench, capsys):
    assert bench.main([]) == 2
    assert capsys.readouterr().err == (
        "error: no CUDA device: nothing to measure (--rehearse runs all of it on the CPU)\n"
    )
