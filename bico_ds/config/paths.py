"""Paths as users write them: the one place that expands `~` and `${NAME}`, and that tells folders from hub names.

A value keeps the text as it was written, in the recorded recipe too. It becomes a path on the machine that uses it, at
the moment of use: a variable may differ between login node and compute nodes. No `WrittenPath` is a `str` or a
`PathLike`, so that the text itself cannot be opened by mistake.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NewType, Self

from pydantic import GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from bico_ds.common.errors import UserError
from bico_ds.common.printable import on_one_line

HubName = NewType("HubName", str)
"""`owner/name` of a Hugging Face repository."""

FolderOrHub = Path | HubName
"""A folder (or file) of this machine, there or not, or a name on the hub. At run time a `Path` is always the former."""

# Any other $ is a letter of the name, as in a shell.
_VARIABLE = re.compile(
    r"\$(?:(?P<bare>[a-zA-Z_]\w*)|\{(?P<braced>[a-zA-Z_]\w*)\}|(?P<wrong>\{[^}]*\}?|\d\w*))", re.ASCII
)
# With its slash unquoted in a shell, which expands ~user as we do.
_HOME = re.compile(r"(~[\w.-]*)(/|$)", re.ASCII)
# What a line of a terminal, a log or a batch script would obey.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_MOST_BYTES, _MOST_BYTES_OF_NAME = 4095, 255  # Linux's PATH_MAX, with its final NUL, and NAME_MAX
_MOST_SHOWN = 100
_FOLDER_MARKS = ("/", ".", "~", "models/", "runs/")


@dataclass(frozen=True)
class WrittenPath:
    """A path, a pattern of paths or a name as it was written. Compared by its text."""

    text: str
    where: str = field(default="", compare=False)
    """What an error begins with: `FILE:LINE: key`, or as much of it as is known."""

    def __str__(self) -> str:
        return self.text

    def expanded(self) -> str:
        """The text as it reads on this machine: `~`, `~user`, `$NAME` and `${NAME}` replaced.

        Raises `UserError`, with the line at which it was written, for a variable that is unset or empty here, for a `${` or
        `$1` that is none (`${HOME` without its brace), for a home folder that this machine does not have, and for what can
        be no path here.
        """
        if self.text.split("/")[0] == "~" and os.environ.get("HOME") == "":
            raise self._error("the environment variable HOME is empty on this machine; set it, or")
        path = os.path.expanduser(_VARIABLE.sub(self._variable, self.text))
        if path.startswith("~"):
            raise self._error(f"there is no home folder {path.split('/')[0]} on this machine;")
        if problem := no_path(path):
            raise self._error(problem)
        return path

    def in_shell(self) -> str:
        """The text as a word of a shell script, which expands it by the same rule where and when it runs.

        There an unset or empty variable ends the script. Raises `UserError` for a `$` that begins no variable, and for
        what can be no path anywhere.
        """
        if problem := no_path(self.text):
            raise self._error(problem)
        words, rest, end = [], self.text, 0
        if home := _HOME.match(rest):
            words, rest = ['"${HOME:?}"' if home[1] == "~" else home[1], home[2]], rest[home.end() :]
        for found in _VARIABLE.finditer(rest):
            words += [_quoted(rest[end : found.start()]), f'"${{{self._name(found)}:?}}"']
            end = found.end()
        return "".join(words) + _quoted(rest[end:])

    def _name(self, found: re.Match[str]) -> str:
        if found["wrong"] is not None:
            raise self._error(f"'{found[0]}' is neither ${{NAME}} nor $NAME; correct it, or")
        return found["braced"] or found["bare"]

    def _variable(self, found: re.Match[str]) -> str:
        name = self._name(found)
        if value := os.environ.get(name):
            return value
        state = "is not set" if name not in os.environ else "is empty"
        raise self._error(f"the environment variable {name} {state} on this machine; set it, or")

    def _error(self, problem: str) -> UserError:
        where = f"{self.where}: " if self.where else ""
        return UserError(f"{where}'{on_one_line(self.text, most=_MOST_SHOWN)}': {problem} give another path")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A text that is not empty in, the text out."""
        return core_schema.with_info_wrap_validator_function(
            cls._validated,
            core_schema.str_schema(min_length=1),
            serialization=core_schema.to_string_ser_schema(when_used="always"),
        )

    @classmethod
    def _validated(cls, value: Any, as_text: Callable[[Any], str], info: ValidationInfo) -> Self:
        if isinstance(value, cls):
            return value
        text = as_text(value)
        if problem := no_path(text):
            raise ValueError(f"'{on_one_line(text, most=_MOST_SHOWN)}': {problem} give another path")
        return cls(text, where=info.field_name or "")


def no_path(text: str) -> str | None:
    """Why no file can have this name, whether or not one does; None where one can."""
    if (found := _CONTROL.search(text)) is not None:
        return f"it has the control character {ord(found[0]):#04x};"
    if not text.strip():
        return "it is blank;"
    try:
        written = os.fsencode(text)
    except UnicodeEncodeError:
        return (
            f"it has characters that names of files have not here, which are in {sys.getfilesystemencoding()}; set "
            "PYTHONUTF8=1, or"
        )
    if len(written) > _MOST_BYTES or max(map(len, written.split(b"/"))) > _MOST_BYTES_OF_NAME:
        return f"a path has at most {_MOST_BYTES:,} bytes, and {_MOST_BYTES_OF_NAME} from one / to the next;"
    return None


def _quoted(text: str) -> str:
    return shlex.quote(text) if text else ""


@dataclass(frozen=True)
class LocalPath(WrittenPath):
    """A file or folder."""

    def here(self) -> Path:
        """The path on this machine. Raises `UserError` as `expanded` does."""
        return Path(self.expanded())


@dataclass(frozen=True)
class FolderOrHubName(WrittenPath):
    """A folder with a model or tokenizer, or the name of one on the hub."""

    @property
    def is_folder(self) -> bool:
        """Whether a folder (or file) is meant, even a missing one.

        A hub name has exactly one slash and no `$`, begins with none of `/ . ~`, nothing of that name exists here, and
        its owner is neither `models` nor `runs`: a recipe's `models/llama-3.1-70b` that was not fetched must not be
        looked for on the hub.
        """
        text = self.text
        return "$" in text or text.startswith(_FOLDER_MARKS) or text.count("/") != 1 or os.path.exists(text)

    def here(self) -> FolderOrHub:
        """The folder on this machine, or the hub name. Raises `UserError` as `expanded` does."""
        return Path(self.expanded()) if self.is_folder else HubName(self.text)

    def is_here(self) -> bool:
        """Whether it is a folder that exists on this machine. Raises `UserError` as `expanded` does."""
        path = self.here()
        return isinstance(path, Path) and path.is_dir()


def replace_paths(tree: Any, replaced: Callable[[WrittenPath], Any]) -> Any:
    """A copy of nested mappings and lists in which every `WrittenPath` is what `replaced` makes of it."""
    if isinstance(tree, WrittenPath):
        return replaced(tree)
    if isinstance(tree, dict):
        return {key: replace_paths(value, replaced) for key, value in tree.items()}
    if isinstance(tree, list):
        return [replace_paths(value, replaced) for value in tree]
    return tree
