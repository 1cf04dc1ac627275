"""Headers and indexes of weights: whatever is wrong with them, one message names the file before a weight is read."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bico_ds.common.errors import UserError
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.build import build_model
from bico_ds.model.weights.load import weight_files
from bico_ds.model.weights.safetensors_header import StoredTensor, read_header
from tests.damaged_files import damaged
from tests.model.refusals import refusal
from tests.model.tiny_llama import save_llama

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
NEXT = {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}


def write(file: Path, header: bytes, data: int = 32) -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    return file


def write_entries(file: Path, data: int = 32, **entries: Any) -> Path:
    return write(file, json.dumps(entries).encode(), data)


def test_a_header_gives_dtype_shape_and_place_of_each_tensor(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(4, dtype=torch.float16),
        "c": torch.zeros(0, 7),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    found = {tensor.name: tensor for tensor in read_header(file)}
    assert {name: tensor.shape for name, tensor in found.items()} == {"a": (2, 3), "b": (4,), "c": (0, 7)}
    assert {name: tensor.dtype for name, tensor in found.items()} == {"a": "F32", "b": "F16", "c": "F32"}
    a = found["a"]
    assert file.read_bytes()[a.begin : a.begin + 24] == tensors["a"].numpy().tobytes()
    assert isinstance(a, StoredTensor)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"shape": [2, 3], "data_offsets": [0, 24]}, "dtype None is none of safetensors'"),
        ({"dtype": "F32", "data_offsets": [0, 24]}, "shape must be a list of sizes, found None"),
        ({"dtype": "F32", "shape": [2, 3]}, "data_offsets must be its first byte and its end, found None"),
        ({**ENTRY, "dtype": 5}, "dtype 5 is none"),
        ({**ENTRY, "dtype": ["F32"]}, "dtype ['F32'] is none"),
        ({**ENTRY, "dtype": "f32"}, "dtype 'f32' is none"),
        ({**ENTRY, "shape": "23"}, "shape must be a list of sizes, found '23'"),
        ({**ENTRY, "shape": [2, -3]}, "shape must be a list of sizes"),
        ({**ENTRY, "shape": [2, 3.0]}, "shape must be a list of sizes"),
        ({**ENTRY, "shape": [True, 6]}, "shape must be a list of sizes"),
        ({**ENTRY, "shape": [6] + [1] * 64}, "shape must be a list of sizes"),
        ({**ENTRY, "shape": [2, 4]}, "of shape [2, 4] does not take the 24 bytes"),
        ({**ENTRY, "shape": [2**62, 2**62]}, "does not take the 24 bytes"),
        ({**ENTRY, "shape": [10**30]}, "shape must be a list of sizes"),
        ({**ENTRY, "data_offsets": [24, 0]}, "data_offsets must be its first byte and its end, found [24, 0]"),
        ({**ENTRY, "data_offsets": [-24, 0]}, "data_offsets must be"),
        ({**ENTRY, "data_offsets": [0]}, "data_offsets must be"),
        ({**ENTRY, "data_offsets": [0, 24, 24]}, "data_offsets must be"),
        ({**ENTRY, "data_offsets": {"0": 24}}, "data_offsets must be"),
        ({**ENTRY, "data_offsets": [8, 32]}, "begins at byte 8 and leaves a gap before it"),
        (None, "its entry is no object"),
        ([ENTRY], "its entry is no object"),
    ],
)  # fmt: skip
def test_an_entry_that_places_no_tensor_is_refused_with_file_and_tensor(
    tmp_path: Path, entry: Any, words: str
) -> None:
    file = write_entries(tmp_path / "model.safetensors", **{"layer.weight": entry})
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        read_header(file)
    assert str(file) in str(refused.value) and "'layer.weight'" in str(refused.value)
    assert str(refused.value).endswith("copy it again")


def test_tensors_that_overlap_or_leave_bytes_between_them_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    assert [tensor.name for tensor in read_header(write_entries(file, b=NEXT, a=ENTRY))] == ["b", "a"]
    with pytest.raises(UserError, match="'b' begins at byte 16 and overlaps with another"):
        read_header(write_entries(file, a=ENTRY, b={**NEXT, "data_offsets": [16, 24]}, data=24))
    with pytest.raises(UserError, match="'b' begins at byte 32 and leaves a gap before it"):
        read_header(write_entries(file, a=ENTRY, b={**NEXT, "data_offsets": [32, 40]}, data=40))
    with pytest.raises(UserError, match="has 169 bytes, 168 by its header: copy it again"):
        read_header(write_entries(file, a=ENTRY, b=NEXT, data=33))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"is cut short or no safetensors file \(0 bytes\): copy it again"),
        (b"\0" * 7, r"is cut short or no safetensors file \(7 bytes\): copy it again"),
        (b"\xff" * 64, "its header would have .* bytes, and 100,000,000 are the most"),
        ((100_000_001).to_bytes(8, "little"), "100,000,000 are the most"),
        ((99_000_000).to_bytes(8, "little"), r"is cut short or no safetensors file \(8 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the weights"),
        (b"\2" + b"\0" * 7 + b"[]", "holds a list, not an object"),
        (b"\4" + b"\0" * 7 + b"null", "holds null, not an object"),
        (b"\3" + b"\0" * 7 + b"NaN", "has NaN"),
        (b"\4" + b"\0" * 7 + b'{"\xff"', "not UTF-8 text"),
        (b"\3" + b"\0" * 7 + b" {}", "does not begin with a brace"),
        (b"\x15" + b"\0" * 7 + b'{"__metadata__":{"":1}', "cut short|__metadata__|not valid JSON"),
        ((50_000).to_bytes(8, "little") + b"[" * 50_000, "nested deeper"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_safetensors_file_is_refused_as_such(
    tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^model.path: '{file}' .*{words}"):
        read_header(file)


def test_what_safetensors_itself_takes_for_no_header_is_refused(tmp_path: Path) -> None:
    twice = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24],"dtype":"F32"}}'
    with pytest.raises(UserError, match="duplicate field"):
        read_header(write(tmp_path / "model.safetensors", twice, 24))


def test_any_damage_to_a_header_is_one_error_and_what_passes_safetensors_reads_alike(tmp_path: Path) -> None:
    save_llama(tmp_path)
    file = min(tmp_path.glob("*.safetensors"))
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")

    def passes(header: bytes) -> bool:
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
        if (said := refusal(lambda: read_header(file))) is not None:
            assert str(file) in said
            return False
        with safe_open(file, framework="pt") as theirs:
            read = {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()}  # noqa: SIM118
        assert read == {tensor.name: tensor.shape for tensor in read_header(file)}
        return True

    # About 8 of 150 pass; where none does, others are drawn.
    assert any(sum(map(passes, damaged(content[8:end], count=150))) for _ in range(10))


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize(
    "content", ["[]", "null", "", "{", "5", '{"weight_map": []}', '{"weight_map": {}}', "{}", "[" * 9999]
)
def test_an_index_that_is_none_is_refused_by_its_name(tmp_path: Path, content: str) -> None:
    index_of(tmp_path).write_text(content)
    with pytest.raises(
        UserError, match=f"^model.path: '{index_of(tmp_path)}' is not a weights index .*copy it again$"
    ):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors", "x/../../m.safetensors", "/etc/passwd", "..", ".", "", "a//b", "a\\b", "a\0b", "a\nb",
        "x" * 5000,
    ],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    save_llama(tmp_path / "other")
    folder = tmp_path / "model"
    save_llama(folder)
    index_of(folder).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match="names the file '.*, which is not one of this folder") as refused:
        weight_files(folder)
    assert len(str(refused.value)) < 1000


def test_any_damage_to_an_index_is_one_error(tmp_path: Path) -> None:
    save_llama(tmp_path)
    passed = 0
    for damage in damaged(index_of(tmp_path).read_bytes(), count=150):
        index_of(tmp_path).write_bytes(damage)
        if refusal(lambda: weight_files(tmp_path)) is None:
            assert all(file.parent == tmp_path for file in weight_files(tmp_path))
            passed += 1
    assert passed


def start(folder: Path, device: str = "cpu") -> Any:
    return build_model(ModelSpec(path=str(folder)), seed=1, ds_config=None, device=device)


def test_the_hubs_cache_whose_files_are_links_is_read(tmp_path: Path) -> None:
    save_llama(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "blobs").iterdir())):
        blob = file.rename(file.with_name(f"{number:064x}"))
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    assert start(snapshot).causal_lm.lm_head.weight.shape == (101, 32)
    shard = min(snapshot.glob("*.safetensors"))
    shard.resolve().unlink()
    with pytest.raises(UserError, match=rf"1 of 3 shards are missing .*{shard.name}"):
        start(snapshot)
    for file in snapshot.glob("*.safetensors*"):
        file.unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(UserError, match="model.safetensors' is a link to a file that is not there"):
        start(snapshot)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_download_that_ended_early_is_found_by_a_start_and_by_a_dry_run(
    tmp_path: Path, device: str
) -> None:
    save_llama(tmp_path)
    shard = max(tmp_path.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{shard.name}' has .* bytes, .* by its header: copy it again"):
        start(tmp_path, device)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", None])
def test_pickled_weights_that_are_cut_short_or_none_are_refused(
    tmp_path: Path, content: bytes | None
) -> None:
    save_llama(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    if content is None:
        torch.save([torch.zeros(3)], tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(
        UserError, match="pytorch_model.bin' (cannot be read as|does not hold tensors by name)"
    ):
        build_model(ModelSpec(path=str(tmp_path), allow_pickle=True), seed=1, ds_config=None, device="cpu")


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
@pytest.mark.parametrize(
    "name", ["", "config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"]
)
def test_a_folder_or_file_that_may_not_be_read_is_named(name: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        save_llama(folder)
        os.chmod(root, 0o755)
        start(folder)  # imports what it needs, which the second user may not be able to read
        (folder / name).chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match="[Pp]ermission denied") as refused:
                start(folder)
        finally:
            os.seteuid(0)
        assert str(folder / name) in str(refused.value)
