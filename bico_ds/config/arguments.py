"""Types of command-line arguments. Each raises `argparse.ArgumentTypeError`, which argparse shows as one message."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from bico_ds.common.errors import UserError
from bico_ds.config.paths import FolderOrHubName, LocalPath


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """An integer of at least 0."""
    return _at_least(0, text)


def local_path(text: str) -> Path:
    """A file or folder; `~` and `${NAME}` are expanded."""
    return Path(path_text(text))


def path_text(text: str) -> str:
    """What may be a path, or else a pattern or a name; `~` and `${NAME}` are expanded."""
    return _checked(text, LocalPath.expanded)


def written_path(text: str) -> LocalPath:
    """A file or folder of another machine, where `~` and `${NAME}` will be expanded."""
    _checked(text, LocalPath.in_shell)
    return LocalPath(text)


def folder_or_hub_name(text: str) -> FolderOrHubName:
    """A folder with a model or tokenizer, or its name on the hub; refused where it cannot be expanded here."""
    path_text(text)
    return FolderOrHubName(text)


def _checked(text: str, expanded: Callable[[LocalPath], str]) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return expanded(LocalPath(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, found {value}")
    return value
