"""Two stores, and the data section of a recipe that reads them."""

from __future__ import annotations

import numpy as np
import pytest

from bico_ds.config.sections.data import DataSpec, SourceSpec
from tests.data.stores import write_store


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two stores, with documents longer than a bin, and their data section."""
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(0)
    stores = [
        write_store(folder / "a", [*rng.integers(1, 60, 150).tolist(), 150, 97], add_bos=True),
        write_store(folder / "b", rng.integers(5, 64, 40).tolist()),
    ]

    def data(**changes) -> DataSpec:
        epochs, weights = (changes.pop(key, (None, None)) for key in ("epochs", "weights"))
        sources = [
            SourceSpec(store=str(store.path), epochs=epoch, weight=weight)
            for store, epoch, weight in zip(stores, epochs, weights, strict=True)
        ]
        return DataSpec(sources=sources, **{"capacity": 64, "workers": 0, **changes})

    return stores, data
