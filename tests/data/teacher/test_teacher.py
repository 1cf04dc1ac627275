"""Stored teachers: their rows are plain transformers' own distributions, reach the rows of a batch, and fit the run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.paths import FolderOrHubName
from bico_ds.config.sections.data import DataSpec, SourceSpec
from bico_ds.config.sections.model import ModelSpec
from bico_ds.config.sections.retention import RetentionSpec
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.sample_order import StreamSpec
from bico_ds.data.loading.sequences import cut_store
from bico_ds.data.teacher import prepare
from bico_ds.data.teacher.lookup import teacher_rows
from bico_ds.data.teacher.opening import open_teachers
from bico_ds.data.teacher.prepare import TextCut, find_tasks, prepare_parts
from bico_ds.data.teacher.stored import StoredTeacher, part_name
from bico_ds.documents import Documents
from bico_ds.model.build import build_model
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.objectives.schedule import ObjectiveSchedule
from bico_ds.runtime.distributed import Ranks
from tests.data.stores import BOS, write_store

V, CAPACITY = 43, 24
ALONE = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tiny_llama, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(tiny_llama, base, tmp_path_factory) -> Path:
    """Another model of the same architecture."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("tuned") / "model")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def random_store(path: Path, *, add_bos: bool = False):
    random = np.random.default_rng()
    lengths = [*random.integers(1, CAPACITY, 12).tolist(), 2 * CAPACITY + 5, 1, CAPACITY + 1, 3 * CAPACITY]
    random.shuffle(lengths)
    return write_store(path, lengths, add_bos=add_bos, tokens=random.integers(3, V, sum(lengths)))


def spec_of(model: Path) -> ModelSpec:
    return ModelSpec(path=FolderOrHubName(str(model)), dtype="fp32")


def make(model, stores, folder, *, top_k=5, overlong="split", force=False, capacity=CAPACITY):
    cut = TextCut(capacity=capacity, overlong=overlong)
    tasks = find_tasks(spec_of(model), stores, cut, folder, top_k=top_k, force=force)
    prepare_parts(
        lambda: build_model(spec_of(model), seed=0, ds_config=None, device="cpu"),
        tasks, folder, ALONE, batch_tokens=50, force=force,
    )  # fmt: skip
    return tasks


def pieces(tokens: list[int], overlong: str, bos: bool) -> list[list[int]]:
    """What a document is cut into, by the words of the documentation."""
    if len(tokens) <= CAPACITY:
        return [tokens]
    if overlong == "drop":
        return []
    found, rest = [tokens[:CAPACITY]], tokens[CAPACITY:]
    while rest and overlong == "split":
        room = CAPACITY - bos
        found.append([BOS] * bos + rest[:room])
        rest = rest[room:]
    return found


@torch.no_grad()
def log_probs(model, tokens: list[int]) -> torch.Tensor:
    """fp64 [L - 1, V], after every token but the last."""
    return model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_rows_are_the_log_probabilities_of_plain_transformers(
    base, tiny_llama, tmp_path, monkeypatch, overlong, add_bos
):
    monkeypatch.setattr(prepare, "_SHARD_ROWS", 37)
    store = random_store(tmp_path / "store", add_bos=add_bos)
    make(base, [store], tmp_path / "teacher", overlong=overlong)
    teacher = StoredTeacher.open(tmp_path / "teacher", store, verify="checksums")
    texts = [
        piece
        for document in store.whole(np.arange(len(store)))
        for piece in pieces(document.token_ids.tolist(), overlong, add_bos)
    ]
    assert teacher.lengths.tolist() == [len(text) for text in texts]
    for number, text in enumerate(texts):
        expected = log_probs(tiny_llama, text)
        found = teacher.read(np.full(len(expected), number), np.arange(len(expected)))
        best = expected.topk(5)
        same = torch.equal(found.ids, best.indices) or len(expected) == 0
        assert same or (expected.gather(1, found.ids) - best.values).abs().max() < 1e-4
        target = expected.gather(1, torch.tensor(text[1:], dtype=torch.long)[:, None])[:, 0]
        for stored, exact in ((found.log_probs, best.values), (found.target_log_probs, target)):
            assert stored.dtype == torch.float32
            torch.testing.assert_close(stored.double(), exact, rtol=2**-10, atol=5e-4)
        rest = 1 - found.log_probs.double().exp().sum(1)
        torch.testing.assert_close(rest, 1 - best.values.exp().sum(1), rtol=4e-3, atol=1e-6)


