"""Recipes and overrides that nobody meant to write: shipped ones, damaged at random."""

from __future__ import annotations

import random
from collections.abc import Callable

from bico_ds.config.load import list_recipes
from bico_ds.config.resources import RECIPES

# What a parser may trip over, of every kind that has a rule of its own.
WORDS = [
    "<<: *x", "<<: [*x, *x]", "<<: 3", "&x ", "*x", "*nowhere", "&x [*x]", "!!int abc", "!!float ''", "!!bool x", "!!null x",
    "!!binary aGk=", "!!set {a}", "!!timestamp x", "!!python/name:os.system", "!foo ", "!%ff", "! ", "!!str ",
    "2024-01-01", "2024-13-45", "2024-01-01 12:00:00 +99:99", "1:20", "1:20.5", "0x_", "0b_", "010", "._", "1__e5", "=", "²", "１",
    ".nan", "-.inf", "1e400", "-0", "9" * 5000, "0x" + "f" * 5000, "null", "~", "yes", "off", "''", '"\\0"', '"\\ud83d"',
    '"\\UFFFFFFFF"', "\0", "\x07", "\x85", "\u2028", "\ufeff", "\ud7ff", "é", "😀", "[", "]", "{", "}", "[" * 200, "{a: " * 200, "- " * 200,
    "? ", "? [a]\n: 3\n", ": ", "- ", "\t", "\n", "\n---\n", "\n...\n", "%YAML 9" + "9" * 5000 + "\n", "# ", "| \n", ">-\n", "'", '"', "@", "`",
    "%", "a" * 5000, "/" * 5000, "$", "${", "${HOME", "$HOME", "~nobody", "+: 3", "+", ".", "..", "extends: tiny_bico\n", "extends: [a]\n",
    "kind", "name", "\nseed: 3\n", "objectives: 3\n", "{kind: ntp}", "{kind: [a]}", "[[], {}, 1]", "-1", "0", "1.5", "true", "text",
]  # fmt: skip
KEYS = [
    "seed", "name", "imports", "objectives", "objectives.0", "objectives.1", "objectives[1]", "objectives.bico", "objectives.ntp",
    "objectives.1.mask.rate", "data.sources", "data.sources.0", "data.sources.0.files", "data.sources[facts_all].weight", "model",
    "model.config", "model.config.vocab_size", "model.path", "training", "training.steps", "training.epochs", "optimizer.betas.1",
    "optimizer.lr", "evaluation.tasks", "evaluation.tasks.0", "deepspeed.config", "deepspeed.overrides", "output_dir",
    "monitor.wandb", "checkpoint.every_steps", "retention", "replay", "extends", "a", "a.b.c.d.e",
]  # fmt: skip


def damaged_recipe(texts: list[bytes], drawn: random.Random) -> bytes:
    """One of the texts with one to four damages."""
    damaged = bytearray(drawn.choice(texts))
    for _ in range(drawn.randint(1, 4)):
        drawn.choice(DAMAGES)(damaged, drawn)
    return bytes(damaged)


def damaged_override(drawn: random.Random) -> str:
    """`KEY=VALUE` of words from the lists above, sometimes damaged."""
    key, value = (
        drawn.choice(KEYS),
        drawn.choice([*WORDS, "[1, 2]", "{a: 1}", "{kind: bico, mask: {rate: 0.5}}"]),
    )
    if drawn.random() < 0.4:
        key = drawn.choice(
            [f"{key}+", f"{key}.{drawn.choice(WORDS)}", f"{key}[{drawn.choice(WORDS)}]", f"{key}.", f".{key}"]
        )
    if drawn.random() < 0.3:
        value = drawn.choice(
            [f"[{value}", f"{{a: {value}}}", f"[{value}, {drawn.choice(WORDS)}]", value * 50]
        )
    if drawn.random() < 0.1:
        key = "".join(drawn.choices(".[]+=-²0a \0", k=drawn.randint(0, 8)))
    return f"{key}={value}"


def shipped_texts() -> list[bytes]:
    return [(RECIPES / f"{name}.yaml").read_bytes() for name in list_recipes()]


def _flip(text: bytearray, drawn: random.Random) -> None:
    if text:
        text[drawn.randrange(len(text))] ^= 1 << drawn.randrange(8)


def _cut(text: bytearray, drawn: random.Random) -> None:
    del text[drawn.randrange(len(text) + 1) :]


def _move(text: bytearray, drawn: random.Random) -> None:
    start = drawn.randrange(len(text) + 1)
    part = text[start : start + drawn.randrange(200)]
    at = drawn.randrange(len(text) + 1)
    text[at:at] = part


def _word(text: bytearray, drawn: random.Random) -> None:
    at = drawn.randrange(len(text) + 1)
    text[at:at] = _bytes(drawn.choice(WORDS))


def _value(text: bytearray, drawn: random.Random) -> None:
    """Another value behind one of the colons or dashes."""
    places = [
        index + 1 for index, byte in enumerate(text[:-1]) if byte in b":-" and text[index + 1] in b" \n"
    ]
    if places:
        start = drawn.choice(places)
        end = text.find(b"\n", start)
        text[start : end if end >= 0 else len(text)] = b" " + _bytes(drawn.choice(WORDS))


def _bytes(word: str) -> bytes:
    return word.encode("utf-8", "surrogatepass")


DAMAGES: list[Callable[[bytearray, random.Random], None]] = [_flip, _cut, _move, _word, _value, _value]
