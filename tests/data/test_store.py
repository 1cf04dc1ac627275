"""The token store: what is written is what is read, and a damaged store is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from bico_ds.common.errors import UserError
from bico_ds.data.prepare.store_writer import TokenStoreWriter
from bico_ds.data.store import StoreHeader, TokenStore

HEADER = StoreHeader(
    vocab_size=70_000,
    tokenizer_hash="hash",
    special_ids=(0, 1, 2),
    bos_id=1,
    eos_id=2,
    add_bos=True,
    add_eos=True,
    has_entities=True,
)


def _random_documents(rng: np.random.Generator, count: int) -> list[dict]:
    lengths = rng.integers(1, 40, count)
    return [
        {
            "tokens": rng.integers(0, 70_000, length),
            "prompt": int(rng.integers(0, length + 1)),
            "group": int(rng.integers(-1, 2**62)),
            "starts": rng.random(length) < 0.4,
            "entities": rng.integers(0, 5, length),
        }
        for length in lengths
    ]


def _write(path: Path, documents: list[dict], *, cut: int, overwrite: bool = False) -> None:
    with TokenStoreWriter(path, HEADER, overwrite=overwrite) as writer:
        for part in (documents[:cut], documents[cut:]):
            join = lambda key, part=part: np.concatenate([d[key] for d in part])  # noqa: E731
            writer.append(
                join("tokens"),
                np.array([len(d["tokens"]) for d in part]),
                prompt_lengths=np.array([d["prompt"] for d in part]),
                groups=np.array([d["group"] for d in part]),
                word_starts=join("starts"),
                entity_numbers=join("entities"),
            )
        writer.finish()


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, list[dict]]:
    documents = _random_documents(np.random.default_rng(7), 53)
    _write(tmp_path / "store", documents, cut=20)
    return tmp_path / "store", documents


def test_slices_read_back_are_the_slices_written(store: tuple[Path, list[dict]]) -> None:
    path, documents = store
    rng = np.random.default_rng(8)
    opened = pickle.loads(pickle.dumps(TokenStore.open(path, verify="checksums", tokenizer_hash="hash")))
    ids = rng.permutation(len(documents))[:30]
    starts = np.array([rng.integers(0, opened.lengths[i]) for i in ids])
    lengths = np.array([rng.integers(1, opened.lengths[i] - s + 1) for i, s in zip(ids, starts, strict=True)])
    read = opened.read(ids, starts, lengths, np.arange(30), source=3)
    for d, (i, s, n) in enumerate(zip(ids, starts, lengths, strict=True)):
        at, want = slice(read.offsets[d], read.offsets[d + 1]), documents[i]
        assert read.token_ids[at].tolist() == want["tokens"][s : s + n].tolist()
        assert read.word_starts is not None
        assert read.word_starts[at].tolist() == want["starts"][s : s + n].tolist()
        assert read.entity_number is not None
        assert read.entity_number[at].tolist() == want["entities"][s : s + n].tolist()
        assert read.prompt_length[d] == min(max(want["prompt"] - s, 0), n)
        assert (read.group[d], read.id[d], read.piece[d], read.source[d]) == (want["group"], i, d, 3)


def test_content_does_not_depend_on_how_it_was_appended(store: tuple[Path, list[dict]]) -> None:
    path, documents = store
    _write(path.with_name("other"), documents, cut=33)
    for file in path.iterdir():
        assert file.read_bytes() == (path.with_name("other") / file.name).read_bytes()
    assert TokenStore.open(path).fingerprint == TokenStore.open(path.with_name("other")).fingerprint


def test_small_vocabularies_take_two_bytes_a_token(tmp_path: Path) -> None:
    header = StoreHeader(
        vocab_size=2**16,
        tokenizer_hash="",
        special_ids=(),
        bos_id=None,
        eos_id=2,
        add_bos=False,
        add_eos=True,
    )
    with TokenStoreWriter(tmp_path / "s", header) as writer:
        one = np.ones(1, dtype=np.int64)
        writer.append(one * 65535, one, prompt_lengths=one, groups=one, word_starts=one.astype(bool))
        manifest = writer.finish()
    assert (manifest.token_dtype, manifest.file_sizes["tokens.bin"]) == ("uint16", 2)
    assert TokenStore.open(tmp_path / "s").whole(np.array([0])).token_ids.tolist() == [65535]


def _edit_manifest(path: Path, **changes: object) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _flip_a_byte(path: Path) -> None:
    content = bytearray((path / "tokens.bin").read_bytes())
    content[17] ^= 1
    (path / "tokens.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "manifest.json").unlink(), "not a complete token store"),
        (lambda p: (p / "manifest.json").write_text("{"), "damaged"),
        (lambda p: _edit_manifest(p, surprise=1), "fields ['surprise']"),
        (lambda p: _edit_manifest(p, format_version=99), "has format 99"),
        (lambda p: (p / "tokens.bin").write_bytes(b"123"), "tokens.bin has 3 bytes"),
        (lambda p: (p / "offsets.bin").unlink(), "offsets.bin is missing"),
        (_flip_a_byte, "wrong checksum of tokens.bin"),
        (lambda p: _edit_manifest(p, tokenizer_hash="else"), "another checksum"),
    ],
)
def test_a_damaged_store_is_refused(store: tuple[Path, list[dict]], damage, message: str) -> None:
    path, _ = store
    damage(path)
    with pytest.raises(UserError) as caught:
        TokenStore.open(path, verify="checksums", tokenizer_hash="hash")
    assert message in str(caught.value)


def test_a_store_of_another_tokenizer_is_refused(store: tuple[Path, list[dict]]) -> None:
    with pytest.raises(UserError, match=r"another tokenizer \(hash\) than this run's \(else\)"):
        TokenStore.open(store[0], tokenizer_hash="else")


def test_a_store_is_replaced_only_on_request_and_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    documents = _random_documents(np.random.default_rng(1), 5)
    path = tmp_path / "store"
    _write(path, documents, cut=2)
    before = TokenStore.open(path).fingerprint
    with pytest.raises(UserError, match="--force"):
        _write(path, documents[:4], cut=2)
    with pytest.raises(RuntimeError), TokenStoreWriter(path, HEADER, overwrite=True):
        raise RuntimeError
    assert TokenStore.open(path).fingerprint == before
    _write(path, documents[:4], cut=2, overwrite=True)
    assert len(TokenStore.open(path, verify="checksums")) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
