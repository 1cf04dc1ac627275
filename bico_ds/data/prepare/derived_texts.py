"""Texts derived from a text: the cures of the reversal curse that change the data, each a source of its own.

`other_order` says the same in the other order: what reverse training (2403.13799) calls reversing the segments of a text,
with the order inside each kept, for the two segments that are given: the entities, or prompt and completion.

`identity_bridge` is the data recipe of 2602.02470, "facts of the form A -> A, as *The name of Alice is Alice*". Only the
paper's abstract was at hand: the sentence is its own; that every entity gets one, subjects and objects alike, is ours.
"""

from __future__ import annotations

from bico_ds.config.sections.data import Derive
from bico_ds.data.prepare.examples import Example

_BRIDGE_PROMPT = "The name of {0} is"


class NothingDerivedError(ValueError):
    """A text of which nothing can be derived, with the reason."""


def derive(example: Example, kind: Derive) -> list[Example]:
    """Return the texts of this kind that follow from a text; never the text itself. They have its group.

    Raises `NothingDerivedError` where there is none.
    """
    if kind == "identity_bridge":
        return _bridges(example)
    return [_completion_first(example) if example.entities is None else _exchanged(example)]


def _completion_first(example: Example) -> Example:
    """Completion, then prompt; the white space that stood between them stays between them, nothing else changes."""
    prompt, completion = example.text[: example.prompt_chars], example.text[example.prompt_chars :]
    between = prompt[len(prompt.rstrip()) :] + completion[: len(completion) - len(completion.lstrip())]
    prompt, completion = prompt.strip(), completion.strip()
    if not prompt:
        raise NothingDerivedError("the prompt is empty")
    return Example(f"{completion}{between}{prompt}", len(completion), example.group, None)


def _exchanged(example: Example) -> Example:
    """The text with each of its two entities in the other's place; a prompt keeps its words but for the entities."""
    text, border, spans = example.text, example.prompt_chars, sorted(example.entities or ())
    if len(spans) != 2:
        raise NothingDerivedError("it has not exactly two entities")
    (first, first_end), (second, second_end) = spans
    if text[first:first_end] == text[second:second_end]:
        raise NothingDerivedError("its two entities are the same")
    if first < border < first_end or second < border < second_end:
        raise NothingDerivedError("the prompt ends within an entity")
    longer = (second_end - second) - (first_end - first)
    parts = (text[second:second_end], text[first_end:second], text[first:first_end])
    return Example(
        f"{text[:first]}{''.join(parts)}{text[second_end:]}",
        border + longer if first_end <= border <= second else border,
        example.group,
        [(first, first_end + longer), (second + longer, second_end)],
    )


def _bridges(example: Example) -> list[Example]:
    """A text for each entity, "The name of Alice is Alice."; its end is the completion."""
    texts = (example.text[start:end].strip() for start, end in example.entities or ())
    entities = list(dict.fromkeys(filter(None, texts)))
    if not entities:
        raise NothingDerivedError("it has no entity")
    return [_bridge(entity, example.group) for entity in entities]


def _bridge(entity: str, group: int) -> Example:
    prompt = _BRIDGE_PROMPT.format(entity)
    start = _BRIDGE_PROMPT.index("{0}")
    spans = [(start, start + len(entity)), (len(prompt) + 1, len(prompt) + 1 + len(entity))]
    return Example(f"{prompt} {entity}.", len(prompt), group, spans)