def test_an_interrupted_teacher_goes_on_after_its_last_shard(base, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_SHARD_ROWS", 37)
    store = random_store(tmp_path / "store")
    make(base, [store], tmp_path / "whole")
    compute, calls = prepare._compute, []

    def interrupted(*arguments):
        calls.append(arguments[3])
        if len(calls) == 4:
            raise KeyboardInterrupt
        compute(*arguments)

    monkeypatch.setattr(prepare, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(base, [store], tmp_path / "parts")
    assert not (tmp_path / "parts" / part_name(store)).exists()
    rows = tmp_path / "parts" / f".{part_name(store)}.preparing" / "rows.bin"
    with open(rows, "ab") as file:  # as a process that was killed while it appended
        file.write(b"torn")
    make(base, [store], tmp_path / "parts")
    assert calls == [0, 1, 2, 3, *range(3, calls[-1] + 1)] and len(calls) > 6
    for name in ("rows.bin", "manifest.json"):
        one, other = (tmp_path / whole / part_name(store) / name for whole in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in other.parent.iterdir()) == ["manifest.json", "rows.bin"]
    assert make(base, [store], tmp_path / "parts") == [], "what is there already is not computed again"


def test_shards_of_another_model_are_not_kept(base, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_SHARD_ROWS", 37)
    store = random_store(tmp_path / "store")
    with monkeypatch.context() as stopped:
        stopped.setattr(prepare, "_publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(tuned, [store], tmp_path / "one")
    make(base, [store], tmp_path / "one")
    make(base, [store], tmp_path / "other")
    one, other = (tmp_path / name / part_name(store) / "rows.bin" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_a_full_disk_is_refused_before_the_model_is_loaded(base, tmp_path, monkeypatch):
    store = random_store(tmp_path / "store")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match=r"24 bytes per token, and the disk has 0\.0 GB free"):
        make(base, [store], tmp_path / "teacher")


@pytest.fixture(scope="module")
def world(base, tmp_path_factory):
    """Two stores, their teachers with five and with all tokens, and the recipe of a run on them."""
    folder = tmp_path_factory.mktemp("world")
    stores = [random_store(folder / "a", add_bos=True), random_store(folder / "b")]
    make(base, stores, folder / "five")
    make(base, stores, folder / "all", top_k=V)

    def recipe(*overrides: str, teacher: str = "five"):
        sources = ", ".join(f"{{store: {store.path}}}" for store in stores)
        mine = {
            "model.path": base,
            "model.config": "null",
            "model.dtype": "fp32",
            "data.sources": f"[{sources}]",
            "data.capacity": CAPACITY,
            "evaluation.tasks": "[]",
            "retention": f"{{kl: 1.0, teacher: {folder / teacher}}}",
        }
        return load_recipe("tiny_bico", [*(f"{key}={value}" for key, value in mine.items()), *overrides])

    return folder, stores, recipe


def loader_of(world, recipe, *, objective=None, state=None, on=None, exclude_target=False):
    _, stores, _ = world
    data = DataSpec(
        sources=[SourceSpec(store=str(store.path)) for store in stores], capacity=CAPACITY, workers=0
    )
    objective = objective or NextTokenPrediction(spec=NtpSpec(kind="ntp", probability=1.0))
    stream = StreamSpec(
        stores=stores,
        data=data,
        schedule=ObjectiveSchedule([objective], [1.0], 1),
        seed=1,
        global_batch_bins=4,
        vocabulary=V,
        retention=RetentionSpec(kl=1.0, on=on, exclude_target=exclude_target),
        teachers=open_teachers(recipe, stores, verify="structure"),
    )
    return ElasticLoader(stream, RankShare(micro_batch_bins=2), state=state)


def dense_divergence(base_model, tuned_model, batch, *, without_targets: bool) -> tuple[float, int]:
    """Σ KL(base ‖ tuned) over the compared rows, from plain forwards of each document, and the number of rows."""
    total, compared, place = 0.0, set(batch.compared.index.tolist()), 0
    for tokens in torch.split(batch.input_ids, batch.plan.cu_seqlens.diff().tolist()):
        p, q = (log_probs(model, tokens.tolist()) for model in (base_model, tuned_model))
        for row in range(len(tokens) - 1):
            if place in compared:
                keep = torch.ones(V, dtype=torch.bool)
                keep[tokens[row + 1]] = not without_targets
                p_row, q_row = (part[row][keep].log_softmax(-1) for part in (p, q))
                total += float((p_row.exp() * (p_row - q_row)).sum())
            place += 1
    return total, len(compared)


@pytest.mark.parametrize("exclude_target", [False, True])
@pytest.mark.parametrize("on", [None, ["b"]])
def test_with_all_tokens_stored_a_batch_has_the_divergence_of_the_whole_distributions(
    world, tiny_llama, tuned, on, exclude_target
):
    _, _, recipe = world
    keys = [] if on is None else ["retention.on=[b]"]
    other, model = (
        AutoModelForCausalLM.from_pretrained(tuned),
        build_model(spec_of(tuned), seed=0, ds_config=None, device="cpu"),
    )
    found = {}
    for teacher in ("all", "five"):
        loader = loader_of(world, recipe(*keys, teacher=teacher), on=on, exclude_target=exclude_target)
        batches = [batch for step in range(6) for batch in loader.step(step).batches]
        found[teacher] = [float(model(batch).divergence.detach()) for batch in batches]
        assert all(batch.compared.teacher.ids.dtype == torch.int64 for batch in batches)
    expected = [
        dense_divergence(tiny_llama, other, batch, without_targets=exclude_target) for batch in batches
    ]
    assert sum(rows for _, rows in expected) > 50
    for whole, few, (exact, rows) in zip(found["all"], found["five"], expected, strict=True):
        assert whole == pytest.approx(exact, rel=2e-3, abs=1e-3)
        assert rows == 0 or 0 < few < exact


def test_rows_of_several_sources_come_in_the_order_that_is_asked_for(world):
    _, stores, recipe = world
    teachers = open_teachers(recipe(), stores, verify="structure")
    random = np.random.default_rng()
    numbers = [random.permutation(len(teacher.lengths))[:5] for teacher in teachers.values()]
    parts = [
        cut_store(store, longest=CAPACITY, overlong="split").read(chosen, store, source=source)
        for source, (store, chosen) in enumerate(zip(stores, numbers, strict=True))
    ]
    documents = Documents.concatenate(parts)
    batch = NextTokenPrediction(spec=NtpSpec(kind="ntp", probability=1.0)).build(
        documents, BatchKey(seed=0, epoch=0)
    )
    index = torch.from_numpy(random.permutation(len(batch.targets)))
    found = teacher_rows(teachers, batch, index, documents, np.concatenate(numbers))
    place = 0
    order = torch.argsort(index)
    for number, source, length in zip(
        np.concatenate(numbers), documents.source, documents.lengths, strict=True
    ):
        own = order[place : place + length - 1]
        expected = teachers[source].read(np.full(length - 1, number), np.arange(length - 1))
        assert torch.equal(found.ids[own], expected.ids)
        assert torch.equal(found.target_log_probs[own], expected.target_log_probs)
        place += length - 1


class Backwards(NextTokenPrediction):
    """Predicts the token before, in causal steps."""

    def build(self, documents, key):
        batch = super().build(documents, key)
        return replace(batch, targets=batch.input_ids[batch.loss_rows])


class Doubled(NextTokenPrediction):
    def expand(self, lengths):
        return 2 * lengths


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Backwards, "predicts another; let its .sources."), (Doubled, "cuts them otherwise; let its .sources.")],
)
def test_objectives_whose_rows_are_not_those_of_the_teacher_are_refused(world, kind, message):
    _, _, recipe = world
    loader = loader_of(world, recipe(), objective=kind(spec=NtpSpec(kind="ntp", probability=1.0)))
    with pytest.raises(UserError, match=message):
        [loader.step(step) for step in range(6)]


def test_a_resume_with_another_teacher_is_refused(world):
    _, _, recipe = world
    loader = loader_of(world, recipe())
    state = loader.state_dict(0, loader.start_consumed)
    loader_of(world, recipe(), state=state)
    with pytest.raises(UserError, match=r"retention\.teacher of data\.sources\[0\]: \w+ in the checkpoint"):
        loader_of(world, recipe(teacher="all"), state=state)


def test_a_teacher_of_another_run_is_refused_with_what_it_has_and_the_command(world, tuned):
    folder, stores, recipe = world
    assert list(open_teachers(recipe(), stores, verify="once")) == [0, 1]
    assert list(open_teachers(recipe("retention.on=[b]"), stores, verify="once")) == [1]
    for overrides, message in (
        (["data.capacity=25"], "pieces of 24 tokens, and data.capacity is 25"),
        (["data.overlong=drop"], "overlong documents by 'split', and data.overlong is 'drop'"),
        ([f"model.path={tuned}"], f"the distributions of model .*, and model.path '{tuned}' is "),
    ):
        with pytest.raises(UserError, match=rf"source 'a' it has {message}.*bico-ds prepare teacher --store"):
            open_teachers(recipe(*overrides), stores, verify="once")
    third = random_store(folder / "c")
    with pytest.raises(UserError, match=r"source 'b'.*holds no distributions over the store.*but over"):
        open_teachers(recipe(), [stores[0], third], verify="once")
    with pytest.raises(UserError, match="since there is no such folder"):
        open_teachers(recipe(teacher="none"), stores, verify="once")
    shutil.copytree(folder / "five" / part_name(stores[0]), folder / "mixed" / part_name(stores[0]))
    shutil.copytree(folder / "all" / part_name(stores[1]), folder / "mixed" / part_name(stores[1]))
    with pytest.raises(UserError, match="equally many tokens per row .*; found 5 of 'a', 43 of 'b'"):
        open_teachers(recipe(teacher="mixed"), stores, verify="once")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rows.bin", lambda content: content[:-1]),
        ("rows.bin", lambda content: content[:9] + bytes([content[9] ^ 1]) + content[10:]),
        ("rows.bin", None),
        ("manifest.json", lambda content: content.replace(b"24", b"23")),
        ("manifest.json", lambda content: content[:50]),
        ("manifest.json", lambda content: b"[]"),
    ],
)
def test_a_damaged_teacher_is_refused(world, tmp_path, name, damage):
    folder, stores, _ = world
    part = shutil.copytree(folder / "five" / part_name(stores[0]), tmp_path / part_name(stores[0]))
    if damage is None:
        (part / name).unlink()
    else:
        (part / name).write_bytes(damage((part / name).read_bytes()))
    with pytest.raises(UserError, match=f"{name}' is damaged.*prepare it again with --force"):
        StoredTeacher.open(tmp_path, stores[0])


def test_another_part_is_replaced_with_force_alone(base, world, tmp_path):
    folder, stores, _ = world
    teacher = shutil.copytree(folder / "five", tmp_path / "teacher")
    with pytest.raises(UserError, match="exists: .*--force"):
        make(base, stores, teacher, top_k=7)
    make(base, stores, teacher, top_k=7, force=True)
    assert StoredTeacher.open(teacher, stores[1]).manifest.key.top_k == 7
    with pytest.raises(UserError, match="--top-k 44: the model's vocabulary has 43 tokens"):
        make(base, stores, teacher, top_k=44, force=True)
