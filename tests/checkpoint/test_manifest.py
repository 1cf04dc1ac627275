"""Every kind of damage to a checkpoint is seen, named, and costs only that checkpoint."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from bico_ds.checkpoint import manifest
from bico_ds.common.errors import UserError


def checkpoint(root: Path, step: int) -> Path:
    folder = root / f"step-{step:06d}"
    (folder / "zero").mkdir(parents=True)
    files = [folder / "weights.pt", folder / "zero" / "state.pt"]
    for number, file in enumerate(files):
        file.write_bytes(bytes([step % 256, number]) * 1000)
    manifest.write_manifest(folder, {"step": step, "layout": {}, "files": manifest.file_table(folder, files)})
    return folder


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_the_step(file: Path) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "step": content["step"] + 1}))


DAMAGE = {
    "missing file": ("zero/state.pt", Path.unlink, "missing"),
    "truncated file": ("weights.pt", lambda file: file.write_bytes(bytes(1999)), "1999 bytes, 2000 by the manifest"),
    "empty file": ("weights.pt", lambda file: file.write_bytes(b""), "0 bytes"),
    "flipped byte": ("zero/state.pt", flip_a_byte, "checksum differs"),
    "missing manifest": ("manifest.json", Path.unlink, "no manifest.json"),
    "truncated manifest": ("manifest.json", lambda file: file.write_text(file.read_text()[:200]), "not a manifest"),
    "edited manifest": ("manifest.json", change_the_step, "changed after it was written"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, name, damage, message):
    checkpoint(tmp_path, 100)
    newest = checkpoint(tmp_path, 200)
    damage(newest / name)
    reported: list[str] = []
    found = manifest.find(tmp_path, reported.append)
    assert found is not None
    assert found.step == 100
    assert len(reported) == 1
    assert str(newest) in reported[0]
    assert message in reported[0]


def test_the_newest_complete_checkpoint_is_taken_in_silence(tmp_path):
    for step in (999_995, 1_000_000, 5):  # the newest by number, not by spelling
        checkpoint(tmp_path, step)
    found = manifest.find(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 1_000_000


def test_checkpoints_of_which_none_is_complete_are_an_error_and_no_fresh_start(tmp_path):
    for step in (100, 200):
        flip_a_byte(checkpoint(tmp_path, step) / "weights.pt")
    reported: list[str] = []
    with pytest.raises(UserError, match="no checkpoint there is complete; start anew with --resume none"):
        manifest.find(tmp_path, reported.append)
    assert len(reported) == 2


def test_an_empty_folder_and_a_crashed_first_write_start_fresh(tmp_path):
    assert manifest.find(tmp_path / "absent", pytest.fail) is None
    (tmp_path / ".step-000100.0123456789ab.incomplete").mkdir()
    assert manifest.find(tmp_path, pytest.fail) is None


def test_what_every_rank_gets_of_a_checkpoint_does_not_grow_with_its_files(tmp_path):
    """A checkpoint has a file or two of each rank, and a resume sends what was found to each."""
    found = []
    for number in (2, 500):
        folder = tmp_path / f"step-{number:06d}"
        folder.mkdir()
        for rank in range(number):
            (folder / f"rank-{rank}").write_bytes(b"x" * 7)
        table = manifest.file_table(folder, folder.iterdir())
        manifest.write_manifest(folder, {"step": number, "layout": {}, "files": table})
        found.append(manifest.verify(folder))
    few, many = found
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 20
    assert (few.bytes, many.bytes) == (14, 3500)
