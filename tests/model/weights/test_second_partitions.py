"""HpZ with a DeepSpeed that would end at a small weight (DeepSpeed#8210) is refused before weights are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bico_ds.common.errors import UserError
from bico_ds.model.weights.materialize import check_second_partitions


def ends_in_deepspeed(elements: int, ranks: int, group: int) -> bool:
    """What `_partition_param_sec` of 0.19.4 does on every rank of a group: a narrow of nothing past the end raises."""
    padded = elements + (-elements % ranks)
    share = padded // group
    for rank in range(group):
        start = share * rank
        try:
            torch.empty(elements).narrow(0, start, max(0, min(elements - start, share)))
        except IndexError:
            return True
    return False


def is_refused(elements: int, ranks: int, group: int) -> bool:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**4, 10, bias=False), nn.RMSNorm(elements))
    try:
        check_second_partitions(model, ranks=ranks, group=group)
    except UserError:
        return True
    return False


def test_exactly_the_weights_that_deepspeed_would_end_at_are_refused(monkeypatch):
    monkeypatch.setattr("bico_ds.model.weights.materialize.version", lambda package: "0.19.4")
    generator, seen = np.random.default_rng(), set()
    for _ in range(400):
        group = int(generator.integers(2, 9))
        ranks, elements = group * int(generator.integers(1, 13)), int(generator.integers(1, 200))
        refused = is_refused(elements, ranks, group)
        assert refused == ends_in_deepspeed(elements, ranks, group), (elements, ranks, group)
        seen.add(refused)
    assert seen == {True, False}
    # Qwen3's norms of queries on 12 nodes of 8, and not on 8.
    assert is_refused(128, 96, 8)
    assert not is_refused(128, 64, 8)
    with pytest.raises(
        UserError, match=r"DeepSpeed 0\.19\.4 cannot divide weight .*install deepspeed>=0\.19\.5"
    ):
        check_second_partitions(nn.RMSNorm(128), ranks=96, group=8)


@pytest.mark.parametrize("release", ["0.19.5", "0.19.8", "0.20.0"])
def test_a_deepspeed_that_divides_them_is_not_refused(monkeypatch, release):
    monkeypatch.setattr("bico_ds.model.weights.materialize.version", lambda package: release)
    assert not is_refused(1, 4, 2)
