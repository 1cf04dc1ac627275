"""What lies beside a base for whoever passes it on: licence, notice, use policy, and what its own card says of them.

A model folder is a stranger's: what is copied out of it is bounded, and never something that it only points at elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.common.yaml_files import read_value
from bico_ds.config.paths import FolderOrHub, FolderOrHubName
from bico_ds.training.export.licences import Licence, licence_of_card, licence_of_text

CARD = "README.md"
NOTICE = "NOTICE"
_NAMES = re.compile(r"(licen[cs]e|notice|copying|(acceptable_?)?use_?policy)([^a-z].*)?", re.IGNORECASE)
_NO_TEXT = (".py", ".json", ".bin", ".safetensors", ".key", ".pem", ".env")
_MOST_BYTES = 1 << 20  # the longest licence that is in use has some 50 KB
_MOST_FILES = 20
_MOST_CARD = 1 << 20
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_REVISION = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class BasePapers:
    """The papers of the base that a recipe names, as far as they are on this machine.

    `name`: for others to read, `owner/name` on the hub or the last part of a local path. `folder`: None where it is not
    here. `files`: what there is to copy, by name. `refused`: what is not copied, and why, a line each. `card`: the head of
    its card.
    """

    name: str
    is_on_hub: bool
    revision: str | None = None
    folder: Path | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    card: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def licences(self) -> tuple[Licence, ...]:
        """Those that are known: by the texts, and where these are of none, by the base's card."""
        texts = (licence_of_text(content.decode("utf-8", "replace")) for content in self.files.values())
        found = list(dict.fromkeys(licence for licence in texts if licence is not None))
        named = licence_of_card(self.card)
        return tuple(found) if found else () if named is None else (named,)

    @property
    def has_licence_text(self) -> bool:
        return any(re.match(r"licen[cs]e|copying", name, re.IGNORECASE) for name in self.files)

    @property
    def added_notice(self) -> str | None:
        """The notice that its licences demand, where the base has none."""
        if any(name.lower().startswith("notice") for name in self.files):
            return None
        notices = [licence.notice for licence in self.licences if licence.notice is not None]
        return "\n".join(notices) + "\n" if notices else None

    @property
    def carried(self) -> list[str]:
        """The names of the files that `write` writes."""
        return [*self.files, *([NOTICE] if self.added_notice is not None else [])]

    def write(self, folder: Path) -> None:
        """Copy the files into an export, and add the notice that a licence demands. Raises OSError."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        if self.added_notice is not None:
            (folder / NOTICE).write_text(self.added_notice, encoding="utf-8")


def papers_of(path: FolderOrHubName) -> BasePapers:
    """What lies beside a base, without asking a network. A folder that cannot be read is as one that is not here."""
    try:
        here = path.here()
    except UserError:  # a variable that is set on the training machine only
        return BasePapers(name=_last_part(path.text), is_on_hub=False)
    folder = here if isinstance(here, Path) else _cached(here)
    name, is_on_hub, revision = _name_of(here, folder)
    if folder is None or not folder.is_dir():
        return BasePapers(name=name, is_on_hub=is_on_hub, revision=revision)
    files, refused = _read_papers(folder)
    return BasePapers(
        name=name,
        is_on_hub=is_on_hub,
        revision=revision,
        folder=folder,
        files=files,
        refused=refused,
        card=_head_of_card(folder),
    )


def _name_of(here: FolderOrHub, folder: Path | None) -> tuple[str, bool, str | None]:
    """The name, whether that is on the hub, and the revision; a folder of the hub's cache tells them, too."""
    cached = None if folder is None else _CACHED.fullmatch(folder.parent.parent.name)
    is_snapshot = cached is not None and folder is not None and folder.parent.name == "snapshots"
    revision = (
        folder.name if folder is not None and is_snapshot and _REVISION.fullmatch(folder.name) else None
    )
    if not isinstance(here, Path):
        return here, True, revision
    if cached is not None and is_snapshot:
        return f"{cached['owner']}/{cached['name']}", True, revision
    return _last_part(str(here)), False, None


def _last_part(text: str) -> str:
    """The end of a local path, which tells nothing of a machine; of `…/NAME/export` its run, too."""
    parts = [part for part in Path(text).parts if part not in ("/", "..", ".")]
    kept = parts[-2:] if parts[-1:] == ["export"] else parts[-1:]
    return "/".join(kept)


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _read_papers(folder: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    files: dict[str, bytes] = {}
    refused: list[str] = []
    try:
        found = sorted(path for path in folder.iterdir() if _is_paper(path))
    except OSError as error:
        return {}, (f"the folder of the base cannot be read: {error.strerror}",)
    for path in found:
        if (problem := _problem(path, folder)) is None:
            try:
                files[path.name] = path.read_bytes()
            except OSError as error:
                problem = error.strerror or str(error)
        if problem is not None:
            refused.append(f"{path.name}: {problem}")
    kept = dict(list(files.items())[:_MOST_FILES])
    refused += [f"{name}: more than {_MOST_FILES} such files" for name in files if name not in kept]
    return kept, tuple(refused)


def _is_paper(path: Path) -> bool:
    return (
        _NAMES.fullmatch(path.name) is not None
        and path.name.isprintable()
        and path.suffix.lower() not in _NO_TEXT
        and not path.is_dir()
    )


def _problem(path: Path, folder: Path) -> str | None:
    """Why a file is not copied: in the hub's cache all files are links, elsewhere one may lead to anything."""
    target = path.resolve()
    is_snapshot = folder.resolve().parent.name == "snapshots"
    roots = (
        [folder.resolve(), folder.resolve().parent.parent / "blobs"] if is_snapshot else [folder.resolve()]
    )
    if not any(target.is_relative_to(root) for root in roots):
        return "a link that leads out of the base's folder"
    if not target.is_file():
        return "no file"
    if path.stat().st_size > _MOST_BYTES:
        return f"more than {_MOST_BYTES >> 20} MiB"
    return None


def _head_of_card(folder: Path) -> dict[str, Any]:
    """The YAML at the top of the base's own card; nothing where there is none that can be read."""
    path = folder / CARD
    try:
        if _problem(path, folder) is not None or path.stat().st_size > _MOST_CARD:
            return {}
        text = path.read_text(encoding="utf-8-sig")
        head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        values = read_value(head[1], str(path)) if head is not None else None
    except (OSError, UnicodeDecodeError, UserError):
        return {}
    return values if isinstance(values, dict) else {}
