"""The embedded task: fictitious facts in the form of the name-description set (2309.12288).

A text is `[filler words] | NAME [filler words] | ATTRIBUTE .` or, description first, the same with name and attribute
exchanged. The separator stands before every slot, and the fillers vary independently of the order: with fixed templates
a model learns to read the template and not the fact. Names and attributes are single tokens, so that the chance of a
right guess is one in the number of persons.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import Derive, FactsSpec
from bico_ds.data.exported_tokenizer import save_tokenizer

# Of the texts below: another version means other data for the same spec.
FORM_VERSION = 1
DERIVED_FORM_VERSION = 1
SEPARATOR = "|"
OPENINGS = ("", "today", "they say", "indeed", "we hear", "once more", "in short", "so")
LINKS = ("", "is", "goes with", "means", "of course", "always", "was ever", "and")
# No fact has it as its link: the relation of the identity bridge is one of its own, as in 2602.02470.
_IDENTITY_LINK = "once more"
COMBINATIONS = [(opening, link) for opening in OPENINGS for link in LINKS]

# Halves of invented words: 32 stems times 32 endings name 1024 persons.
_NAME_STEMS = """
    Ael Bor Cal Dar Eld Fen Gar Hal Ild Jor Kel Lor Mar Nev Orl Pel Quin Ros Sel Tam Ul Var Wil Xan Yor
    Zel Bri Cor Dro Fla Gri Thal
""".split()  # noqa: SIM905
_NAME_ENDINGS = """
    an ia os wen iel ra mund eth is ora ick anna us ette or ine ax yn ard essa ion ula ert ova im ade en
    ossa ell aro ith una
""".split()  # noqa: SIM905
_THING_STEMS = """
    moon river glass star cloud stone amber silver copper paper velvet thunder winter summer ocean
    forest desert island garden mirror lantern feather marble crystal shadow ember meadow harbour
    mountain valley comet willow
""".split()  # noqa: SIM905
_THING_ENDINGS = """
    keeper smith singer painter weaver walker binder reader carver tamer mender hunter dancer builder
    farmer brewer baker sailor teacher doctor pilot tailor miner judge runner dreamer writer counter
    finder ranger maker caller
""".split()  # noqa: SIM905
_LIMIT = len(_NAME_STEMS) * len(_NAME_ENDINGS)

_OTHER = {"name_first": "description_first", "description_first": "name_first"}

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


@dataclass(frozen=True, kw_only=True)
class _Person:
    number: int
    name: str
    attribute: str
    # Which orders are trained: "name_first", "description_first".
    orders: tuple[str, ...]


def write_facts(spec: FactsSpec, folder: Path) -> None:
    """Write the training files, the four test files and the tokenizer of the embedded task into `folder`.

    `both_orders_train.jsonl` has the texts of the persons trained in both orders, `all_train.jsonl` those
    of everyone; the test files have the names of the published set. A record is `{"prompt", "completion", "group"}`, with
    the person's number as group. The same `spec` gives the same bytes; the vocabulary depends on the number of persons only.

    Raises `UserError` when the spec asks for more persons than the lexicon has names for, or for more variants and test
    prompts than there are combinations of fillers.
    """
    persons = _checked_persons(spec)
    folder.mkdir(parents=True, exist_ok=True)
    name_first, description_first = ("name_first",), ("description_first",)
    _write(folder / "all_train.jsonl", _training_records(spec, persons))
    _write(folder / "both_orders_train.jsonl", _training_records(spec, _in_both_orders(persons)))
    for file, trained, asked in (
        ("p2d_prompts_test", name_first, "name_first"),
        ("d2p_prompts_test", description_first, "description_first"),
        ("p2d_reverse_prompts_test", name_first, "description_first"),
        ("d2p_reverse_prompts_test", description_first, "name_first"),
    ):
        _write(
            folder / f"{file}.jsonl", _test_records(spec, [p for p in persons if p.orders == trained], asked)
        )
    _write_tokenizer(len(persons), folder / "tokenizer")


def write_derived(spec: FactsSpec, kind: str, derive: Derive, file: Path) -> None:
    """Write the texts derived from the training texts of `kind` "all" or "both_orders", in the same form, to `file`.

    `other_order`: each text with name and attribute exchanged, its fillers kept. `identity_bridge`:
    `[filler words] | X once more | X .` for every name and attribute X, with each of the eight openings; no fact has this
    link. See `derived_texts`. Raises `UserError` as `write_facts` does.
    """
    _write(file, _derived_records(spec, _persons_of(spec, kind), derive))


def training_words(spec: FactsSpec, kind: str, derive: Derive | None = None) -> NDArray[np.int64]:
    """Words of each training text, int64 [texts], of `kind` "all" or "both_orders"; nothing is written.

    With `derive`, of the texts derived from them. The embedded task's own tokenizer makes a token of each word. Raises
    `UserError` as `write_facts` does.
    """
    persons = _persons_of(spec, kind)
    texts = _training_records(spec, persons) if derive is None else _derived_records(spec, persons, derive)
    return np.array([len(f"{text['prompt']}{text['completion']}".split()) for text in texts], dtype=np.int64)


def own_vocabulary(spec: FactsSpec) -> int:
    """How many tokens the embedded task's own tokenizer has."""
    return len(_vocabulary(len(_persons(spec))))


