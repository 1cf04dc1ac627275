"""Whether a recipe's value names a folder on this machine or a Hugging Face repository. The one rule for all."""

from __future__ import annotations

from pathlib import Path

_MARKS = ("/", ".", "~", "$", "models/", "runs/")


def is_local_folder(value: str) -> bool:
    """Whether `value` means a folder (or file) here, even a missing one; else it is a hub name (``owner/name``).

    A hub name has exactly one slash, nothing of that name exists here, and its owner is neither `models` nor
    `runs`: a recipe's ``models/llama-3.1-70b`` that nobody fetched must not be looked for on the hub.
    """
    return value.startswith(_MARKS) or value.count("/") != 1 or Path(value).exists()
