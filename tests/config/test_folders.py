"""One rule tells folders from hub names, for every key of a recipe."""

from __future__ import annotations

import pytest

from bico_ds.config.folders import is_local_folder


@pytest.mark.parametrize(
    ("value", "local"),
    [
        ("meta-llama/Llama-3.1-8B", False),
        ("models/llama-3.1-70b", True),
        ("runs/tiny", True),
        ("runs/tiny/export", True),
        ("./m", True),
        ("../m", True),
        ("/a", True),
        ("~/m", True),
        ("${MODELS}/m", True),
        ("export", True),
        ("a/b/c", True),
    ],
)
def test_hub_names_are_told_from_folders(value, local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_local_folder(value) == local


def test_what_exists_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "mine").mkdir(parents=True)
    assert is_local_folder("weights/mine")
