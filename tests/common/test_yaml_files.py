"""YAML that a user wrote: what is read as what, and the one error about all else."""

from __future__ import annotations

import os

import pytest

from bico_ds.common.errors import UserError
from bico_ds.common.yaml_files import MOST_BYTES, MOST_VALUES, dump_yaml, read_mapping, read_value
from tests.cpu_time import cpu_seconds_below


def read(tmp_path, text: str | bytes):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return read_mapping(path, "wanted: a mapping")


def error_of(tmp_path, text: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5), ("1_000", 1000), ("2024-01-01", "2024-01-01"), ("2024-13-45", "2024-13-45"), ("1:20", "1:20"),
        ("=", "="),
        ("2024-01-01 12:00:00 +99:99", "2024-01-01 12:00:00 +99:99"), ("", None), ("~", None), ("yes", True),
        ("!!str 3", "3"),
        ("!!float 3", 3.0), ('"\\ud83d\\ude00"', "😀"), ("{on: 1, 3: 2, null: 3}", {"on": 1, "3": 2, "null": 3}),
        ("[&x {a: 1}, {<<: *x, b: 2}]", [{"a": 1}, {"a": 1, "b": 2}]),
    ],
)  # fmt: skip
def test_plain_values_are_what_a_reader_takes_them_for(text, value):
    assert read_value(text, "here") == value


def test_merged_keys_give_way_to_own_ones_and_know_their_lines(tmp_path):
    text = "one: &one\n  a: 1\n  b: 1\ntwo: &two\n  b: 2\n  c: 2\nall:\n  c: 3\n  <<: [*one, *two]\n"
    file = read(tmp_path, text)
    assert file.values["all"] == {"a": 1, "b": 1, "c": 3}
    lines = {name: file.origins["all", name].line for name in "abc"}
    assert lines == {"a": 2, "b": 3, "c": 8}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: {<<: 3}", ":2: '<<' takes a mapping"),
        ("a: &x {<<: *x}", ":1: an alias ('*name') stands inside the value that it names"),
        ("a: &x [*x]", ":1: an alias"),
        ("&x\na: *x", ":1: an alias"),
        ("b: 1\na: x\0y", ":2: has the control character 0x0: remove it"),
        ("a: 1\nb: !!int abc", ":2: 'abc' is no whole number; if it is text, put it in quotes"),
        ("a: !!float ''", ":1: '' is no number"),
        ("a: !!null x", ":1: 'x' is no null"),
        ("a: 0x_", ":1: '0x_' is no whole number"),
        ("a: 1\nb: !!python/name:os.system", ":2: '!!python/name:os.system' is none of the values here"),
        ("a: !!binary aGk=", "'!!binary' is none"),
        ("a: !!set {b}", "'!!set' is none"),
        ("a: !mine {b: 1}", "'!mine' is none"),
        ("a: 1\nb: " + "9" * 5000, ":2: a number of 5,000 digits"),
        ("a: 0x" + "f" * 5000, "digits"),
        ("? [a]\n: 3", ":1: a key is one word"),
        ("? {a: 1}\n: 3", ":1: a key is one word"),
        ("'': 3", ":1: a key is empty"),
        ("a: {b: 1, b: 2}", ":1: key 'a.b' is given twice"),
        ('a: "\\ud83d"', ":1: a text has half a character"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", "not valid YAML"),
        ("a: 1\n---\nb: 1", "not valid YAML: but found another document"),
        ("a: *nowhere", ":1: not valid YAML: found undefined alias"),
        ("a: 1".encode("utf-16"), "not UTF-8 text"),
        ("", "wanted: a mapping"),
        ("- a", "wanted: a mapping"),
    ],
)  # fmt: skip
def test_all_else_is_refused_in_one_line_that_names_file_and_line(tmp_path, text, words):
    message = error_of(tmp_path, text)
    assert message.startswith(str(tmp_path / "mine.yaml"))
    assert words in message and "\n" not in message and len(message) < 400


ALIASES = ["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
MERGES = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n".join(ALIASES), f"more than {MOST_VALUES:,} values"),
        ("\n".join(MERGES), f"more than {MOST_VALUES:,} values"),
        ("\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 500))]), "nested more than"),
        ("a: [" + "1," * 200_000 + "]", f"more than {MOST_VALUES:,} values"),
        ("a: " + "[" * 2000 + "]" * 2000, "nested more than"),
        ("a: " + "[" * 5000, "nested more than"),
        ("".join(" " * n + "a:\n" for n in range(700)), "nested more than"),
        ("- " * 5000, "nested more than"),
        ("# " + "x" * MOST_BYTES, "larger than"),
    ],
    ids=["aliases", "merges", "alias of alias", "list", "deep", "open", "deep blocks", "deep lists", "bytes"],
)  # fmt: skip
def test_a_text_that_stands_for_more_than_anyone_wrote_is_refused_within_a_second(tmp_path, text, words):
    with cpu_seconds_below(1):
        assert words in error_of(tmp_path, text)


def test_what_is_no_file_of_text_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", tmp_path / ("a" * 5000), tmp_path / "a\0b"):
        with pytest.raises(UserError):
            read_mapping(path, "wanted")


def test_texts_that_look_like_numbers_are_written_so_that_they_stay_texts():
    values = {
        "name": "1e5",
        "a": "2024-01-01",
        "b": "1:20",
        "c": "off",
        "d": 2e-5,
        "e": "null",
        "f": [1, None, True],
    }
    assert read_value(dump_yaml(values), "here") == values
