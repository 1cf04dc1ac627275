"""Words of a batch script: what `sbatch` and the shell read of it is what was meant. No torch here.

`sbatch` reads `#SBATCH` lines by rules of its own (`_get_argument` in its opt.c): quotes of both kinds group, a backslash
takes the next character as it is, within quotes too, and an unquoted # begins a comment. Tried with SLURM 22.05.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from bico_ds.common.errors import UserError

_PLAIN = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
# `sbatch` blanks these words wherever in a line they stand, unless a backslash parts them.
_BLANKED = re.compile(r"(?i)(?<=[ph])(?=ackjob|etjob)")
# Control characters, line separators, and halves of characters, which no file can hold.
_REFUSED = ("Cc", "Zl", "Zp", "Cs")


def refuse_control_characters(text: str, where: str) -> None:
    """Raise `UserError` where a text holds a line break or another control character; `where`: its key or option."""
    for character in text:
        if unicodedata.category(character) in _REFUSED:
            raise UserError(
                f"{where}: {text!r} holds the control character U+{ord(character):04X}, which has no place in a "
                "batch script; leave it out, or rename what it names"
            )


def sbatch_line(option: str, value: object = None) -> str:
    """A line of the script that gives `sbatch` one option, with its value where it has one."""
    name = option if value is None else f"{option}={_quoted(str(value))}"
    return f"#SBATCH {name}"


def sbatch_line_of(option: str) -> str:
    """The line for an option as a user wrote it, as in `--exclusive`, `--mem 0` or `--comment=two words`.

    Quotes and backslashes in it are `sbatch`'s. Raises `UserError` for what is no option.
    """
    words: list[str] = []
    for word in _split(option):
        if words and words[-1].startswith("--") and "=" in words[-1] and not word.startswith("-"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    if not words or not re.match(r"--?[A-Za-z]", words[0]):
        raise UserError(
            f"--sbatch '{option}': give an option of sbatch with its dashes, as in --sbatch=--exclusive"
        )
    return " ".join(["#SBATCH", *map(_word_of_option, words)])


def literal_pattern(path: Path, where: str) -> str:
    """A path for a SLURM option that takes a filename pattern (`%j` …), of which it stands for itself.

    Raises `UserError` for a backslash, which SLURM drops, and replaces nothing in the rest then.
    """
    if "\\" in str(path):
        raise UserError(
            f"{where}: '{path}' holds a backslash, which SLURM drops from names of files; choose another"
        )
    return str(path).replace("%", "%%")


def _word_of_option(word: str) -> str:
    name, sign, value = word.partition("=")
    return f"{name}={_quoted(value)}" if sign and _PLAIN.fullmatch(name) else _quoted(word)


def _quoted(text: str) -> str:
    """One word for `sbatch`."""
    parted = _BLANKED.sub("\0", re.sub(r'(["\\])', r"\\\1", text)).replace("\0", "\\")
    return text if _PLAIN.fullmatch(text) and parted == text else f'"{parted}"'


def _split(option: str) -> list[str]:
    """The words of an option, as `sbatch` finds them, but for its comments: a # is a letter here."""
    words: list[str] = []
    word, quote, escaped = None, "", False
    for character in option:
        if escaped:
            word, escaped = (word or "") + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            word, quote = (word or "", "") if character == quote else ((word or "") + character, quote)
        elif character in "\"'":
            word, quote = word or "", character
        elif character.isspace():
            words += [] if word is None else [word]
            word = None
        else:
            word = (word or "") + character
    if quote or escaped:
        what = f"a quote ({quote}) without its end" if quote else "a backslash at its end"
        raise UserError(f"--sbatch '{option}': {what}; a backslash before a quote makes it a letter")
    return words if word is None else [*words, word]
