"""Secrets (passwords, access tokens, keys) left out of whatever is kept or shown: recipes, command lines, messages.

A secret is known by the name of its key (`api_key`, `AWS_SECRET_ACCESS_KEY`) or by its own shape (`hf_…`, a URL's password).
A name that ordinary settings have too (`tokens`) makes a secret of a text alone, never of a number. `${NAME}` is no secret:
it names one that stays in the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

LEFT_OUT = "(not recorded)"
"""What stands in the place of a secret."""

# Of a name with such a word, or such a part, every value is a secret.
_SECRET_WORDS = re.compile(r"secrets?|pwd|authorization")
_SECRET_PARTS = re.compile(
    r"passw|pass[_-]?(?:phrase|word|code)|credential|connection[_-]?string|secret(?:access)?key|api[_-]?key|access[_-]?key|private[_-]?key|sshpass|"
    r"(?:auth|access|api|refresh|bearer|security)[_-]?token",
    re.IGNORECASE,
)
# Of a name whose last word is one of these a text is, but for ordinary names: these words before it.
_LAST_WORDS = re.compile(
    r"[a-z]*tokens?|(?:auth|master|account|ssh)?key|pass|pw|creds?|auth|bearer|cookies?|jwt|otp|sig|signature|pat"
)
_ORDINARY_NAMES = re.compile(
    r"(?:bos|eos|pad|unk|sep|cls|mask|start|end|stop|next|image|added|extra|special) tokens?|"
    r"(?:text|prompt|completion|answer|question|field|column|primary|foreign|sort|group|label|dict|json|row|cache|mask|"
    r"query|attention|name|chat|messages|role|content|metadata|id|map|num) key|key|"
    r"(?:one|two|first|second|third|forward|backward|last|each) pass"
)
_LONGEST_SETTING = 200
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

_NUMBERS = re.compile(r"[\[\](){}\s,\d._+-]*(?:[eE][+-]?\d+|[kKMGT]B?|e?|\.?inf|nan)?[\])}\s]*")
_NAMES_A_VARIABLE = re.compile(r"""["']?\$(?:\w+|\{\w*\})["']?""")
_QUOTE, _BRACKET = re.compile(r"""\\*["']"""), re.compile(r"[\[\]{}]")
_BRACES = re.compile(r"\$\{\w*\}")
_NO_VALUE = frozenset(
    ("", "null", "~", "true", "false", "none", "auto", "yes", "no", "on", "off", LEFT_OUT.lower())
)
_SPECIAL_TOKEN = re.compile(r"<[^<>]*>|\[[A-Z_]+\]")

# Group 1, where there is one, stays.
_SHAPES = [
    re.compile(shape)
    for shape in (
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----[\s\S]*?(?:-----END [A-Z0-9 ]*-----|\Z)",
        # A port (`host:80/…@…`) is no password, and what an image's digest follows is none.
        r"""((?<![\w+.:-])(?:[A-Za-z][\w+.-]*:)?//[^\s/@:?#'"]*:)(?!\d+(?:[/?#]|$)|\(not recorded\)@)"""
        r"""(?:(?!://)[^\s'"])+(?=@(?!sha256:))""",
        r"""(https?://)(?!git@)[^\s/@:?#'"()]+(?=@)""",
        r"(?i:(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer|token)\s+))[\w.~+/=-]+",
        r"(\b[Bb]earer\s+)(?=[\w.~+/=-]*\d|[\w.~+/=-]{16})[\w.~+/=-]{6,}",
        r"(?<![A-Za-z0-9])hf_(?:[A-Za-z0-9]{16,}|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{10,})",
        r"(?<![A-Za-z0-9])sk-(?:[A-Za-z0-9]{20,}|(?=[\w-]{0,99}\d)[\w-]{12,})",
        r"(?<![A-Za-z0-9])(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{8,}",
        r"(?<![A-Za-z0-9])(?:gh[opusr]_[A-Za-z0-9]{10,}|github_pat_\w{10,})",
        r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{12,}",
        r"(?<![A-Za-z0-9])AIza[\w-]{20,}",
        r"(?<![A-Za-z0-9])eyJ[\w-]{6,}\.[\w-]{4,}(?:\.[\w-]*)?",
        r"(?<![A-Za-z0-9])xox[abeoprs]-[\w-]{8,}",
        r"(?<![A-Za-z0-9])(?:glpat|nvapi|pypi|xapp|xai|pplx|GOCSPX)-[\w-]{12,}",
        r"(?<![A-Za-z0-9])(?:npm|gsk|dckr_pat|dop_v1|wandb_v1|whsec|r8|rpa)_[A-Za-z0-9_]{16,}",
        r"(?<![A-Za-z0-9])(?:ya29\.|hvs\.|SG\.)[\w-]{16,}(?:\.[\w-]+)?",
        r"(https://hooks\.slack\.com/services/)[\w/-]+",
    )
]
_PAIR = re.compile(r"""(?<!\w)(\\{0,9}["'])?([A-Za-z_][\w.-]{0,99})(?(1)\1)\s*([=:])\s*""")
_ASSIGNED = re.compile(r"(-{0,2}[A-Za-z_][\w.\[\]-]*)\+?=", re.ASCII)
_END_IN_TEXT, _END_IN_FLOW, _END_IN_QUERY = (
    re.compile(end) for end in (r"[,;&})\]\s'\"]", r"[,}\]\n]", r"[&#\s'\"]")
)
_IN_QUERY = frozenset(("key", "code"))


def without_secrets(value: Any, key: str = "") -> Any:
    """A copy of a value, or of nested mappings and lists, in which `LEFT_OUT` stands in the place of secrets.

    `key` is the name that the value has, after those of the mappings around it, with dots. A number is a secret where the
    name is of nothing else. Twice is as once.
    """
    if isinstance(value, dict):
        if _is_secret_name(key):
            return {name: _left_out(inner) for name, inner in value.items()}
        return {
            name: without_secrets(inner, f"{key}.{name}" if key else str(name))
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(inner, key) for inner in value)
    if isinstance(value, str):
        return LEFT_OUT if _is_secret(key, value) else text_without_secrets(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return LEFT_OUT if is_number and _is_secret_name(key) else value


def text_without_secrets(text: str) -> str:
    """A text for people, as an error's message, with `LEFT_OUT` in the place of secrets: by shape, and after `NAME=`."""
    return _pairs_without_secrets(_shapes_without_secrets(text), in_flow=False)


def words_without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command line; of `--api-key VALUE` the second word is the secret."""
    kept: list[str] = []
    name = ""
    for word in words:
        is_option = word.startswith("--") and len(word) > 2
        kept.append(
            LEFT_OUT if name and not is_option and _is_secret(name, word) else word_without_secrets(word)
        )
        name = word if word.startswith("-") and "=" not in word and not word.endswith(":") else ""
    return kept


def word_without_secrets(word: str) -> str:
    """One word of a command line: `--name=value`, an override of `--set` with a YAML value, `NAME=value`."""
    start = 0
    while assigned := _ASSIGNED.match(word, start):  # `--set=NAME=value`
        start = assigned.end()
        if _is_secret(assigned[1], word[start:]):
            return word[:start] + LEFT_OUT
    return word[:start] + _pairs_without_secrets(_shapes_without_secrets(word[start:]), in_flow=True)


def secret_keys(tree: Any) -> Iterator[str]:
    """The dotted keys of nested mappings and lists whose values are, or contain, secrets."""
    return _differences(tree, without_secrets(tree), "")


def left_out_keys(tree: Any, key: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The keys of values that were left out where `tree` was kept."""
    if isinstance(tree, str):
        if LEFT_OUT in tree:
            yield key
    else:
        for name, inner in _items(tree):
            yield from left_out_keys(inner, (*key, name))


def _differences(tree: Any, kept: Any, key: str) -> Iterator[str]:
    inner = list(_items(tree))
    if not inner and tree != kept:
        yield key
    for (name, was), (_, now) in zip(inner, _items(kept), strict=True) if inner else ():
        yield from _differences(was, now, f"{key}.{name}" if key else str(name))


def _items(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        yield from tree.items()
    elif isinstance(tree, list | tuple):
        yield from enumerate(tree)


def _left_out(value: Any) -> Any:
    """The same nested mappings and lists, no text or number of them kept."""
    if isinstance(value, dict):
        return {name: _left_out(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_left_out(inner) for inner in value)
    if isinstance(value, bool) or value is None or (isinstance(value, str) and _is_no_value(value)):
        return value
    return LEFT_OUT


def _is_secret(key: str, text: str) -> bool:
    """Whether a value, as it is written, is a secret because of its key's name."""
    if _is_secret_name(key):
        return not _is_no_value(text)
    if not _may_name_a_secret(key) or _is_no_value(text):
        return False
    return len(text) >= _LONGEST_SETTING or not (
        _NUMBERS.fullmatch(text) or _SPECIAL_TOKEN.fullmatch(text.strip("\"'"))
    )


def _is_no_value(text: str) -> bool:
    text = text.strip()
    return text.lower() in _NO_VALUE or _NAMES_A_VARIABLE.fullmatch(text) is not None


def _is_secret_name(key: str) -> bool:
    return bool(_SECRET_PARTS.search(key)) or any(map(_SECRET_WORDS.fullmatch, _words(key)))


def _may_name_a_secret(key: str) -> bool:
    names = (_words(part)[-2:] for part in key.split("."))  # what lies below `tokens` is one of them
    return any(
        words and _LAST_WORDS.fullmatch(words[-1]) and not _ORDINARY_NAMES.fullmatch(" ".join(words))
        for words in names
    )


def _words(key: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(key)]


def _shapes_without_secrets(text: str) -> str:
    for shape in _SHAPES:
        text = shape.sub(lambda found: (found[1] if found.re.groups else "") + LEFT_OUT, text)
    return text


def _pairs_without_secrets(text: str, *, in_flow: bool) -> str:
    """Leave out the values of `name=value` and `"name": value`; of `name: value` only in YAML's flow: prose has it too."""
    kept, done = [], 0
    for pair in _PAIR.finditer(text):
        if pair.start() < done or (pair[3] == ":" and not pair[1] and not in_flow):
            continue
        in_query = pair[3] == "=" and text[max(pair.start() - 1, 0)] in "?&"
        is_short_for_one = in_query and pair[2].lower() in _IN_QUERY
        if not (is_short_for_one or _is_secret_name(pair[2]) or _may_name_a_secret(pair[2])):
            continue
        end = _end_of_value(text, pair.end(), in_query=in_query, in_flow=in_flow and pair[3] == ":")
        value = text[pair.end() : end]
        if _is_secret("secret" if is_short_for_one else pair[2], value):
            kept += [text[done : pair.end()], LEFT_OUT]
            done = end
    return "".join([*kept, text[done:]])


def _end_of_value(text: str, start: int, *, in_query: bool, in_flow: bool) -> int:
    """Where the value ends that begins at `start`: with its quotes and brackets, else at what ends a plain one there."""
    if text.startswith(LEFT_OUT, start):
        return start + len(LEFT_OUT)
    if quote := _QUOTE.match(text, start):
        end = text.find(quote[0], quote.end())
        return len(text) if end < 0 else end + len(quote[0])
    if text[start : start + 1] in ("[", "{"):
        depth = 0
        for bracket in _BRACKET.finditer(text, start):
            depth += 1 if bracket[0] in "[{" else -1
            if depth == 0:
                return bracket.end()
        return len(text)
    end_of_plain = _END_IN_QUERY if in_query else _END_IN_FLOW if in_flow else _END_IN_TEXT
    braces = _BRACES.match(text, start)
    end_found = end_of_plain.search(text, braces.end() if braces else start)
    return end_found.start() if end_found else len(text)
