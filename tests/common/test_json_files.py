"""JSON of another program is a value of JSON's types, or one kind of error, within bounds."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from bico_ds.common.json_files import (
    JsonError,
    object_in,
    parse_json,
    read_json,
    read_object,
    read_object_lines,
)
from tests.cpu_time import cpu_seconds_below
from tests.damaged_files import damaged


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.json"


BROKEN = {
    "empty": (b"", "empty"),
    "zeros, as a crash leaves them": (b"\0" * 512, "empty"),
    "cut": (b'{"step": 1', "not valid JSON"),
    "a list": (b"[1]", "holds a list"),
    "null": (b"null", "holds null"),
    "a number": (b"3", "holds a number"),
    "a text": (b'"x"', "holds a text"),
    "no UTF-8": (b'{"x": "\xff"}', "not UTF-8"),
    "NaN": (b'{"x": NaN}', "NaN"),
    "infinite": (b'{"x": 1e999}', "too large"),
    "5,000 digits": (b'{"x": ' + b"9" * 5000 + b"}", "5000 digits"),
    "half a character": (b'{"x": "\\ud83d"}', "lone surrogate"),
    "100,000 deep": (b'{"x":' * 100_000, "nested deeper"),
    "300 deep, which Python takes": (b'{"x":' * 300 + b"1" + b"}" * 300, "nested deeper"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_object_of_json_is_one_error_that_names_file_and_reason(file, content, reason):
    file.write_bytes(content)
    with pytest.raises(JsonError, match=reason) as caught:
        read_object(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert (caught.value.path, caught.value.is_missing) == (file, False)


def test_a_path_that_is_no_file_is_an_error_and_never_waited_for(tmp_path, file):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in {tmp_path: "a folder", tmp_path / "pipe": "not a regular file"}.items():
        with pytest.raises(JsonError, match=reason):
            read_json(path)
    for path in (file, Path("a\0b"), Path("\ud800")):
        with pytest.raises(JsonError) as caught:
            read_json(path)
        assert caught.value.is_missing
    with pytest.raises(JsonError, match="too long"):
        read_json(tmp_path / ("x" * 5000))
    file.write_text(json.dumps(list(range(100))))
    with pytest.raises(JsonError, match="larger than 100 bytes"):
        read_json(file, most_bytes=100)


def test_what_ours_may_write_is_read_where_it_is_asked_for(file):
    file.write_text(json.dumps({"loss": float("inf"), "reason": "\udc80"}))
    assert read_object(file, strict=False) == {"loss": float("inf"), "reason": "\udc80"}
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}', file) == {"a": "\U0001f600"}


def test_lines_that_are_no_objects_are_passed_over(file):
    file.write_bytes(b'{"a": 1}\n\n[1]\n\xff\n{"a": 2}\n{"a":')
    assert read_object_lines(file) == [{"a": 1}, {"a": 2}]
    assert object_in(b"[" * 100_000, file) is None
    file.unlink()
    assert read_object_lines(file) == []
    file.mkdir()
    with pytest.raises(JsonError):
        read_object_lines(file)


def test_any_damage_is_a_value_or_the_one_error_within_a_second(file):
    whole = json.dumps({"step": 4, "files": {"a": [1, "x"]}, "state": None, "loss": 0.5, "done": True})
    for content in damaged(whole.encode(), count=300):
        with cpu_seconds_below(1, content[:200]), contextlib.suppress(JsonError):
            assert isinstance(parse_json(content, file), dict | list | str | int | float | None)
