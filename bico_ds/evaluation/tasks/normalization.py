"""The form in which texts are compared: what is only another way to write a text does not count.

In the *plain form* of a text

- letters and their marks are composed (Unicode NFC), so that `é` is one character however the text was stored;
- typographic quotation marks, apostrophes and dashes, and the ellipsis, are those of ASCII;
- forms for one width, place or side alone (full-width letters, half-width kana, vertical or small punctuation, no-break
  spaces, Arabic letters by position) are the ordinary characters;
- characters that show nothing (soft hyphen, zero-width space and joiners, directional marks, variation selectors) are gone.

Marks stay: `Jose` is not `José`. So do `²`, `½`, `Ⅳ`, brackets such as `「`, and letters of other scripts that only look
alike. `normalized` also folds case, as Unicode defines it for all languages alike: `ß` is `ss`, `ﬁ` is `fi`, `ς` is `σ`, but
the Turkish `ı` is not `i`. ASCII is its own plain form.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# With the geresh and gershayim of Hebrew, and the Armenian apostrophe.
_QUOTES = dict.fromkeys("‘’‚‛‹›❛❜ʼʻ´′‵׳՚", "'") | dict.fromkeys("“”„‟«»❝❞〝〞〟″‶״", '"')
_DASHES = dict.fromkeys("‐‑‒–—―⸺⸻−", "-")
_TYPOGRAPHIC = str.maketrans({**_QUOTES, **_DASHES, "…": "..."})
# Tags of Unicode's decompositions whose characters differ from the ordinary ones in form alone.
_FORMS = ("wide", "narrow", "small", "vertical", "noBreak", "initial", "medial", "final", "isolated")
# Unicode's property Default_Ignorable_Code_Point.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
# Full stops: ASCII, Chinese and Japanese, Urdu, Hindi (and of verse), Armenian, Ethiopic, Burmese, Khmer, Tibetan.
_FINAL = " .。۔।॥։።။។།"


def plain_form(text: str) -> str:
    """`text` in its plain form (see above), with its case and white space."""
    if text.isascii():
        return text
    # Decomposed, since a mark follows a full-width letter too.
    letters = _INVISIBLE.sub("", unicodedata.normalize("NFD", text))
    return unicodedata.normalize("NFC", letters.translate(_ordinary_characters()))


def strip_answer(completion: str) -> str:
    """The plain form without surrounding white space and final full stops; each run of white space becomes one space."""
    return " ".join(plain_form(completion).split()).rstrip(_FINAL)


def normalized(text: str) -> str:
    """The form in which answers are compared: case, and what `strip_answer` removes, do not count."""
    # Folded after the decomposition: two stored forms of one text could give different letters otherwise.
    return strip_answer(unicodedata.normalize("NFD", text).casefold())


def stands_in(part: str, text: str) -> bool:
    """Whether `part` stands in `text`, both normalized or in plain form.

    A part does not end between a letter and its mark: not every letter with a mark is one composed character.
    """
    start = text.find(part)
    while start >= 0 and _has_mark_at(text, start + len(part)):
        start = text.find(part, start + 1)
    return start >= 0


def begins(part: str, text: str) -> bool:
    """Whether `text` begins with `part`, by the same rules."""
    return text.startswith(part) and not _has_mark_at(text, len(part))


def _has_mark_at(text: str, position: int) -> bool:
    return position < len(text) and unicodedata.category(text[position]).startswith("M")


@lru_cache(maxsize=1)
def _ordinary_characters() -> dict[int, str]:
    """A table for `str.translate`: quotation marks, dashes, and the forms of `_FORMS`, all of which have four digits."""
    table = dict(_TYPOGRAPHIC)
    for code in range(0x80, 0x10000):
        tag, *parts = unicodedata.decomposition(chr(code)).split() or [""]
        if tag.strip("<>") in _FORMS:
            table[code] = "".join(chr(int(part, 16)) for part in parts).translate(_TYPOGRAPHIC)
    return table
