"""Policies measured on GPUs: what a file must hold, and what `auto` makes of it."""

from __future__ import annotations

import functools
import json
import logging
import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bico_ds.attention import backends
from bico_ds.attention.layout import CUDA_POLICY, build_layout
from bico_ds.attention.measured_policy import (
    MEASURED,
    Alternative,
    Comparison,
    KernelTime,
    MeasuredPolicy,
    Measurement,
    choose_policy,
    encode,
    file_name,
    order_by_speed,
    read_measured_policy,
    running_versions,
)
from bico_ds.attention.passes import TORCH_PASSES
from bico_ds.attention.plan import build_plan
from bico_ds.attention.triton.passes import TRITON_PASSES
from bico_ds.attention.triton.row_blocks import BlockSizes
from bico_ds.common.errors import UserError
from tests import ROOT

HOPPER = (9, 0)
BLOCKS = BlockSizes(rows=64, keys=64)
BF16 = torch.bfloat16


def comparison(**changes) -> Comparison:
    right = Comparison(
        backend="triton", case="causal", dtype="bfloat16", head_dim=128,
        scale_error=1e-4, scale_bound=3e-3, largest_error=1e-2, largest_bound=3e-2,
    )  # fmt: skip
    return replace(right, **changes)


def times(short: float, long: float = 2.0) -> tuple[KernelTime, ...]:
    """Milliseconds of a flash kernel on documents of 512 and of 2048 tokens."""
    pairs = ((512, short), (2048, long))
    return tuple(KernelTime(mode="bidirectional", length=length, ms=ms) for length, ms in pairs)


def fresh_policy(**changes) -> MeasuredPolicy:
    """A file's content with fresh figures: `aten-cuda` at head dimension 128, the Triton kernels right and faster."""
    triton = Alternative(
        flash_from=random.uniform(500, 900),
        causal_flash_from=random.uniform(200, 400),
        live_cost=random.uniform(1, 2),
    )
    tiles = Alternative(flash_from=1, causal_flash_from=random.uniform(1, 60), live_cost=random.uniform(3, 9))
    measurement = Measurement(
        kernel="aten-cuda",
        head_dim=128,
        times=times(random.uniform(1, 9)),
        hidden_cost=random.uniform(1.1, 1.9),
        tiles=tiles,
        triton=triton,
    )
    policy = MeasuredPolicy(
        rehearsal=False,
        capability=HOPPER,
        gpu="An invented GPU",
        date="2026-12-24",
        driver="580.1",
        versions=running_versions(),
        measurements=(measurement,),
        comparisons=(comparison(), comparison(case="live rows")),
    )
    return replace(policy, **changes)


def choose(policy, *, dtype=BF16, head_dim=128, refusal=None):
    return choose_policy(
        policy,
        CUDA_POLICY,
        kernel="aten-cuda",
        dtype=dtype,
        head_dim=head_dim,
        blocks=BLOCKS,
        refusal=refusal,
    )


def test_a_file_is_read_as_it_was_written_for_its_own_architecture_alone(tmp_path):
    policy = fresh_policy()
    (tmp_path / file_name(HOPPER)).write_bytes(encode(policy))
    assert read_measured_policy(HOPPER, tmp_path) == policy
    assert read_measured_policy((8, 0), tmp_path) is None


def test_every_file_in_the_repository_is_read():
    for file in MEASURED.glob("*.json"):
        capability = tuple(json.loads(file.read_text())["capability"])
        assert file.name == file_name(capability)
        assert read_measured_policy(capability)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("format",), 1, "format: "),
        (("rehearsal",), True, "a rehearsal on a CPU"),
        (("capability",), [8, 0], "of another GPU: An invented GPU, compute capability (8, 0)"),
        (("date",), "yesterday", "date: "),
        (("note",), "x", "note: "),
        (("measurements", 0, "hidden_cost"), -1.0, "measurements.0.hidden_cost: "),
        (("measurements", 0, "times", 1, "ms"), 0.0, "measurements.0.times.1.ms: "),
        (("measurements", 0, "times", 0, "mode"), "both", "measurements.0.times.0.mode: "),
        (("measurements", 0, "tiles", "live_cost"), float("nan"), "measurements.0.tiles.live_cost: "),
        (("measurements", 0, "triton", "flash_from"), float("inf"), "measurements.0.triton.flash_from: "),
        (("measurements", 0, "triton", "flash_from"), 0, "measurements.0.triton.flash_from: "),
        (("comparisons", 1, "largest_bound"), 0.5, "comparisons.1.largest_bound: "),
        (("comparisons", 0, "scale_error"), "small", "comparisons.0.scale_error: "),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_file_with_nonsense_is_refused_with_its_name_and_the_place(tmp_path, place, value, said):
    tree = json.loads(encode(fresh_policy()))
    part = functools.reduce(lambda node, key: node[key], place[:-1], tree)
    part[place[-1]] = value
    file = tmp_path / file_name(HOPPER)
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError) as refused:
        read_measured_policy(HOPPER, tmp_path)
    assert str(refused.value).startswith(f"{file}: {said}")
    assert "gpu_policy.py" in str(refused.value)


