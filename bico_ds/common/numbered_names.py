"""Names that end in a number, as this program writes them, told from all others in a folder."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

_NUMBER = re.compile(r"[0-9]{1,18}")  # Python's own digits would be of all scripts


@dataclass(frozen=True)
class NumberedName:
    """`prefix`, a number with zeros in front up to `digits` digits, `suffix`.

    Whatever else lies in a folder (`step-000002.bak`, `step-2`, `step-000002 (copy)`) is somebody's own, and passed over.
    """

    prefix: str
    suffix: str = ""
    digits: int = 1

    def of(self, number: int) -> str:
        """The name of this number, which is not negative."""
        return f"{self.prefix}{number:0{self.digits}d}{self.suffix}"

    def number_in(self, name: str) -> int | None:
        """The number in this name; None where `of` makes no such name."""
        digits = name.removeprefix(self.prefix).removesuffix(self.suffix)
        if not _NUMBER.fullmatch(digits):
            return None
        return int(digits) if self.of(int(digits)) == name else None

    def in_folder(self, folder: Path) -> list[tuple[int, Path]]:
        """Whatever has such a name in `folder`, in the order of the numbers; nothing where no folder can be read there."""
        found = []
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                number = self.number_in(path.name)
                if number is not None:
                    found.append((number, path))
        return sorted(found)
