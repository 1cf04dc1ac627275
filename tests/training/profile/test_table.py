"""The table of a profile: means over ranks and steps, the slowest rank, as JSON and in a terminal."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bico_ds.common.errors import UserError
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.training.profile.table import (
    RankStep,
    as_json,
    as_markdown,
    profile_of,
    read_profile,
)

RANKS = 3


def steps_of(objective: str, numbers: list[int], seconds: np.ndarray) -> list[list[RankStep]]:
    """`seconds`: [step, rank, part]."""
    return [
        [
            RankStep(
                objective=objective,
                step=number,
                seconds=float(of_rank.sum()),
                ordinary=0.25 + rank,
                parts=dict(zip(StepPart, of_rank.tolist(), strict=True)),
            )
            for rank, of_rank in enumerate(of_ranks)
        ]
        for number, of_ranks in zip(numbers, seconds, strict=True)
    ]


@pytest.fixture
def seconds() -> np.ndarray:
    return np.random.default_rng().uniform(0.001, 2, size=(4, RANKS, len(StepPart)))


def test_a_part_is_the_mean_over_steps_and_ranks_beside_the_rank_on_which_it_takes_longest(seconds):
    profile = profile_of(
        [*steps_of("bico", [5, 7], seconds[:2]), *steps_of("ntp", [6, 8], seconds[2:])], device="cpu"
    )
    assert [table.steps for table in profile.tables] == [(5, 7), (6, 8)]
    for table, of_steps in zip(profile.tables, (seconds[:2], seconds[2:]), strict=True):
        by_rank = of_steps.mean(0)
        for number, found in enumerate(table.parts.values()):
            assert found.mean == pytest.approx(by_rank[:, number].mean())
            assert found.slowest == pytest.approx(by_rank[:, number].max())
            assert found.slowest_rank == by_rank[:, number].argmax()
        assert table.seconds == pytest.approx(of_steps.sum(-1).mean())
        assert table.ordinary == pytest.approx(0.25 + (RANKS - 1) / 2)


def test_a_part_that_took_no_time_has_no_row(seconds):
    seconds[:, :, list(StepPart).index(StepPart.LIVE_ROWS)] = 0.0
    (table,) = profile_of(steps_of("ntp", [5, 6, 7, 8], seconds), device="cpu").tables
    assert StepPart.LIVE_ROWS not in table.parts and len(table.parts) == len(StepPart) - 1


def write(run, step: int, content: str) -> None:
    folder = run / "profile" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "table.json").write_text(content)


def test_what_is_written_is_read_again_and_the_latest_where_none_is_named(seconds, tmp_path):
    first, second = (
        profile_of(steps_of("bico", [step], seconds[:1] * step), device="cpu") for step in (5, 12)
    )
    write(tmp_path, 5, as_json(first))
    write(tmp_path, 12, as_json(second))
    assert read_profile(tmp_path) == second
    assert read_profile(tmp_path, 5) == first
    with pytest.raises(UserError, match="no profile from step 6"):
        read_profile(tmp_path, 6)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"format": 0}', '{"format": 1, "device": "cpu", "ranks": 1, "objectives": [{}]}'],
)
def test_a_file_that_is_no_table_is_the_users_to_replace(content, tmp_path):
    write(tmp_path, 5, content)
    with pytest.raises(UserError, match="profile the run again"):
        read_profile(tmp_path)


def test_a_run_without_a_profile_is_told_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="--profile"):
        read_profile(tmp_path)


def test_a_terminal_of_80_columns_shows_every_row_on_a_line(seconds):
    printed = as_markdown(profile_of(steps_of("bico", [5, 6, 7, 8], seconds * 100), device="cpu"))
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert max(map(len, printed.splitlines())) <= 80 and len({len(row) for row in rows}) == 1
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["part", cells[1][0], *(part.value for part in StepPart), "sum"]
    shares = [float(row[1].rstrip("%")) for row in cells[2:]]
    assert sum(shares[:-1]) == pytest.approx(100, abs=1) and shares[-1] == pytest.approx(100, abs=0.1)
    assert "profiled step" in printed and "ordinary 1.250 s" in printed


def test_without_an_ordinary_step_none_is_made_up(seconds):
    steps = [[RankStep(objective="ntp", step=1, seconds=1.0, ordinary=None, parts={StepPart.DATA: 1.0})]]
    profile = profile_of(steps, device="cuda")
    assert json.loads(as_json(profile))["objectives"][0]["ordinary"] is None
    assert "ordinary not known" in as_markdown(profile)