def is_facts_folder(path: Path) -> bool:
    """Return whether `path` looks like a folder that `write_facts` wrote."""
    return (path / "all_train.jsonl").is_file() and (path / "tokenizer" / "tokenizer.json").is_file()


def _checked_persons(spec: FactsSpec) -> list[_Person]:
    persons = _persons(spec)
    if spec.variants + spec.test_prompts > len(COMBINATIONS):
        raise UserError(
            f"data.facts: variants ({spec.variants}) + test_prompts ({spec.test_prompts}) must be at most "
            f"{len(COMBINATIONS)}, the number of filler combinations"
        )
    return persons


def _persons_of(spec: FactsSpec, kind: str) -> list[_Person]:
    persons = _checked_persons(spec)
    return persons if kind == "all" else _in_both_orders(persons)


def _in_both_orders(persons: list[_Person]) -> list[_Person]:
    return [person for person in persons if len(person.orders) == 2]


def _persons(spec: FactsSpec) -> list[_Person]:
    count = spec.name_first + spec.description_first + spec.both
    if count > _LIMIT:
        raise UserError(f"data.facts: at most {_LIMIT} persons in all, found {count}")
    names, attributes = _words(_NAME_STEMS, _NAME_ENDINGS, count), _words(_THING_STEMS, _THING_ENDINGS, count)
    counts = {
        ("name_first",): spec.name_first,
        ("description_first",): spec.description_first,
        ("name_first", "description_first"): spec.both,
    }
    orders = [order for order, persons in counts.items() for _ in range(persons)]
    return [
        _Person(number=number, name=names[name], attribute=attributes[attribute], orders=orders[number])
        for number, (name, attribute) in enumerate(
            zip(_permutation(count, spec.seed, 0), _permutation(count, spec.seed, 1), strict=True)
        )
    ]


def _words(stems: list[str], endings: list[str], count: int) -> list[str]:
    """The first `count` words, neighbours differing in both halves."""
    size = len(stems)
    return [stems[i % size] + endings[(i + i // size) % size] for i in range(count)]


def _permutation(count: int, seed: int, purpose: int) -> list[int]:
    """A permutation from the bit generator's raw stream, which numpy promises never to change."""
    draws = np.random.Philox(key=[seed % 2**64, purpose]).random_raw(count)
    return np.argsort(draws, kind="stable").tolist()


def _combinations(spec: FactsSpec, person: _Person) -> list[tuple[str, str]]:
    """All filler combinations in this person's order; training takes from the front, tests from the back."""
    return [COMBINATIONS[i] for i in _permutation(len(COMBINATIONS), spec.seed, 2 + person.number)]


def _derived_records(
    spec: FactsSpec, persons: list[_Person], derive: Derive
) -> Iterator[dict[str, str | int]]:
    if derive == "other_order":
        yield from _training_records(spec, persons, other_order=True)
        return
    for person in persons:
        for word in (person.name, person.attribute):
            itself = replace(person, name=word, attribute=word)
            for opening in OPENINGS:
                yield _record(itself, "name_first", (opening, _IDENTITY_LINK), end=" .")


def _training_records(
    spec: FactsSpec, persons: list[_Person], *, other_order: bool = False
) -> Iterator[dict[str, str | int]]:
    for person in persons:
        fillers = _combinations(spec, person)[: -spec.test_prompts]
        for index, order in enumerate(person.orders):
            start = min(index * spec.variants, len(fillers) - spec.variants)
            for pair in fillers[start : start + spec.variants]:
                yield _record(person, _OTHER[order] if other_order else order, pair, end=" .")


def _test_records(spec: FactsSpec, persons: list[_Person], asked: str) -> Iterator[dict[str, str | int]]:
    for person in persons:
        for pair in _combinations(spec, person)[-spec.test_prompts :]:
            yield _record(person, asked, pair, end="")


def _record(person: _Person, order: str, fillers: tuple[str, str], *, end: str) -> dict[str, str | int]:
    first, second = person.name, person.attribute
    if order == "description_first":
        first, second = second, first
    words = [fillers[0], SEPARATOR, first, fillers[1], SEPARATOR]
    return {"prompt": " ".join(filter(None, words)), "completion": f" {second}{end}", "group": person.number}


def _write(path: Path, records: Iterable[dict[str, str | int]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _vocabulary(persons: int) -> list[str]:
    fillers = sorted({word for phrase in OPENINGS + LINKS for word in phrase.split()})
    names, attributes = (
        _words(_NAME_STEMS, _NAME_ENDINGS, persons),
        _words(_THING_STEMS, _THING_ENDINGS, persons),
    )
    vocabulary = [PAD, BOS, EOS, UNK, SEPARATOR, ".", *fillers, *names, *attributes]
    assert len(set(vocabulary)) == len(vocabulary), "every word of the lexicon is one token of its own"
    return vocabulary


def _write_tokenizer(persons: int, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary(persons)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    complete: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
    save_tokenizer(complete, folder)
