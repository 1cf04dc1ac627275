"""Loaders over a small world: two stores, and the data section that asks for them."""

from __future__ import annotations

import json

import tests
from bico_ds.config.imports import import_module
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.paths import WrittenPath
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.sample_order import StreamSpec
from bico_ds.objectives.base import TokenRoles
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.schedule import ObjectiveSchedule
from tests.data.stores import BOS, EOS

DOUBLING = import_module(WrittenPath(str(tests.DOUBLING)))
TOKENS = TokenRoles(special_ids=(BOS, EOS), placeholder_id=0, vocabulary=100_000)
HALVES = [NtpSpec(kind="ntp", probability=0.5), BicoSpec(kind="bico", probability=0.5)]
GLOBAL = 8


def schedule_of(specs=HALVES, seed=1, tokens=TOKENS) -> ObjectiveSchedule:
    objectives = build_objectives(specs, tokens)
    return ObjectiveSchedule(objectives, [spec.probability for spec in specs], seed)


def stream_of(world, *, schedule=None, seed=1, bins=GLOBAL, **changes) -> StreamSpec:
    """`world` as the fixture gives it; `changes` of its data section."""
    stores, data = world
    return StreamSpec(
        stores=stores,
        data=data(**changes),
        schedule=schedule or schedule_of(),
        seed=seed,
        global_batch_bins=bins,
        vocabulary=TOKENS.vocabulary,
    )


def make(world, *, micro=1, rank=0, size=1, state=None, **changes) -> ElasticLoader:
    share = RankShare(rank=rank, world_size=size, micro_batch_bins=micro)
    return ElasticLoader(stream_of(world, **changes), share, state=state)


def consumed(loader: ElasticLoader, end: int):
    """What a consumer of all steps before `end` has added up."""
    total = loader.start_consumed
    for step in range(loader.start_step, end):
        total = total.plus(loader.step(step).counts)
    return total


def state_at(loader: ElasticLoader, step: int) -> dict:
    """The state of a consumer that stopped before `step`, as a checkpoint keeps it."""
    return json.loads(json.dumps(loader.state_dict(step, consumed(loader, step))))
