"""Whatever happens to a byte of a token store, nobody trains on it: it is refused, with one message, by every reader."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bico_ds.common.errors import UserError
from bico_ds.data import verification
from bico_ds.data.inspect_store import describe_store
from bico_ds.data.store import StoreManifest, TokenStore, Verify
from bico_ds.data.tokenizer import load_tokenizer
from tests import EARLIER_RUN
from tests.cpu_time import cpu_seconds_below
from tests.damaged_files import damaged
from tests.data.prepare.ingesting import TEXTS, ingest_files, write_jsonl
from tests.data.stores import write_store

OF_0_1_0 = EARLIER_RUN / "store"
FOR_PEOPLE = ("report.txt", "lengths.png")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, bpe_tokenizer: str) -> Path:
    """A store with every column: prompts, groups and entities."""
    folder = tmp_path_factory.mktemp("healthy")
    records = [
        {"q": t[:9], "a": t[9:], "who": i % 7, "spans": [[0, 6], [9, 12]]} for i, t in enumerate(TEXTS)
    ]
    settings = {"prompt_field": "q", "completion_field": "a", "group_field": "who", "entities_field": "spans"}
    ingest_files(write_jsonl(folder / "a.jsonl", records), bpe_tokenizer, folder / "store", **settings)
    return folder / "store"


@pytest.fixture
def store(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "store"))


def _refusal(path: Path, verify: Verify = "once") -> str:
    with pytest.raises(UserError) as caught:
        TokenStore.open(path, verify=verify)
    return str(caught.value)


def _flip(file: Path, position: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def test_a_flipped_bit_anywhere_in_a_store_is_refused(store: Path) -> None:
    rng = np.random.default_rng()
    files = [f for f in sorted(store.rglob("*")) if f.is_file() and f.name not in FOR_PEOPLE]
    assert {"offsets.bin", "entity_numbers.bin", "manifest.json", "tokenizer.json"} <= {f.name for f in files}
    for file in files:
        content = file.read_bytes()
        for _ in range(12):
            position, bit = int(rng.integers(len(content))), int(rng.integers(8))
            _flip(file, position, bit)
            refusal = _refusal(store)
            assert file.name in refusal, (file.name, position, bit, refusal)
            assert "--force" in refusal
            file.write_bytes(content)
    TokenStore.open(store)


def test_a_flipped_bit_in_the_columns_of_an_old_store_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    for name in ("tokens", "offsets", "prompt_lengths", "groups", "word_starts"):
        path = Path(shutil.copytree(OF_0_1_0, tmp_path / name))
        file = path / f"{name}.bin"
        _flip(file, int(rng.integers(file.stat().st_size)), int(rng.integers(8)))
        assert file.name in _refusal(path)


def test_an_old_store_opens_and_keeps_its_name(tmp_path: Path) -> None:
    """The name is part of checkpoints: it must be that of version 0.1.0, from manifests with a checksum or without."""
    opened = TokenStore.open(OF_0_1_0, verify="checksums")
    assert opened.fingerprint == "eb40b78095fd275ad516c5259382744b"
    copy = Path(shutil.copytree(OF_0_1_0, tmp_path / "copy"))
    (copy / "manifest.json").write_text(opened.manifest.to_json())
    assert TokenStore.open(copy).fingerprint == opened.fingerprint


def _columns(path: Path) -> dict[str, np.ndarray]:
    types = {"offsets": "<i8", "prompt_lengths": "<i4", "groups": "<i8", "word_starts": "u1"}
    return {name: np.fromfile(path / f"{name}.bin", dtype=dtype) for name, dtype in types.items()}


DAMAGES = {
    "first offset not 0": ("offsets", 0, 1),
    "negative offset": ("offsets", 3, -5),
    "offset past the end": ("offsets", 4, 2**40),
    "overflowing offset": ("offsets", 4, -(2**63)),
    "last offset short": ("offsets", -1, 5),
    "negative prompt": ("prompt_lengths", 2, -1),
    "prompt longer than its document": ("prompt_lengths", 2, 10_000),
    "largest prompt": ("prompt_lengths", -1, 2**31 - 1),
    "negative group": ("groups", 5, -2),
    "words after the end": ("word_starts", -1, 255),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_columns_that_cannot_be_are_refused_without_reading_the_tokens(tmp_path: Path, damage: str) -> None:
    """Also with right checksums, as a broken writer would leave them, and by processes that verify none."""
    path = write_store(tmp_path / "s", [7, 11, 5, 9, 3, 8, 6]).path
    name, index, value = DAMAGES[damage]
    column = _columns(path)[name]
    column[index] = value
    column.tofile(path / f"{name}.bin")
    assert f"{name}.bin" in _refusal(path, "structure")


def test_documents_without_tokens_are_no_damage(tmp_path: Path) -> None:
    assert write_store(tmp_path / "s", [0, 3, 0, 4, 0]).lengths.tolist() == [0, 3, 0, 4, 0]
    assert len(write_store(tmp_path / "empty", [])) == 0


def _rewrite(path: Path, old_form: bool, **changes: Any) -> None:
    """Edit the manifest with its own checksum, so that it passes that one, or as version 0.1.0 had it: without."""
    manifest = {**TokenStore.open(path).manifest.__dict__, **changes}
    text = StoreManifest(**manifest).to_json()
    if old_form:
        content = json.loads(text)
        del content["manifest_checksum"], content["further_checksums"]
        text = json.dumps(content)
    (path / "manifest.json").write_text(text)


EDITS: list[tuple[str, Any]] = [
    *(("documents", value) for value in (-1, 6, 8, 2**70, 7.0, True, "7", None, float("nan"), [7])),
    *(("tokens", value) for value in (-1, 48, 50, 2**70, 49.0, None)),
    *(("token_dtype", value) for value in ("uint16", "uint64", "int32", "float32", "", None, [])),
    *(("vocab_size", value) for value in (0, -1, 20, 2**32 + 1, 1e5, None, True)),
    *(("max_token_id", value) for value in (-2, 100_000, 2**40, 57.0, None)),
    *(("bos_id", value) for value in (-1, 100_000, None, 1.0, "1", False)),
    *(("eos_id", value) for value in (-1, 100_000, 2**31, None, 2.0, "</s>")),
    *(("special_ids", value) for value in ([-1], [1.0], ["<s>"], [None], [True])),
    *(("add_bos", value) for value in (1, "yes", None)),
    *(("has_entities", value) for value in (True, 0, None)),
    *(("tokenizer_hash", value) for value in (7, None, ["test"])),
    *(("file_sizes", value) for value in ({}, [], {"tokens.bin": 196}, {"../tokens.bin": 1})),
    *(("checksums", value) for value in ({}, None, {"tokens.bin": "0" * 64}, {"tokens.bin": 5})),
    *(("further_checksums", value) for value in ([], {"tokenizer/a": 1}, {"tokenizer/a": "xyz"})),
]


@pytest.mark.parametrize(("field", "value"), EDITS, ids=lambda value: repr(value)[:20])
def test_a_manifest_with_impossible_values_is_refused_in_both_forms(
    tmp_path: Path, field: str, value: Any
) -> None:
    header = write_store(tmp_path / "s", [7, 11, 5, 9, 3, 8, 6], add_bos=True)
    _rewrite(header.path, False, add_eos=True)
    for old_form in (False, True):
        if old_form and field == "further_checksums":
            continue
        path = Path(shutil.copytree(header.path, tmp_path / f"s-{old_form}"))
        _rewrite(path, old_form, **{field: value})
        assert "manifest.json" in _refusal(path, "structure")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(sorted(StoreManifest.__dataclass_fields__)),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=4,
    ),
)
def test_an_edited_manifest_is_refused_whatever_the_value(
    healthy: Path, tmp_path: Path, field, value
) -> None:
    path = tmp_path / "edited"
    if not path.exists():
        shutil.copytree(healthy, path)
    content = json.loads((healthy / "manifest.json").read_text())
    if json.dumps(content.get(field, False)) == json.dumps(value):
        return
    (path / "manifest.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(UserError):
        TokenStore.open(path, verify="structure")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "7",
        "{}",
        "[" * 5000,
        '{"format_version": 1}',
        '{"format_version": ' + "1" * 5000,
        "\x00",
    ],
)
def test_a_manifest_that_is_none_is_refused(store: Path, text: str) -> None:
    (store / "manifest.json").write_text(text)
    assert "damaged" in _refusal(store)


@pytest.mark.parametrize("with_checksum", [True, False])
def test_a_damaged_manifest_opens_unchanged_or_is_refused_within_a_second(
    healthy: Path, tmp_path: Path, with_checksum: bool
) -> None:
    """Without its own checksum, as version 0.1.0 wrote it, so that the checks of its values come to speak."""
    path = Path(shutil.copytree(healthy, tmp_path / "s"))
    content = json.loads((path / "manifest.json").read_text())
    if not with_checksum:
        del content["manifest_checksum"], content["further_checksums"]
    for form in damaged(json.dumps(content).encode(), count=150):
        (path / "manifest.json").write_bytes(form)
        with cpu_seconds_below(1, form[:200]), contextlib.suppress(UserError):
            TokenStore.open(path, verify="structure")


@pytest.mark.parametrize("version", [True, 1.0, "1", None, -1, 2])
def test_another_format_is_refused_before_its_checksum(store: Path, version: Any) -> None:
    content = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({**content, "format_version": version}))
    assert "has format" in _refusal(store)


def test_special_tokens_of_another_tokenizer_in_an_old_manifest_are_refused(
    store: Path, bpe_tokenizer: str
) -> None:
    """All of these are possible values: only the tokenizer itself can tell."""
    tokenizer = load_tokenizer(bpe_tokenizer)
    TokenStore.open(store).check_tokenizer(tokenizer)
    for change in ({"eos_id": 5}, {"bos_id": 5}, {"special_ids": (0,)}):
        path = Path(shutil.copytree(store, store.with_name(next(iter(change)))))
        _rewrite(path, True, **change)
        opened = TokenStore.open(path, verify="structure")
        with pytest.raises(UserError, match="special ids"):
            opened.check_tokenizer(tokenizer)


def test_swapped_truncated_extended_linked_and_unreadable_files(healthy: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(healthy, tmp_path / name))

    def swap(path: Path) -> None:
        other = write_jsonl(path.parent / "b.jsonl", [])
        other.write_bytes(np.arange(60, dtype="<i8").tobytes())
        other.replace(path / "groups.bin")

    swap(swapped := copy("swapped"))
    assert "groups.bin" in _refusal(swapped)
    for name, change in (("cut", -1), ("longer", 1)):
        path = copy(name)
        os.truncate(path / "tokens.bin", (path / "tokens.bin").stat().st_size + change)
        assert "tokens.bin has" in _refusal(path)
    linked = copy("linked")
    (linked / "tokens.bin").rename(tmp_path / "elsewhere.bin")
    (linked / "tokens.bin").symlink_to(tmp_path / "elsewhere.bin")
    TokenStore.open(linked)
    _flip(tmp_path / "elsewhere.bin", 20, 0)
    assert "checksum of tokens.bin" in _refusal(linked)
    (linked / "tokens.bin").unlink()
    (linked / "tokens.bin").mkdir()
    assert "tokens.bin is missing" in _refusal(linked)
    (alone := copy("alone")).joinpath("tokenizer", "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in _refusal(alone)
    shutil.rmtree(alone / "tokenizer")
    TokenStore.open(alone)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Also small stores are recorded; the names of the files that are read to verify them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verification, "_SMALL_BYTES", 0)
    read, names = verification._read, []
    monkeypatch.setattr(
        verification, "_read", lambda file, *rest: (names.append(file.name), read(file, *rest))[1]
    )
    return names


def test_a_big_store_is_read_once_and_again_when_it_may_have_changed(
    store: Path, recorded: list[str]
) -> None:
    TokenStore.open(store)
    assert "tokens.bin" in recorded
    recorded.clear()
    TokenStore.open(store)
    assert recorded == []
    TokenStore.open(store, verify="checksums")
    assert "tokens.bin" in recorded
    file = store / "tokens.bin"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    _flip(file, 20, 0)
    os.utime(file, ns=times)  # somebody hides the change
    for _ in range(2):
        assert "checksum of tokens.bin" in _refusal(store)
    TokenStore.open(store, verify="structure")


def test_a_copy_and_another_machine_verify_for_themselves(
    store: Path, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    TokenStore.open(store)
    moved = store.rename(store.with_name("moved"))
    recorded.clear()
    TokenStore.open(moved)
    assert "tokens.bin" in recorded
    recorded.clear()
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    TokenStore.open(moved)
    assert "tokens.bin" in recorded


@pytest.mark.parametrize("record", ["", "[]", "null", '{"identity": 5}', '{"identity": "00"}'])
def test_a_damaged_record_vouches_for_nothing(store: Path, recorded: list[str], record: str) -> None:
    TokenStore.open(store)
    for file in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"):
        file.write_text(record)
    recorded.clear()
    TokenStore.open(store)
    assert "tokens.bin" in recorded


def test_a_cache_that_cannot_be_written_costs_another_reading_only(
    store: Path, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    for _ in range(2):
        recorded.clear()
        TokenStore.open(store)
        assert "tokens.bin" in recorded


def test_a_user_without_a_home_folder_reads_every_time(
    store: Path, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # one that no machine knows
    for _ in range(2):
        recorded.clear()
        TokenStore.open(store)
        assert "tokens.bin" in recorded


def test_looking_inside_a_damaged_store_is_refused(store: Path) -> None:
    assert list(describe_store(store))
    _flip(store / "tokens.bin", 33, 1)
    with pytest.raises(UserError, match=r"checksum of tokens\.bin"):
        list(describe_store(store))
