"""What is told before a run about data that cannot be learned from, against all batches of many epochs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.sections.data import DataSpec, SourceSpec
from bico_ds.data.loading.loader import ElasticLoader
from bico_ds.data.store import TokenStore
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.objectives.schedule import ObjectiveSchedule
from tests.data.loading.loaders import DOUBLING, make, schedule_of
from tests.data.stores import BOS, EOS, write_store
from tests.objectives.bico_reference import read_back

EPOCHS = 40
NTP, NTP_COMPLETION = NtpSpec(), NtpSpec(loss_on="completion")


def bico(**mask) -> BicoSpec:
    return BicoSpec(mask=MaskSpec(rate=0.5, **mask))


SPECS = {
    "ntp": NTP,
    "ntp on completions": NTP_COMPLETION,
    "bico": bico(),
    "bico on completions": bico(eligible="completion"),
    "bico on entities": bico(unit="entity"),
    "bico on words of completions": bico(unit="word", eligible="completion"),
}


def loader_of(stores: list[TokenStore], specs, *, schedule=None, names=None, **changes) -> ElasticLoader:
    sources = [
        SourceSpec(store=str(store.path), name=name)
        for store, name in zip(stores, names or [None] * len(stores), strict=True)
    ]
    data = DataSpec(sources=sources, **{"capacity": 16, "workers": 0, **changes})
    return make((stores, lambda: data), schedule=schedule or schedule_of(specs), bins=1)


def random_store(path: Path, lengths: list[int], seed: int, *, add_bos: bool, ends: float) -> TokenStore:
    """Special tokens anywhere; of the documents so many end in EOS, which stands nowhere else."""
    rng = np.random.default_rng(seed)
    sizes = np.array(lengths)
    tokens = np.where(rng.random(sizes.sum()) < 0.3, BOS, rng.integers(10, 99, sizes.sum()))
    last = np.cumsum(sizes) - 1
    tokens[last[rng.random(len(sizes)) < ends]] = EOS
    return write_store(
        path,
        lengths,
        add_bos=add_bos,
        has_entities=True,
        seed=seed,
        tokens=tokens,
        entity_numbers=(rng.random(sizes.sum()) < 0.1).astype(np.int64),
    )


def seen_in_batches(loader: ElasticLoader) -> tuple[set[int], set[int]]:
    """The documents that have a target in any of many epochs, and those of which EOS is one."""
    with_target, with_stop = set(), set()
    for step in range(loader.total_steps(EPOCHS)):
        (batch,) = loader.step(step).batches
        for (_, document, _), content in zip(batch.documents.tolist(), read_back(batch), strict=True):
            if content["predictions"]:
                with_target.add(document)
            if EOS in content["predictions"].values():
                with_stop.add(document)
    return with_target, with_stop


@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 5, 9, 15, 16, 17, 18, 31, 40]), min_size=1, max_size=8),
    name=st.sampled_from(sorted(SPECS)),
    overlong=st.sampled_from(["split", "truncate", "drop"]),
    add_bos=st.booleans(),
    ends=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_what_is_told_is_what_the_batches_of_many_epochs_have(
    tmp_path_factory, lengths, name, overlong, add_bos, ends, seed
):
    store = random_store(tmp_path_factory.mktemp("s") / "store", lengths, seed, add_bos=add_bos, ends=ends)
    try:
        loader = loader_of([store], [SPECS[name]], overlong=overlong)
    except UserError:  # nothing has the length, a prompt and a completion: refused before
        return
    with_target, with_stop = seen_in_batches(loader)
    if not with_target:
        with pytest.raises(UserError, match=rf"{len(lengths)} of {len(lengths)} documents have no target"):
            loader.check_targets()
        return
    told = "\n".join(loader.check_targets())
    missing = re.search(r"(\d+) of (\d+) documents have no target for objectives\[0\]", told)
    without = len(lengths) - len(with_target)
    assert (missing is None) == (without == 0)
    assert missing is None or [int(number) for number in missing.groups()] == [without, len(lengths)]
    stops = re.search(r"(\d+) of (\d+) documents teach the model to stop", told)
    assert (stops is None) == (2 * len(with_stop) >= len(with_target))
    assert stops is None or [int(number) for number in stops.groups()] == [len(with_stop), len(with_target)]


def prompts(path: Path, lengths: list[int], prompt_lengths: list[int]) -> TokenStore:
    return write_store(path, lengths, prompt_lengths=np.array(prompt_lengths))


@pytest.mark.parametrize(
    ("spec", "predicts"),
    [
        (NTP_COMPLETION, "a token after the prompt"),
        (bico(eligible="completion"), "a token after the prompt that is not special"),
    ],
)
def test_a_source_whose_completions_are_cut_away_is_refused_by_objective_source_and_cause(
    tmp_path, spec, predicts
):
    good, long = (
        prompts(tmp_path / "good", [9, 9], [3, 3]),
        prompts(tmp_path / "long", [30, 40, 50], [20, 20, 20]),
    )
    specs = [NtpSpec(probability=0.5), spec.model_copy(update={"probability": 0.5})]
    names = ["facts", "chats"]
    with pytest.raises(UserError) as refused:
        loader_of([good, long], specs, names=names, overlong="truncate").check_targets()
    assert f"source 'chats': 3 of 3 documents have no target for objectives[1] ({spec.kind}" in str(
        refused.value
    )
    assert f"which predicts {predicts}: 3 lose theirs by data.overlong=truncate at data.capacity=16" in str(
        refused.value
    )
    assert "raise data.capacity, or set data.overlong=split" in str(refused.value)
    for changes in ({"overlong": "split"}, {"overlong": "truncate", "capacity": 32}):
        told = loader_of([good, long], specs, names=names, **changes).check_targets()
        assert not [line for line in told if "have no target" in line]


def test_some_documents_without_a_target_are_counted_by_what_takes_it(tmp_path):
    store = prompts(tmp_path / "s", [9] * 5 + [9] * 3 + [40] * 2 + [40], [3] * 5 + [9] * 3 + [20] * 2 + [3])
    told = loader_of([store], [NTP_COMPLETION], overlong="truncate").check_targets()
    assert told[0] == (
        "source 's': 5 of 11 documents have no target for objectives[0] (ntp), which predicts a token after the prompt: "
        "3 hold no such token, 2 lose theirs by data.overlong=truncate at data.capacity=16; raise data.capacity, or set "
        "data.overlong=split"
    )
    told = loader_of([store], [NTP_COMPLETION], overlong="drop").check_targets()
    assert "6 of 11 documents" in told[0] and "3 lose theirs by data.overlong=drop" in told[0]


def test_pieces_that_are_prompt_alone_are_counted_where_they_are_most(tmp_path):
    store = prompts(tmp_path / "s", [80] * 4 + [9] * 3, [79] * 4 + [3] * 3)
    (told,) = [t for t in loader_of([store], [NTP_COMPLETION]).check_targets() if "pieces" in t]
    assert told.startswith("source 's': 16 of 23 pieces have no target for objectives[0] (ntp)")
    assert told.endswith("a step of such pieces alone makes no update; raise data.capacity")
    loader = loader_of([store], [NTP_COMPLETION], capacity=48)
    assert not [told for told in loader.check_targets() if "pieces" in told]


def test_documents_of_one_token_are_refused_or_counted(tmp_path):
    ones, some = write_store(tmp_path / "ones", [1] * 4), write_store(tmp_path / "some", [1] * 4 + [2])
    for spec in (NTP, bico()):
        with pytest.raises(
            UserError, match=r"4 of 4 documents .*: 4 hold no such token; train on other data"
        ):
            loader_of([ones], [spec]).check_targets()
        assert "4 of 5 documents have no target" in loader_of([some], [spec]).check_targets()[0]


def test_a_target_far_from_the_end_of_a_document_is_found(tmp_path):
    numbers = np.zeros(60, dtype=np.int64)
    numbers[3] = 1
    store = write_store(tmp_path / "s", [60], has_entities=True, entity_numbers=numbers)
    for changes in ({"capacity": 64}, {"capacity": 16}, {"capacity": 16, "overlong": "truncate"}):
        told = loader_of([store], [bico(unit="entity")], **changes).check_targets()
        assert not [line for line in told if "documents have no target" in line]


def ending(path: Path, lengths: list[int], ends: int) -> TokenStore:
    """A store of which the first `ends` documents end in EOS."""
    tokens = np.full(sum(lengths), 9)
    tokens[np.cumsum(lengths)[:ends] - 1] = EOS
    return write_store(path, lengths, tokens=tokens, prompt_lengths=np.zeros(len(lengths), dtype=np.int64))


@pytest.mark.parametrize(
    ("lengths", "ends", "specs", "changes", "told"),
    [
        ([9] * 4, 4, [NTP], {}, None),
        ([9] * 4, 2, [NTP], {}, None),
        ([40] * 4, 4, [NTP], {}, None),
        ([9] * 4, 4, [NtpSpec(probability=0.5), BicoSpec(probability=0.5)], {}, None),
        ([9] * 4, 0, [NTP], {}, "0 of 4 .*: 4 do not end in the stop token .id 2. .*add_eos"),
        ([9] * 4, 1, [NTP], {}, "1 of 4 .*: 3 do not end in"),
        ([9] * 4, 4, [BicoSpec()], {}, r"0 of 4 .*: 4 end in .*, which no objective predicts .*add \{kind: ntp\}"),
        ([40] * 3 + [9], 4, [NTP], {"overlong": "truncate"}, "1 of 4 .*: 3 lose .* data.overlong=truncate at .*=16"),
        ([40] + [9] * 3, 4, [NTP], {"overlong": "truncate"}, None),
    ],
)  # fmt: skip
def test_a_stop_token_that_most_documents_do_not_teach_is_told_with_the_reason(
    tmp_path, lengths, ends, specs, changes, told
):
    found = loader_of([ending(tmp_path / "s", lengths, ends)], specs, **changes).check_targets()
    assert len(found) == (told is not None), found
    assert told is None or re.search(
        f"source 's': {told}", found[0].replace("documents teach the model to stop", "")
    ), found


def test_sampled_text_is_not_told_to_end_in_a_stop_token(tmp_path):
    """Where a sample is cut it has none, on purpose, and none can be prepared into it."""
    store = ending(tmp_path / "s", [9] * 4, 0)
    data = DataSpec(sources=[SourceSpec(sampled=36)], capacity=16, workers=0)
    assert make(([store], lambda: data), schedule=schedule_of([NTP]), bins=1).check_targets() == []


def test_an_end_of_text_before_a_line_end_teaches_to_stop(tmp_path):
    tokens = np.array([9, 9, 9, EOS, 10, 9, 9, EOS, 10, 10])
    store = write_store(tmp_path / "s", [5, 5], tokens=tokens, prompt_lengths=np.array([0, 0]))
    assert loader_of([store], [NTP]).check_targets() == []


def test_of_an_objective_that_does_not_tell_what_it_predicts_nothing_is_known(tmp_path):
    store = write_store(tmp_path / "s", [1] * 4)
    doubling = DOUBLING.DoublingSpec
    assert loader_of([store], [doubling()]).check_targets() == []
    specs = [NtpSpec(probability=0.5), doubling(probability=0.5)]
    with pytest.raises(UserError, match=r"4 of 4 documents have no target for objectives\[0\] \(ntp\)"):
        loader_of([store], specs).check_targets()


def test_a_rule_inherited_beside_a_build_of_its_own_is_not_trusted(tmp_path):
    class Own(NextTokenPrediction):
        def build(self, documents, key):
            return super().build(documents, key)

    class Renamed(NextTokenPrediction):
        pass

    store = write_store(tmp_path / "s", [1] * 4)
    own = ObjectiveSchedule([Own(spec=NTP, name="own")], [1.0], seed=1)
    assert loader_of([store], [], schedule=own).check_targets() == []
    renamed = ObjectiveSchedule([Renamed(spec=NTP, name="renamed")], [1.0], seed=1)
    with pytest.raises(UserError, match="4 of 4 documents have no target"):
        loader_of([store], [], schedule=renamed).check_targets()


def test_a_rule_that_answers_in_another_form_is_refused(tmp_path):
    class Own(NextTokenPrediction):
        def possible_targets(self, documents):
            return np.ones(len(documents), dtype=bool)

    schedule = ObjectiveSchedule([Own(spec=NTP, name="own")], [1.0], seed=1)
    loader = loader_of([write_store(tmp_path / "s", [9] * 4)], [], schedule=schedule)
    with pytest.raises(
        UserError, match=r"Own: possible_targets\(\) must give one bool per token, got bool of shape"
    ):
        loader.check_targets()
