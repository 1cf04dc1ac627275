"""A step's counted traffic is what arithmetic says of operations, and each operation belongs to its part of the model."""

from __future__ import annotations

import json

import pytest
import torch

from bico_ds.common.traffic import Traffic, report
from bico_ds.config.load import load_recipe
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.flops import linear_flops
from tools.bench import step_traffic
from tools.bench.count_operations import Cost, Operations
from tools.bench.step_traffic import AROUND, FLASH_KERNELS, GATE, HEAD, LIVE, NORMS, PROJECTIONS

B = 2  # bytes, bf16
ROWS, WIDE, HIDDEN, KEYS, VOCABULARY = 8192, 14_336, 4096, 1024, 128_256


def rows(n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(n, m, dtype=dtype, device="meta")


X, Y, INDEX = rows(10, 6), rows(6, 4), torch.empty(3, dtype=torch.int64, device="meta")
BY_HAND = {
    "a product": (lambda: X @ Y, Cost(launches=1, bytes_read=B * 84, bytes_written=B * 40, flops=480)),
    "a product added": (
        lambda: rows(10, 4).addmm_(X, Y),
        Cost(launches=1, bytes_read=B * 124, bytes_written=B * 40, flops=480),
    ),
    "batched products": (
        lambda: torch.bmm(X.view(2, 5, 6), Y.expand(2, 6, 4)),
        Cost(launches=1, bytes_read=B * 84, bytes_written=B * 40, flops=480),
    ),
    "a cast": (lambda: X.float(), Cost(launches=1, bytes_read=B * 60, bytes_written=4 * 60)),
    "views": (lambda: X.t()[2:].view(4, 10), Cost()),
    "an allocation": (lambda: torch.empty_like(X), Cost()),
    "in place": (lambda: X.add_(X[:, :1]), Cost(launches=1, bytes_read=B * 70, bytes_written=B * 60)),
    "filled": (lambda: X.zero_(), Cost(launches=1, bytes_written=B * 60)),
    "rows taken": (
        lambda: X.index_select(0, INDEX),
        Cost(launches=1, bytes_read=B * 18, bytes_written=B * 18),
    ),
    "rows put": (
        lambda: X.index_copy_(0, INDEX, rows(3, 6)),
        Cost(launches=1, bytes_read=B * 18, bytes_written=B * 18),
    ),
    "rows added": (
        lambda: X.index_add_(0, INDEX, rows(3, 6)),
        Cost(launches=1, bytes_read=B * 36, bytes_written=B * 18),
    ),
}


@pytest.mark.parametrize("what", BY_HAND)
def test_an_operation_costs_what_arithmetic_says(what):
    run, expected = BY_HAND[what]
    with Operations() as found:
        run()
    assert found.total() == expected


def test_an_op_that_states_its_traffic_counts_as_it_says():
    torch.library.define("bico_ds_test::stated", "(Tensor x, Tensor(a!) out) -> ()")

    @torch.library.register_fake("bico_ds_test::stated")
    def fake(x: torch.Tensor, out: torch.Tensor) -> None:
        report(Traffic(op="ours", launches=3, bytes_read=5, bytes_written=7))

    with Operations() as found:
        torch.ops.bico_ds_test.stated(X, X)
        report(Traffic(op="no op", launches=1, bytes_read=2, bytes_written=0))
    report(Traffic(op="afterwards", launches=1, bytes_read=2, bytes_written=0))
    assert found.costs == {
        ("all", "ours"): Cost(launches=3, bytes_read=5, bytes_written=7),
        ("all", "no op"): Cost(launches=1, bytes_read=2),
    }


@pytest.fixture(scope="module")
def before() -> dict[str, dict[str, Cost]]:
    with step_traffic.formulas():
        return {kind: step_traffic.costs(kind, rows=ROWS, length=2048) for kind in step_traffic.OBJECTIVES}


@pytest.fixture(scope="module")
def after() -> dict[str, dict[str, Cost]]:
    return {kind: step_traffic.costs(kind, rows=ROWS, length=2048) for kind in step_traffic.OBJECTIVES}


def test_the_products_are_those_that_the_plan_has(before):
    """Of one recomputed layer; BICO has fewer rows than NTP by the dead placeholders, about 13 % of the tokens."""
    recipe = load_recipe("llama3_8b_bico", ["model.path=null", "model.config.num_hidden_layers=1"])
    ntp, bico = (before[kind][PROJECTIONS].flops for kind in ("NTP", "BICO"))
    assert ntp == linear_flops(read_architecture(recipe.model), recipe.model, ROWS)
    assert bico / ntp == pytest.approx(1 - 0.15 * 0.85, rel=0.01)


def test_flash_kernels_and_gates_move_what_the_formula_by_hand_says(before):
    """NTP's: each pass of a kernel reads and writes rows of queries, keys and values; silu and mul run twice forward."""
    queries, keys, lse = B * ROWS * HIDDEN, B * ROWS * KEYS, 4 * ROWS * 32
    forward, backward = 2 * queries + 2 * keys + lse, 4 * queries + 4 * keys + lse
    assert before["NTP"][FLASH_KERNELS].bytes == pytest.approx(2 * forward + backward, rel=1e-3)
    assert before["NTP"][GATE].bytes == B * ROWS * WIDE * (2 * (2 + 3) + 2 * 3 + 3)


def test_each_part_has_work_of_its_own(before):
    """Live rows only in BICO; nothing of a layer is left over where there are more layers."""
    for kind, costs in before.items():
        assert (costs[LIVE].launches > 0) == (kind == "BICO")
        assert all(costs[group].launches > 0 for group in (AROUND, NORMS, HEAD))
        with step_traffic.formulas():
            deeper = step_traffic.count(kind, layers=3, rows=ROWS, length=2048)
        assert deeper[step_traffic.ENDS] == costs[step_traffic.ENDS]


def test_what_surrounds_the_flash_kernels_keeps_its_budget(after):
    """5 GB and 40 launches per recomputed BICO layer, with its live rows, as ops of ours state and ATen's are counted.

    Before it was 13 GB in 288 launches.
    """
    around = after["BICO"][AROUND] + after["BICO"][LIVE]
    assert around.bytes <= 5e9 and around.launches <= 40


def test_a_layer_moves_less_than_half_and_multiplies_what_it_did(before, after):
    for kind in before:
        was, now = (
            sum((side[kind][group] for group in step_traffic.OF_A_LAYER), Cost()) for side in (before, after)
        )
        assert now.bytes < 0.5 * was.bytes and now.launches < 0.5 * was.launches
        assert before[kind][PROJECTIONS].flops == after[kind][PROJECTIONS].flops


def test_the_command_ends_with_a_line_for_machines(capsys):
    assert step_traffic.main(["--rows", "512", "--length", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {"name", "ours", "other", "unit", "ratio"} == set(found[0])
    assert len(found) == 2 * 2 * len((*step_traffic.OF_A_LAYER, *step_traffic.OF_A_MICRO_BATCH))


def test_a_document_that_does_not_fit_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        step_traffic.main(["--rows", "100", "--length", "128"])
    assert "--length: a document of 128 tokens" in capsys.readouterr().err
