"""The files of a tokenizer's folder, looked at before transformers reads them: strangers write them too.

transformers and `tokenizers` take values of other types, and fail much later, or with words that name no file and no key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, read_bounded, read_object

CONFIG, RULES, TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
AGAIN = "fetch the tokenizer again, or correct the file"
# The largest known tokenizer.json has 33 MB, the largest template some 100 KB.
_MOST_BYTES, _MOST_TEMPLATE_BYTES = 1 << 28, 1 << 20
# Two and a half million is the largest known vocabulary; tables have an entry for each id up to the largest.
MOST_IDS = 1 << 24
# Few files have one, and the others, which are long, need not be parsed.
_HAS_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def check_tokenizer_files(folder: Path) -> None:
    """Raise `UserError`, with file and key, for a file of a tokenizer's folder that cannot be one."""
    for name in (CONFIG, "special_tokens_map.json", "added_tokens.json"):
        if os.path.lexists(folder / name):
            _check(folder / name, _ids if name == "added_tokens.json" else _config_problems)
    for file in (folder / TEMPLATE, *sorted((folder / "additional_chat_templates").glob("*.jinja"))):
        if os.path.lexists(file):
            _check_template(file)
    for name in (RULES, "tokenizer.model"):
        if (file := folder / name).is_file() and (size := file.stat().st_size) > _MOST_BYTES:
            raise UserError(f"'{file}' has {size:,} bytes, and {_MOST_BYTES:,} are the most: {AGAIN}")
    if (file := folder / RULES).is_file() and _HAS_PREFIX.search(file.read_bytes()):
        _check(file, _prefix_problems)


def _check(file: Path, problems: Callable[[dict[str, Any]], Iterator[str]]) -> None:
    try:
        content = read_object(file, most_bytes=_MOST_BYTES)
    except JsonError as error:
        raise UserError(f"'{file}' cannot be read: {error.reason}; {AGAIN}") from error
    for problem in problems(content):
        raise UserError(f"'{file}': {problem}; {AGAIN}")


def _check_template(file: Path) -> None:
    try:
        read_bounded(file, most_bytes=_MOST_TEMPLATE_BYTES).decode()
    except JsonError as error:
        raise UserError(f"'{file}' cannot be read: {error.reason}; {AGAIN}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is no UTF-8 text (byte {error.start}); {AGAIN}") from error


def _config_problems(config: dict[str, Any]) -> Iterator[str]:
    """What cannot be in a tokenizer_config.json, nor in a special_tokens_map.json."""
    for key in _NAMED_TOKENS:
        if key in config and config[key] is not None and not _is_token(config[key]):
            yield f"{key} must be a text, or an object with one as 'content', found {config[key]!r:.60}"
    limit = config.get("model_max_length")
    if limit is not None and (type(limit) not in (int, float) or limit <= 0):
        yield f"model_max_length must be a number of tokens, found {limit!r:.60}"
    if "chat_template" in config and not _is_template(config["chat_template"]):
        yield f"chat_template must be a text, or a list of texts with names, found {config['chat_template']!r:.60}"
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key)
        listed = tokens.values() if isinstance(tokens, dict) and key.startswith("extra") else tokens
        if listed is not None and not (_is_listing(listed) and all(map(_is_token, listed))):
            yield f"{key} must list tokens, found {tokens!r:.60}"
    for key in ("tokenizer_class", "padding_side", "truncation_side"):
        if not isinstance(config.get(key, ""), str | None):
            yield f"{key} must be a text, found {config[key]!r:.60}"
    yield from _added_token_problems(config.get("added_tokens_decoder"))


def _added_token_problems(added: Any) -> Iterator[str]:
    if added is None:
        return
    if not isinstance(added, dict):
        yield f"added_tokens_decoder must be an object, found {added!r:.60}"
        return
    for index, token in added.items():
        if not (index.isascii() and index.isdecimal() and int(index[:20]) < MOST_IDS):
            yield f"added_tokens_decoder: {index!r:.60} is no id of a token"
        elif not _is_token(token):
            yield f"added_tokens_decoder.{index} must be an object with a text as 'content', found {token!r:.60}"


def _ids(added: dict[str, Any]) -> Iterator[str]:
    for token, index in added.items():
        if type(index) is not int or not 0 <= index < MOST_IDS:
            yield f"{token!r:.60} must have the id of a token, found {index!r:.60}"


def _prefix_problems(rules: dict[str, Any]) -> Iterator[str]:
    """`tokenizers` cuts the prefix of a word's later parts off without looking: it aborts the process within a character."""
    model = rules.get("model")
    if not isinstance(model, dict):
        return
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(parts, list) and not all(str(part).startswith(prefix) for part in parts[1:]):
            yield f"model.continuing_subword_prefix is {prefix!r:.60}, which the merge {merge!r:.60} has not"


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _is_listing(value: Any) -> bool:
    return isinstance(value, list | type({}.values()))


def _is_template(value: Any) -> bool:
    """As the classes of transformers have written it: a text, a list of named texts, or none."""
    if isinstance(value, list):
        return all(
            isinstance(one, dict) and all(isinstance(one.get(key), str) for key in ("name", "template"))
            for one in value
        )
    return value is None or isinstance(value, str)
