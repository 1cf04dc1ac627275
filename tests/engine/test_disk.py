"""Writes that fail are known, and checkpoints that do not fit are not begun."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bico_ds.engine.disk import PatientWriter, in_units, lack_of_room

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


def test_a_lack_of_room_says_how_much(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert lack_of_room(tmp_path, free // 2) is None
    assert f"{in_units(4 * free)} needed" in (lack_of_room(tmp_path, 4 * free) or "")
