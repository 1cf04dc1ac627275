"""tools/bench/gpu_policy.py: its arithmetic on invented times, and all of it rehearsed on a CPU."""

from __future__ import annotations

import importlib.util
import json
import math
import random

import pytest
import torch

from bico_ds.attention.layout import CUDA_POLICY, build_layout
from bico_ds.attention.measured_policy import KernelTime, read_measured_policy
from bico_ds.common.errors import UserError
from tests.proof.rehearsal import reads_rehearsal
from tools.bench import gpu_policy
from tools.bench.gpu_policy import Crossing, LiveCost, Speed, crossover, pair_cost

LENGTHS = gpu_policy.ON_GPU.lengths
HAS_TRITON = importlib.util.find_spec("triton") is not None


def times_crossing_at(length, *, steepness=0.7, lengths=LENGTHS):
    """Of a flash kernel and another way, whose ratio is a power of the length and 1 at `length`."""
    flash = [random.uniform(0.1, 9) for _ in lengths]
    return [(n, ms, ms * (n / length) ** steepness) for n, ms in zip(lengths, flash, strict=True)]


@pytest.mark.parametrize("steepness", [0.1, 1.0])
def test_a_crossover_is_found_between_two_lengths(steepness):
    length = random.uniform(41, 8000)
    assert crossover(times_crossing_at(length, steepness=steepness)) == pytest.approx(length)


def test_a_crossover_at_a_measured_length_is_that_length():
    assert crossover(times_crossing_at(512)) == pytest.approx(512)


def test_flash_that_is_always_faster_takes_every_document():
    assert crossover(times_crossing_at(7)) == 1


def test_flash_that_is_never_faster_takes_what_is_as_long_as_the_longest_document_measured():
    assert crossover(times_crossing_at(10**6)) == LENGTHS[-1]
    assert crossover(times_crossing_at(10**6, lengths=LENGTHS[:3])) == LENGTHS[2]


def test_of_several_crossings_the_last_one_counts():
    times = [(40, 1.0, 2.0), (64, 1.0, 0.5), (128, 1.0, 2.0), (256, 1.0, 4.0)]
    assert crossover(times) == pytest.approx(math.sqrt(64 * 128))


def test_measured_costs_send_live_rows_where_the_invented_times_are_shorter():
    """As `LayoutPolicy` uses them: milliseconds per pair are invented, and the layout must choose the faster way."""
    chosen = set()
    for live in range(1, 40):
        kept, unit = 40, random.uniform(1e-6, 1e-3)
        per_live, per_hidden = 6.0 * unit, 1.5 * unit
        plain, apart = unit * kept**2, unit * kept**2 + per_live * live * kept
        hidden = per_hidden * (kept + live) ** 2
        units = {"plain_ms": plain, "plain_pairs": kept**2}
        policy = gpu_policy.replace(
            CUDA_POLICY,
            tile_cost=pair_cost(apart - plain, live * kept, **units),
            hidden_cost=pair_cost(hidden, (kept + live) ** 2, **units),
        )
        plan = gpu_policy.build_plan(
            "bidirectional", kept_lengths=[kept], live_document=[0] * live, live_split=[1] * live
        )
        hides = build_layout(plan, policy).flash[0].hidden is not None
        assert hides == (hidden < apart)
        chosen.add(hides)
    assert chosen == {True, False}


def test_a_cost_lost_in_noise_is_small_and_positive():
    assert pair_cost(-0.1, 100, plain_ms=1.0, plain_pairs=1600) == 1e-3


def found_items(*, modes=gpu_policy.MODES, live=True):
    crossings = [
        Crossing(
            kernel="aten-cuda",
            other="triton",
            head_dim=128,
            mode=mode,
            times=tuple(times_crossing_at(length)),
        )
        for mode, length in zip(modes, (700, 300), strict=False)
    ]
    costs = [
        LiveCost(kernel="aten-cuda", other="triton", head_dim=128, length=512, share=0.1, cost=c, hidden=h)
        for c, h in ((1.0, 1.5), (9.0, 1.4), (2.0, None))
    ]
    return crossings + (costs if live else [])


def test_a_measurement_holds_the_crossovers_and_median_costs():
    one = gpu_policy.measurement("aten-cuda", 128, found_items())
    assert (one.triton.flash_from, one.triton.causal_flash_from, one.triton.live_cost) == (700, 300, 2.0)
    assert one.hidden_cost == pytest.approx(1.45)
    assert one.tiles is None


@pytest.mark.parametrize("missing", [{"modes": ("bidirectional",)}, {"live": False}])
def test_what_was_cut_midway_is_not_written_as_measured(missing):
    assert gpu_policy.measurement("aten-cuda", 128, found_items(**missing)).triton is None


def test_no_backend_is_written_as_right_that_the_same_run_did_not_compare():
    policy = gpu_policy.assemble(found_items(), (0, 0), rehearsal=True)
    assert policy.measurements and not policy.comparisons
    assert "was not compared with the oracle" in policy.objection("triton", torch.bfloat16, 128)


def speed(kernel, *milliseconds, head_dim=128):
    times = [KernelTime(mode="causal", length=2**n, ms=ms) for n, ms in enumerate(milliseconds)]
    return Speed(kernel=kernel, head_dim=head_dim, times=tuple(times))


def test_the_fastest_kernel_is_measured_first_beside_others():
    found = [*found_items(), speed("a", 3, 3), speed("b", 1, 4), speed("c", 9, 1), speed("d", 1, head_dim=64)]
    assert gpu_policy.by_speed(["d", "c", "a", "b"], found, gpu_policy.LLAMA_8B) == ["b", "a", "c", "d"]


def test_a_kernel_that_was_timed_and_no_more_is_written():
    policy = gpu_policy.assemble([speed("a", 3, 5), *found_items()], (0, 0), rehearsal=True)
    first, second = policy.measurements
    assert [time.ms for time in first.times] == [3, 5]
    assert (first.tiles, first.triton, second.kernel, second.times) == (None, None, "aten-cuda", ())


@reads_rehearsal
@pytest.mark.slow
def test_the_rehearsal_writes_a_file_that_auto_refuses(rehearsal, tmp_path):
    file = rehearsal.folder / "policy.json"
    notes = rehearsal.findings("policy")["notes"]
    assert any(str(file) in note and "reads no rehearsal" in note for note in notes)
    written = json.loads(file.read_text())
    assert written["rehearsal"] is True
    (measured,) = written["measurements"]
    assert measured["kernel"] == "cpu-flash" and measured["hidden_cost"] > 0
    assert [(time["mode"], time["length"]) for time in measured["times"]] == [
        ("bidirectional", 8),
        ("causal", 8),
    ]
    assert (measured["triton"] is not None) == HAS_TRITON
    compared = {case["backend"] for case in written["comparisons"]}
    assert compared == {"cpu-flash", "dense tiles"} | ({"triton"} if HAS_TRITON else set())
    (tmp_path / "sm_00.json").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="a rehearsal on a CPU"):
        read_measured_policy((0, 0), tmp_path)


def test_an_unwritable_place_is_one_line_and_known_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the rehearsal sets it: so it is undone
    (tmp_path / "file").write_text("")
    assert gpu_policy.main(["--rehearse", "--out", str(tmp_path / "file" / "policy.json")]) == 2
    assert f"error: --out: cannot write '{tmp_path / 'file' / 'policy.json'}'" in capsys.readouterr().err
