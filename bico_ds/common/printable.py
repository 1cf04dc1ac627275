"""Text of unknown origin, made fit for a line of a terminal or a log."""

from __future__ import annotations


def escaped(text: str) -> str:
    """`text` on one line, with an escape (`\\n`, `\\u202e`) for each character that a terminal would obey or hide."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def on_one_line(text: str, *, most: int) -> str:
    """`text` in at most `most` characters, a blank for each that moves the cursor, colours, reorders, or cannot be encoded.

    What is longer ends in `…`.
    """
    shown = "".join(character if character.isprintable() else " " for character in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"
