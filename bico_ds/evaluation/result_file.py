"""A result file that grows part by part: a part that is in it already is not computed again."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.common.json_files import JsonError, parse_object
from bico_ds.evaluation.scoring.share import PromptShare, gather_from_ranks

Compute = Callable[[], "dict[str, Any] | None"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to compute.

    `section` and `name` are its keys in the file. `identity`: a digest of all that its figures depend on. `size`:
    prompts, for the progress display. `compute` returns its content, or None where it was stopped. `is_current`: whether
    content of this identity is as this version would make it.
    """

    section: str
    name: str
    identity: str
    size: int
    compute: Compute
    is_current: Callable[[dict[str, Any]], bool] = lambda content: True


def identity_of(*values: Any) -> str:
    """A digest of JSON-able values, for a part that depends on them alone."""
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()[:16]


class ResultFile:
    """The JSON file at `path`.

    It holds `model`, `weights`, `identities`, and where asked for `tasks`, `training_texts`, `choice`, `retention`,
    `retention_before`, `texts`, `held_out`, `agreement` and `base_answers`.
    Only the first rank reads and writes. Raises `UserError` on every rank where the file holds results of other weights,
    and on the first rank where it is no result file, or none can be written.
    """

    def __init__(self, path: Path, *, model: str, weights: str, share: PromptShare) -> None:
        self.path = path
        self._share = share
        fresh: dict[str, Any] = {"model": model, "weights": weights, "identities": {}}
        self.values: dict[str, Any] = (
            gather_from_ranks(self._read() if share.is_first else None, share)[0] or fresh
        )
        if self.values.get("weights") != weights or "identities" not in self.values:
            raise UserError(
                f"--output {path}: holds results of other weights or another tokenizer "
                f"({self.values.get('model')}); name another file, or delete this one"
            )

    def has(self, part: Part) -> bool:
        """Whether the file holds this part, computed from the same inputs with the same options by the same rules."""
        content = self.content(part.section, part.name, part.identity)
        return content is not None and part.is_current(content)

    def content(self, section: str, name: str, identity: str) -> dict[str, Any] | None:
        """The part of this identity, by whatever rules it was computed; None where the file has none."""
        if self.values["identities"].get(f"{section}/{name}") != identity:
            return None
        return self.values[section][name]

    def discard(self, section: str, name: str) -> None:
        """Forget a part, where there is one."""
        self.values["identities"].pop(f"{section}/{name}", None)
        self.values.get(section, {}).pop(name, None)

    def results(self, parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
        """What the file holds of these parts, by section and name."""
        found: dict[str, dict[str, Any]] = {}
        for part in filter(self.has, parts):
            found.setdefault(part.section, {})[part.name] = self.values[part.section][part.name]
        return found

    def run(self, parts: Sequence[Part], on_part: Callable[[Part], None]) -> bool:
        """Compute the parts that are not in the file yet, saving after each. False where one was stopped."""
        for part in parts:
            if self.has(part):
                continue
            on_part(part)
            result = part.compute()
            if result is None:
                return False
            self.values.setdefault(part.section, {})[part.name] = result
            self.values["identities"][f"{part.section}/{part.name}"] = part.identity
            if self._share.is_first:
                self._write()
        return True

    def _read(self) -> dict[str, Any] | None:
        if self.path.is_dir():
            raise UserError(f"--output {self.path}: is a folder; name a file in it")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A file that cannot be written must be noticed before anything is computed.
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
            if not self.path.exists():
                return None
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--output {self.path}: no result file can be kept there ({error})") from error
        with suppress(JsonError):
            values = parse_object(text, self.path, strict=False)
            if _has_its_parts(values):
                return values
        raise UserError(f"--output {self.path}: is there already and no result file; name another file")

    def _write(self) -> None:
        text = json.dumps(self.values, ensure_ascii=False, indent=1) + "\n"
        write_atomically(self.path, text)


def _has_its_parts(values: dict[str, Any]) -> bool:
    """Whether there is content for every part that has an identity."""
    identities = values.get("identities", {})
    if not isinstance(identities, dict):
        return False
    parts = (key.partition("/") for key in identities)
    return all(
        isinstance(values.get(section), dict) and isinstance(values[section].get(name), dict)
        for section, _, name in parts
    )
