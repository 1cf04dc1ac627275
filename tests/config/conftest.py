from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def recipe_file(tmp_path: Path):
    def write(text: str, name: str = "mine") -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