def test_a_file_that_is_no_json_is_refused_with_its_name(tmp_path):
    file = tmp_path / file_name(HOPPER)
    file.write_text("{")
    with pytest.raises(UserError, match=f"^{file}: the file: "):
        read_measured_policy(HOPPER, tmp_path)


def test_a_file_that_cannot_be_read_is_refused_with_its_name(tmp_path):
    file = tmp_path / file_name(HOPPER)
    file.mkdir()
    with pytest.raises(UserError, match=rf"^{file}: cannot be read \(Is a directory\)"):
        read_measured_policy(HOPPER, tmp_path)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_the_triton_kernels_take_documents_below_the_measured_length_and_flash_the_others(mode):
    measured = fresh_policy()
    beside = measured.measurements[0].triton
    crossing = beside.causal_flash_from if mode == "causal" else beside.flash_from
    policy, note = choose(measured)
    lengths = [math.floor(crossing), 1, math.ceil(crossing) + 1]
    layout = build_layout(build_plan(mode, kept_lengths=lengths), policy)
    assert not layout.tiles
    assert layout.blocks.rows.tolist() == list(range(lengths[0] + 1))
    assert layout.flash[0].query_rows.tolist() == list(range(lengths[0] + 1, sum(lengths)))
    assert (policy.blocks, policy.tile_cost) == (BLOCKS, beside.live_cost)
    assert policy.hidden_cost == measured.measurements[0].hidden_cost
    assert f"below {beside.flash_from:.0f} tokens, {beside.causal_flash_from:.0f} where causal" in note
    assert note.endswith("measured on An invented GPU, 2026-12-24")


