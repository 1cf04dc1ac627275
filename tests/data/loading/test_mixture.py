"""Mixtures: each source passes as often as asked, and every sequence of it equally often."""

from __future__ import annotations

import numpy as np
import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import SourceSpec
from bico_ds.data.loading.mixture import Mixture


@pytest.mark.parametrize("passes", [{"epochs": 1.0}, {"epochs": 2.0}, {"epochs": 0.3}, {"epochs": 1.7}])
def test_over_epochs_a_source_passes_as_often_as_asked_and_evenly(passes):
    mixture = Mixture.of([SourceSpec(store="a", **passes), SourceSpec(store="b")], [11, 7], [11, 7], seed=3)
    seen: dict[int, list[int]] = {index: [] for index in range(18)}
    for epoch in range(10):
        taken = mixture.epoch(epoch)
        for index, number in zip(taken.index.tolist(), taken.passes.tolist(), strict=True):
            seen[index].append(number)
    for index in range(11):
        assert seen[index] == list(range(len(seen[index])))  # one of each pass: no mask is drawn twice
        assert abs(len(seen[index]) - 10 * passes["epochs"]) < 1
    assert sum(len(seen[index]) for index in range(11)) == int(10 * passes["epochs"] * 11)
    assert all(seen[index] == list(range(10)) for index in range(11, 18))


def test_a_data_epoch_without_a_sequence_is_refused_with_the_least_that_has_one():
    sources = [SourceSpec(store="a", epochs=0.001), SourceSpec(store="b", epochs=0.05)]
    with pytest.raises(
        UserError, match=r"data\.sources\[1\]\.epochs: 0\.05 of its 11 sequences.*give at least 0\.091"
    ):
        Mixture.of(sources, [3, 11], [3, 11], seed=0)
    enough = Mixture.of([sources[0], SourceSpec(store="b", epochs=0.091)], [3, 11], [3, 11], seed=0)
    assert all(len(enough.epoch(number).index) for number in range(30))


def test_weights_are_shares_of_the_sampled_sequences():
    mixture = Mixture.of(
        [SourceSpec(store="a", weight=3.0), SourceSpec(store="b", weight=1.0)], [100, 900], [100, 900], seed=0
    )
    taken = mixture.epoch(4)
    assert len(taken.index) == 1000
    assert np.mean(taken.index < 100) == pytest.approx(0.75)
    assert not mixture.repeats
