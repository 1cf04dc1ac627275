"""Writes that fail are known, and checkpoints that do not fit are not begun."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bico_ds.checkpoint.disk import PatientWriter, bytes_needed, in_units, lack_of_room
from bico_ds.cluster.preflight.size import next_checkpoints_bytes
from bico_ds.config.load import load_recipe

CONFIG = SimpleNamespace(checkpoint_config={"checkpoint_serialization": True})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_kept_as_the_failure_and_not_raised_between_two_barriers(tmp_path):
    writer = PatientWriter(CONFIG)
    writer.save({"weights": torch.ones(100_000)}, "/dev/full")
    assert writer.failure is not None
    assert writer.failure.startswith("/dev/full: ")
    writer.save({"weights": torch.ones(1)}, str(tmp_path / "next"))
    assert not (tmp_path / "next").exists(), "a checkpoint that has failed is not written to its end"


def test_a_sound_disk_leaves_no_failure(tmp_path):
    writer = PatientWriter(CONFIG)
    writer.makedirs(str(tmp_path / "tag"), exist_ok=True)
    writer.save({"weights": torch.ones(3)}, str(tmp_path / "tag" / "file"))
    assert writer.failure is None
    assert torch.load(tmp_path / "tag" / "file")["weights"].tolist() == [1, 1, 1]


def test_a_writer_names_the_files_that_it_wrote_and_those_of_no_other_rank(tmp_path):
    mine, other = (PatientWriter(CONFIG) for _ in range(2))
    other.save({}, str(tmp_path / "another rank's"))
    for name in ("model", "optimizer"):
        mine.save({}, str(tmp_path / name))
    mine.save({}, str(tmp_path / "no folder" / "file"))
    assert mine.failure is not None
    assert mine.written == [tmp_path / "model", tmp_path / "optimizer"]


def test_a_lack_of_room_says_how_much(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert lack_of_room(tmp_path, free // 2) is None
    assert f"{in_units(4 * free)} needed" in (lack_of_room(tmp_path, 4 * free) or "")


@pytest.mark.parametrize(("stage", "bytes_per_parameter"), [(2, 14), (3, 12)])
def test_a_checkpoint_holds_the_weights_in_their_own_type_only_below_stage_3(stage, bytes_per_parameter):
    module = torch.nn.Linear(1000, 1000, bias=False, dtype=torch.bfloat16)
    optimizer = SimpleNamespace(optimizer=torch.optim.AdamW(module.parameters()))
    engine = SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: stage)
    assert 1 <= bytes_needed(engine) / (bytes_per_parameter * 10**6) < 1.1
    module.requires_grad_(False)
    assert bytes_needed(engine) == 0, "frozen weights are left out"


def test_the_preflight_counts_as_the_writer_does(tmp_path):
    def one(config: str) -> float:
        overrides = [f"deepspeed.config={config}", "checkpoint.export=false", "checkpoint.keep_last=1"]
        return next_checkpoints_bytes(load_recipe("tiny_base", overrides), tmp_path) / 2

    assert one("zero2_bf16") / one("zero3_bf16") == 16 / 12  # its weights are fp32


def test_the_preflight_counts_the_best_checkpoint_as_one_more(tmp_path):
    keep = [
        "evaluation.tasks=[d2n]",
        "evaluation.every_steps=5",
        "checkpoint.export=false",
        "checkpoint.keep_last=1",
    ]
    usual = next_checkpoints_bytes(load_recipe("tiny_base", keep), tmp_path)
    best = [*keep, "checkpoint.keep_best={metric: d2n/headline, mode: max}"]
    assert next_checkpoints_bytes(load_recipe("tiny_base", best), tmp_path) == usual / 2 * 3
