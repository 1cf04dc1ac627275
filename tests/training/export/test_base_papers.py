"""What is copied from beside a base: its licences as they are, and nothing that a model folder could smuggle out."""

from __future__ import annotations

from pathlib import Path

import pytest

from bico_ds.config.paths import FolderOrHubName
from bico_ds.training.export import base_papers
from bico_ds.training.export.base_papers import BasePapers, papers_of
from bico_ds.training.export.card import missing_papers
from tests.training.export.test_licences import TEXTS


def papers(folder: Path) -> BasePapers:
    return papers_of(FolderOrHubName(str(folder)))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path / "base"


def test_licences_notices_and_policies_are_copied_byte_by_byte(base: Path, tmp_path: Path) -> None:
    kept = (
        "LICENSE",
        "LICENCE.txt",
        "Notice",
        "NOTICE.md",
        "USE_POLICY.md",
        "COPYING",
        "LICENSE-MODEL",
        "license.pdf",
    )
    for name in kept:
        (base / name).write_bytes(name.encode() + b"\xff\r\n\0")
    for name in (
        "LICENSES.py",
        "license.json",
        "license.key",
        "licensed_data.txt",
        "notices.bin",
        "weights.safetensors",
        "my_LICENSE",
    ):
        (base / name).write_text("x")
    (base / "LICENSES").mkdir()
    (tmp_path / "out").mkdir()
    papers(base).write(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        name: (base / name).read_bytes() for name in kept
    }


def test_a_notice_that_the_licence_demands_is_written_where_the_base_has_none(
    base: Path, tmp_path: Path
) -> None:
    (base / "LICENSE").write_text(TEXTS["llama3.1"])
    (tmp_path / "out").mkdir()
    found = papers(base)
    found.write(tmp_path / "out")
    notice = (tmp_path / "out" / "NOTICE").read_text(encoding="utf-8")
    assert notice.startswith("Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright ©")
    assert found.carried == ["LICENSE", "NOTICE"]
    (base / "Notice.txt").write_text("its own")
    assert papers(base).carried == ["LICENSE", "Notice.txt"]


def test_a_link_out_of_the_folder_is_not_followed(base: Path, tmp_path: Path) -> None:
    """What it leads to would be passed on with the model."""
    (tmp_path / "secret").write_text("key")
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    (base / "NOTICE").symlink_to("../secret")
    (base / "USE_POLICY.md").symlink_to("nowhere")
    (base / "README.md").symlink_to(tmp_path / "card")
    (tmp_path / "card").write_text("---\nlicense: mit\n---\n")
    found = papers(base)
    assert not found.files and not found.card
    assert [line.split(":")[0] for line in found.refused] == ["LICENSE", "NOTICE", "USE_POLICY.md"]
    assert "a link that leads out of the base's folder" in found.refused[0]
    assert any("Not copied from the base: LICENSE" in note for note in missing_papers(found))


def test_large_files_and_many_are_not_copied(base: Path) -> None:
    (base / "LICENSE").write_bytes(bytes((1 << 20) + 1))
    for number in range(25):
        (base / f"NOTICE.{number:02}").write_text("x")
    found = papers(base)
    assert "LICENSE: more than 1 MiB" in found.refused
    assert len(found.files) == 20 and len(found.refused) == 6


def test_a_folder_of_the_hubs_cache_has_links_that_are_followed_and_tells_the_name(
    tmp_path: Path, monkeypatch
) -> None:
    revision = "0" * 39 + "a"
    root = tmp_path / "models--meta-llama--Llama-3.1-8B"
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)
    for name, text in (
        ("config.json", "{}"),
        ("LICENSE", TEXTS["llama3.1"]),
        ("README.md", "---\nlicense: llama3.1\n---\n"),
    ):
        (root / "blobs" / name).write_text(text)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (tmp_path / "secret").write_text("key")
    (snapshot / "NOTICE").symlink_to(tmp_path / "secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for path in (FolderOrHubName(str(snapshot)), FolderOrHubName("meta-llama/Llama-3.1-8B")):
        found = papers_of(path)
        assert (found.name, found.is_on_hub, found.revision) == ("meta-llama/Llama-3.1-8B", True, revision)
        assert list(found.files) == ["LICENSE"] and found.card == {"license": "llama3.1"}
        assert len(found.refused) == 1 and found.refused[0].startswith("NOTICE: a link")


def test_a_hub_name_that_is_in_no_cache_is_looked_up_in_no_network(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    found = papers_of(FolderOrHubName("some/model"))
    assert (found.name, found.is_on_hub, found.folder) == ("some/model", True, None)
    assert "not on the machine that wrote this export" in missing_papers(found)[0]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/models/llama", "llama"),
        ("runs/tiny_base/export", "tiny_base/export"),
        ("${UNSET_HERE}/llama", "llama"),
        ("~/llama/", "llama"),
    ],
)
def test_a_local_path_tells_its_last_part_alone(path: str, name: str, monkeypatch) -> None:
    monkeypatch.delenv("UNSET_HERE", raising=False)
    found = papers_of(FolderOrHubName(path))
    assert (found.name, found.is_on_hub, found.folder) == (name, False, None)


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no head",
        "---\n[1, 2]\n---\n",
        "---\na: b: c\n---\n",
        "---\n!!python/name:os.system\n---\n",
        "---\nlicense: mit",
    ],
)
def test_a_card_without_a_head_says_nothing(base: Path, card: str) -> None:
    (base / "README.md").write_text(card)
    assert papers(base).card == {}


def test_what_is_not_known_is_said(base: Path) -> None:
    assert "No licence was found beside the base:" in missing_papers(papers(base))[0]
    (base / "README.md").write_text("---\nlicense: llama3.2\n---\n# Llama\n")
    assert "(its card names Llama 3.2 Community License)" in missing_papers(papers(base))[0]
    assert [licence.hub_id for licence in papers(base).licences] == ["llama3.2"]
    (base / "LICENSE").write_text("You may do what I say.")
    assert papers(base).licences[0].hub_id == "llama3.2"
    (base / "README.md").unlink()
    assert "none that this program knows: read it" in missing_papers(papers(base))[0]
    (base / "LICENSE").write_text(TEXTS["mit"])
    assert not missing_papers(papers(base))


def test_the_bounds_are_those_that_are_named() -> None:
    assert (base_papers._MOST_BYTES, base_papers._MOST_FILES) == (1 << 20, 20)
