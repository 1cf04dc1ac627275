from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def usual_umask() -> Iterator[None]:
    """Whoever started the tests may keep new files from others."""
    before = os.umask(0o022)
    yield
    os.umask(before)