WRONG = {
    "off by a factor": comparison(scale_error=4e-3),
    "wrong in an entry": comparison(largest_error=0.2),
    "not finite": comparison(largest_error=None),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_triton_kernels_that_were_wrong_in_one_case_are_not_taken(wrong):
    measured = fresh_policy()
    policy, note = choose(replace(measured, comparisons=(*measured.comparisons, wrong)))
    assert_beside_tiles(policy, measured)
    assert "not triton, which was wrong there (causal)" in note


def assert_beside_tiles(policy, measured):
    """What was measured of tiles holds, and no row goes to the Triton kernels."""
    tiles = measured.measurements[0].tiles
    assert policy.blocks is None
    assert (policy.flash_from, policy.causal_flash_from) == (tiles.flash_from, tiles.causal_flash_from)
    assert (policy.tile_cost, policy.hidden_cost) == (tiles.live_cost, measured.measurements[0].hidden_cost)


@pytest.mark.parametrize(
    ("changes", "dtype", "said"),
    [
        ({"comparisons": ()}, BF16, "was not compared with the oracle in bfloat16 at head dimension 128"),
        ({}, torch.float16, "was not compared with the oracle in float16 at head dimension 128"),
        (
            {"comparisons": (comparison(head_dim=64), comparison(backend="aten-cuda"))},
            BF16,
            "was not compared with the oracle in bfloat16 at head dimension 128",
        ),
        (
            {"comparisons": (comparison(), comparison(case="live rows"), comparison(dtype="float16"))},
            torch.float16,
            "was not compared with the oracle in float16 at head dimension 128 in every case (live rows)",
        ),
    ],
)
def test_triton_kernels_that_were_not_compared_for_such_inputs_are_not_taken(changes, dtype, said):
    measured = fresh_policy(**changes)
    policy, note = choose(measured, dtype=dtype)
    assert_beside_tiles(policy, measured)
    assert said in note


def test_a_kernel_that_cannot_hide_keys_here_hides_none_whatever_was_measured():
    measured = fresh_policy()
    estimate = replace(CUDA_POLICY, hidden_cost=math.inf)
    settings = {"kernel": "aten-cuda", "dtype": BF16, "head_dim": 128, "blocks": BLOCKS}
    for refusal in (None, "needs Triton, which is not installed"):
        policy, _ = choose_policy(measured, estimate, refusal=refusal, **settings)
        assert policy.hidden_cost == math.inf


def test_triton_kernels_that_are_no_faster_or_were_not_timed_are_not_taken():
    measured = fresh_policy()
    (one,) = measured.measurements
    for triton, said in (
        (replace(one.triton, flash_from=1, causal_flash_from=1), "is faster for no length"),
        (None, "was not timed beside this kernel"),
    ):
        policy, note = choose(replace(measured, measurements=(replace(one, triton=triton),)))
        assert_beside_tiles(policy, measured)
        assert f"not triton, which {said}" in note


def test_triton_kernels_that_cannot_run_here_are_not_taken_and_the_log_says_why():
    measured = fresh_policy()
    policy, note = choose(measured, refusal="needs Triton, which is not installed")
    assert_beside_tiles(policy, measured)
    assert "not triton, which needs Triton, which is not installed" in note


def test_what_was_not_measured_keeps_its_estimates():
    policy, note = choose(None, refusal="is wrong on this GPU")
    assert policy == CUDA_POLICY
    assert (
        note
        == "costs are estimates: none were measured on this architecture; not triton, which is wrong on this GPU"
    )
    policy, note = choose(fresh_policy(), head_dim=96)
    assert policy == CUDA_POLICY
    assert "aten-cuda at head dimension 96 was not measured on An invented GPU" in note
    (one,) = fresh_policy().measurements
    policy, _ = choose(fresh_policy(measurements=(replace(one, tiles=None, triton=None),)))
    assert policy == CUDA_POLICY


def test_where_nothing_was_measured_triton_serves_live_rows_and_no_whole_document():
    policy, note = choose(None)
    assert policy == replace(CUDA_POLICY, blocks=BLOCKS, hidden_cost=math.inf)
    assert policy.flash_from_in("causal") == policy.flash_from_in("bidirectional") == 1
    assert note.endswith("triton for live rows")


def test_another_minor_version_than_the_measured_one_is_named_and_no_reason_against():
    running = running_versions()
    older = {**running, "torch": "1.9.1", "bico_ds": running["bico_ds"] + "+local"}
    policy, note = choose(fresh_policy(versions=older))
    assert policy.blocks == BLOCKS
    assert note.endswith(
        f"measured on An invented GPU, 2026-12-24, with torch 1.9.1 (now {running['torch']})"
    )


DEFAULT = ("flash-attn", "aten-cuda")


def timed_policy(kernels: dict[str, tuple[KernelTime, ...]], *wrong: Comparison) -> MeasuredPolicy:
    """Flash kernels with such times at head dimension 128, right in bf16 but for `wrong`."""
    (one,) = fresh_policy().measurements
    return fresh_policy(
        measurements=tuple(replace(one, kernel=name, times=own) for name, own in kernels.items()),
        comparisons=(*(comparison(backend=name) for name in kernels), *wrong),
    )


def order_of(policy, *, dtype=BF16, head_dim=128):
    return order_by_speed(policy, DEFAULT, dtype=dtype, head_dim=head_dim)


def test_auto_tries_the_fastest_first_and_what_was_not_timed_last():
    policy = timed_policy(
        {"aten-cuda": times(3, 5), "flash-attn-4": times(4, 1), "flash-attn-3": times(1, 4.5)}
    )
    order, (why,) = order_of(policy)
    assert order == ("flash-attn-4", "flash-attn-3", "aten-cuda", "flash-attn")
    assert "flash-attn-4 5 ms, flash-attn-3 5.5 ms, aten-cuda 8 ms" in why
    assert policy.origin in why


def test_kernels_are_compared_by_the_documents_that_all_were_timed_on():
    policy = timed_policy({"aten-cuda": times(3, 5), "flash-attn": times(4)[:1]})
    assert order_of(policy)[0] == ("aten-cuda", "flash-attn")
    nothing_shared = timed_policy({"aten-cuda": times(3)[1:], "flash-attn-4": times(4)[:1]})
    assert order_of(nothing_shared) == (DEFAULT, [])


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_auto_prefers_no_kernel_that_was_wrong_however_fast(wrong):
    fast = {"flash-attn": times(1), "flash-attn-4": times(1), "aten-cuda": times(9)}
    policy = timed_policy(fast, *(replace(wrong, backend=name) for name in ("flash-attn", "flash-attn-4")))
    assert order_of(policy)[0] == ("aten-cuda", "flash-attn")


def test_auto_keeps_its_order_for_inputs_of_which_nothing_was_shown():
    policy = timed_policy({"aten-cuda": times(1)})
    for unknown in ({"head_dim": 96}, {"dtype": torch.float16}):
        assert order_of(policy, **unknown) == (DEFAULT, [])
    assert order_of(None) == order_of(timed_policy({"aten-cuda": ()})) == (DEFAULT, [])


class AnyKernel:
    """A flash kernel of CUDA as far as `resolve` asks."""

    hides_keys = False

    def __init__(self, name, refused=None):
        self.name, self.refused = name, refused

    def refusal(self, dtype, head_dim, device):
        return self.refused if device.type == "cuda" else "runs on CUDA tensors"


@pytest.fixture
def fresh_choice():
    """`resolve` as if it had never been asked, before and after a test."""
    backends.resolve.cache_clear()
    yield
    backends.resolve.cache_clear()


def invent_gpu(measured, folder, monkeypatch, *kernels):
    """A GPU as far as `resolve` asks torch for one, and such kernels; the file, its reader and the choice are real."""
    (folder / file_name(HOPPER)).write_bytes(encode(measured))
    for kernel in kernels:
        monkeypatch.setitem(backends.KERNELS, kernel.name, kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "An invented GPU")
    monkeypatch.setattr(backends, "triton_refusal", lambda *inputs: None)
    read = functools.partial(read_measured_policy, folder=folder)
    monkeypatch.setattr(backends, "read_measured_policy", read)
    for check in ("blocks_objection", "passes_objection"):
        monkeypatch.setattr(backends, check, lambda *inputs: None)


@pytest.mark.usefixtures("fresh_choice")
def test_auto_takes_the_fastest_kernel_that_is_installed_and_says_why(tmp_path, monkeypatch, caplog):
    fast = {"aten-cuda": times(5), "flash-attn-4": times(1), "flash-attn-3": times(3)}
    missing = AnyKernel("flash-attn-4", "is not installed")
    invent_gpu(
        timed_policy(fast), tmp_path, monkeypatch, missing, AnyKernel("flash-attn-3"), AnyKernel("aten-cuda")
    )
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        backend = backends.resolve("auto", BF16, 128, torch.device("cuda"))
    assert backend.kernel.name == "flash-attn-3"
    assert (
        "flash-attn-3 for cuda, bfloat16, head dimension 128 (flash-attn-4 is not installed; " in caplog.text
    )
    assert (
        "times on An invented GPU, 2026-12-24: flash-attn-4 3 ms, flash-attn-3 5 ms, aten-cuda 7 ms"
        in caplog.text
    )


@pytest.mark.usefixtures("fresh_choice")
def test_auto_on_a_gpu_follows_the_file_of_its_architecture_and_logs_it(tmp_path, monkeypatch, caplog):
    measured = fresh_policy()
    invent_gpu(measured, tmp_path, monkeypatch, AnyKernel("aten-cuda"))
    device = torch.device("cuda")
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        backend = backends.resolve("auto", BF16, 128, device)
    assert backend.kernel.name == "aten-cuda" and backend.passes is TRITON_PASSES
    assert backend.policy.blocks == backends.tiling_on(device, 128).blocks
    assert backend.policy.flash_from == measured.measurements[0].triton.flash_from
    assert "attention backend: aten-cuda for cuda, bfloat16" in caplog.text
    assert "triton for live rows and documents below" in caplog.text
    assert "as measured on An invented GPU, 2026-12-24" in caplog.text
    named = backends.resolve("aten-cuda", BF16, 128, device)
    assert_beside_tiles(named.policy, measured)


@pytest.mark.usefixtures("fresh_choice")
def test_what_is_wrong_on_a_gpu_gives_way_to_torchs_operations_and_the_log_says_so(monkeypatch, caplog):
    """As above; the self-check's answers are invented, too: the tests of self_check.py ask it itself."""
    monkeypatch.setitem(backends.KERNELS, "aten-cuda", AnyKernel("aten-cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 9))
    monkeypatch.setattr(backends, "triton_refusal", lambda *inputs: None)
    monkeypatch.setattr(backends, "blocks_objection", lambda *inputs: "is wrong on this GPU (causal dk: 2)")
    monkeypatch.setattr(backends, "passes_objection", lambda *inputs: "is wrong on this GPU (causal dq: 1)")
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        backend = backends.resolve("auto", BF16, 192, torch.device("cuda"))
    assert backend.passes is TORCH_PASSES and backend.policy.blocks is None
    assert "not triton, which is wrong on this GPU (causal dk: 2)" in caplog.text
    assert "torch's operations around the passes: triton is wrong on this GPU (causal dq: 1)" in caplog.text


def test_a_built_package_carries_the_files(tmp_path):
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    folder = tmp_path / "bico_ds" / "attention" / "measured"
    folder.mkdir(parents=True)
    for init in ("bico_ds/__init__.py", "bico_ds/attention/__init__.py"):
        shutil.copy(ROOT / init, tmp_path / init)
    (folder / file_name(HOPPER)).write_bytes(encode(fresh_policy()))
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    built = tmp_path / "built" / "bico_ds" / "attention" / "measured"
    assert read_measured_policy(HOPPER, built) is not None
