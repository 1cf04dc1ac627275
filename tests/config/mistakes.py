"""What a user is told of a recipe that cannot be loaded."""

from __future__ import annotations

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe


def error_of(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)
