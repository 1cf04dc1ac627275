"""Texts to tokens: what a worker needs for that, and the columns of a store that it fills.

Workers start fast: this imports no torch, but for chats, where transformers does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from bico_ds.common.errors import UserError
from bico_ds.config.paths import FolderOrHub
from bico_ds.data.prepare.chats import ChatTemplate, check_template, strings_of
from bico_ds.data.prepare.derived_texts import derive
from bico_ds.data.prepare.examples import Example, IngestOptions, make_example, with_leading_space
from bico_ds.data.prepare.records import BadRecord
from bico_ds.data.store import StoreHeader
from bico_ds.data.tokenizer import (
    load_tokenizer,
    special_ids,
    tokenizer_digest,
    tokenizer_hash,
    vocabulary_size,
    word_boundaries,
)

if TYPE_CHECKING:
    from bico_ds.data.tokenizer import FastTokenizer


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What a worker needs to tokenize, small enough to be sent to it once."""

    tokenizer_json: str
    tokenizer_digest: str
    header: StoreHeader
    # [vocabulary]: whether the token begins, or ends, with white space.
    begins_word: NDArray[np.bool_]
    ends_word: NDArray[np.bool_]
    # By id; they are never text, unless somebody writes them out.
    special_tokens: dict[int, str]
    unk_id: int | None
    options: IngestOptions
    # Where to load the tokenizer with the chat template.
    chat_tokenizer: FolderOrHub | None = None


def encoder_spec(
    tokenizer: FastTokenizer, options: IngestOptions, tokenizer_path: FolderOrHub
) -> EncoderSpec:
    """Collect what workers need. Raises `UserError` where options and tokenizer do not fit."""
    if options.messages_field:
        check_template(tokenizer, tokenizer_path)
    if options.leading_space:
        _check_leading_space(tokenizer, tokenizer_path)
    vocab_size = vocabulary_size(tokenizer) if options.vocab_size is None else options.vocab_size
    _check_special_ids(tokenizer, options, tokenizer_path, vocab_size)
    begins, ends = word_boundaries(tokenizer)
    special = sorted(special_ids(tokenizer))
    header = StoreHeader(
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer_hash(tokenizer),
        special_ids=tuple(special),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        add_bos=options.add_bos,
        add_eos=options.add_eos,
        has_entities=options.has_entities,
        leading_space=options.leading_space,
    )
    return EncoderSpec(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        tokenizer_digest=tokenizer_digest(tokenizer, chat=options.messages_field is not None),
        header=header,
        begins_word=begins,
        ends_word=ends,
        special_tokens=dict(zip(special, tokenizer.convert_ids_to_tokens(special), strict=True)),
        unk_id=tokenizer.unk_token_id,
        options=options,
        chat_tokenizer=tokenizer_path if options.messages_field else None,
    )


def _check_special_ids(
    tokenizer: FastTokenizer, options: IngestOptions, tokenizer_path: FolderOrHub, vocab_size: int
) -> None:
    bos, added = tokenizer.bos_token_id, dict[str, int]()
    if options.add_bos and bos is None:
        raise UserError(
            f"tokenizer '{tokenizer_path}' has no BOS token: switch it off "
            "(--no-bos, or add_bos: false in the recipe)"
        )
    if options.add_bos and bos is not None:
        added["BOS"] = bos
    if options.add_eos:
        added["EOS"] = tokenizer.eos_token_id
    for name, index in added.items():
        if index >= vocab_size:
            raise UserError(
                f"--vocab-size {vocab_size}: tokenizer '{tokenizer_path}' has {name} at id {index}; give a "
                f"larger one, or --no-{name.lower()}"
            )


def _check_leading_space(tokenizer: FastTokenizer, tokenizer_path: FolderOrHub) -> None:
    """Raise `UserError` where a text's first word has the form of the others without a space: with one it would lose it."""
    first, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("word", "word word"))
    if first + first == both:
        raise UserError(
            f"tokenizer '{tokenizer_path}' gives a text's first word the form of the others already: leave out "
            "--leading-space (leading_space in the recipe)"
        )


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Documents in columns: T tokens of D documents."""

    tokens: NDArray[np.int64]  # [T]
    lengths: NDArray[np.int64]  # [D]
    prompt_lengths: NDArray[np.int64]  # [D]
    groups: NDArray[np.int64]  # [D]
    word_starts: NDArray[np.bool_]  # [T]
    entity_numbers: NDArray[np.int64] | None  # [T]
    replies: NDArray[np.bool_] | None  # [T]


class Encoder:
    """Tokenizes texts in batches."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self._tokenizer = Tokenizer.from_str(spec.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Byte-level post-processors trim white space out of offsets, which hides where a prompt ends; BOS and
        # EOS are put in by `_columns`.
        self._tokenizer.post_processor = None
        self._chat = (
            ChatTemplate(load_tokenizer(spec.chat_tokenizer)) if spec.chat_tokenizer is not None else None
        )
        self._groups: set[int] = set()
        self._is_special = np.zeros(len(spec.begins_word), dtype=bool)
        self._is_special[list(spec.special_tokens)] = True
        longest_first = sorted(spec.special_tokens.values(), key=len, reverse=True)
        self._special_token = re.compile("|".join(map(re.escape, longest_first)))

    def examples(self, record: dict[str, Any] | BadRecord) -> list[Example]:
        """Make the text of a record, or those derived from it.

        Raises `BadRecord` where there is no text, `NothingDerivedError` where none follows from it.
        """
        if isinstance(record, BadRecord):
            raise record
        options = self.spec.options
        example = make_example(record, options, self._chat)
        if options.held_out and options.group_field is not None:
            self._groups.add(example.group)
        examples = [example] if options.derive is None else derive(example, options.derive)
        return list(map(with_leading_space, examples)) if options.leading_space else examples

    def take_groups(self) -> set[int]:
        """Return, once, the groups of all records since the last call: also of those that gave no document.

        By them a store of derived texts holds out the groups that the store of the records themselves does.
        """
        taken, self._groups = self._groups, set()
        return taken

    def encode(self, examples: list[Example]) -> tuple[Encoded, dict[int, BadRecord], dict[int, str]]:
        """Tokenize a batch.

        Returns the good documents; by index in the batch what is wrong with the others; and, by that index, the first
        special token that is written out in a text.
        """
        texts = [example.text for example in examples]
        if self._needs_offsets:
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        else:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        tokens, lengths = _flatten(ids)
        bad = self._check(tokens, lengths)
        written_out = self._written_out(tokens, lengths, examples)
        if bad:
            good = [index for index in range(len(ids)) if index not in bad]
            encodings, examples = [encodings[i] for i in good], [examples[i] for i in good]
            tokens, lengths = _flatten([ids[i] for i in good])
        return self._columns(tokens, lengths, encodings, examples), bad, written_out

    def _written_out(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], examples: list[Example]
    ) -> dict[int, str]:
        """By index, the first special token that a text, or a message, holds: a control token, to the model.

        Those that the chat template writes do not count, nor do unknown words.
        """
        found: dict[int, str] = {}
        if self._chat is not None:
            for index, example in enumerate(examples):
                matches = filter(None, map(self._special_token.search, strings_of(example.messages)))
                if match := next(matches, None):
                    found[index] = match.group()
            return found
        positions = np.flatnonzero(self._is_special[tokens])[::-1]
        indices = np.searchsorted(np.cumsum(lengths), positions, side="right")
        for index, special_id in zip(indices.tolist(), tokens[positions].tolist(), strict=True):
            token = self.spec.special_tokens[special_id]
            if special_id != self.spec.unk_id or token in examples[index].text:
                found[index] = token
        return found

    @property
    def _needs_offsets(self) -> bool:
        options = self.spec.options
        return bool(options.prompt_field or options.messages_field or options.has_entities)

    def _check(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> dict[int, BadRecord]:
        limit, bad = self.spec.header.vocab_size, {}
        for index in np.flatnonzero(lengths == 0).tolist():
            bad[index] = BadRecord("empty document", "the text has no tokens")
        for position in np.flatnonzero(tokens >= limit)[::-1].tolist():
            index = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
            found = int(tokens[position])
            named = f" ({self.spec.special_tokens[found]!r})" if found in self.spec.special_tokens else ""
            detail = f"id {found}{named}, the vocabulary has {limit}: take it out of the text, or skip such records"
            bad[index] = BadRecord("token id past the vocabulary", detail)
        return bad

    def _columns(
        self,
        text_tokens: NDArray[np.int64],
        text_lengths: NDArray[np.int64],
        encodings: list[Encoding],
        examples: list[Example],
    ) -> Encoded:
        """Put BOS and EOS around the texts, and fill the other columns."""
        header = self.spec.header
        first = np.cumsum(text_lengths) - text_lengths
        # A chat template may have written them already.
        bos = ((text_tokens[first] != header.bos_id) & header.add_bos).astype(np.int64)
        last = first + self._last_tokens(text_lengths, encodings, examples)
        eos = ((text_tokens[last] != header.eos_id) & header.add_eos).astype(np.int64)
        lengths = bos + text_lengths + eos
        starts = np.cumsum(lengths) - lengths
        at = np.arange(len(text_tokens)) + np.repeat(starts + bos - first, text_lengths)
        tokens = np.full(int(lengths.sum()), header.eos_id, dtype=np.int64)
        tokens[at] = text_tokens
        if header.bos_id is not None:
            tokens[starts[bos == 1]] = header.bos_id
        entities = None
        if header.has_entities:
            entities = np.zeros(len(tokens), dtype=np.int64)
            entities[at] = np.concatenate(
                [_entity_numbers(*pair) for pair in zip(encodings, examples, strict=True)]
            )
        prompts = self._prompts(encodings, examples)
        replies = None
        if self.spec.options.has_replies:
            replies = np.zeros(len(tokens), dtype=bool)
            ends = np.where(eos == 1, text_lengths, last - first + 1)
            replies[at] = self._replies(text_lengths, prompts, ends, encodings, examples)
            replies[(starts + bos + text_lengths)[(eos == 1) & (prompts < text_lengths)]] = True
        # Where all of a text is prompt, the EOS after it is no completion.
        after_prompt = np.where(prompts > 0, prompts + bos, 0)
        return Encoded(
            tokens=tokens,
            lengths=lengths,
            prompt_lengths=np.where(prompts == text_lengths, lengths, after_prompt),
            groups=np.fromiter((x.group for x in examples), dtype=np.int64, count=len(examples)),
            word_starts=self._word_starts(tokens, starts),
            entity_numbers=entities,
            replies=replies,
        )

    def _last_tokens(
        self, lengths: NDArray[np.int64], encodings: list[Encoding], examples: list[Example]
    ) -> NDArray[np.int64]:
        """Where each text's last token is: in chats the last before white space.

        Chat templates may end a turn with EOS and a line end.
        """
        if self.spec.options.messages_field is None:
            return lengths - 1
        last = [_last_token(*pair) for pair in zip(encodings, examples, strict=True)]
        return np.array(last, dtype=np.int64)

    def _prompts(self, encodings: list[Encoding], examples: list[Example]) -> NDArray[np.int64]:
        """Tokens of each prompt."""
        if not self._needs_offsets:
            return np.zeros(len(examples), dtype=np.int64)
        prompts = [_prompt_tokens(*pair) for pair in zip(encodings, examples, strict=True)]
        return np.array(prompts, dtype=np.int64)

    def _replies(
        self,
        lengths: NDArray[np.int64],
        prompts: NDArray[np.int64],
        ends: NDArray[np.int64],
        encodings: list[Encoding],
        examples: list[Example],
    ) -> NDArray[np.bool_]:
        """The texts' tokens that belong to a reply: from the prompt to `ends`, and those of earlier replies.

        In chats the white space after the token that ends a turn is nobody's, but before an EOS that is added.
        """
        first = np.cumsum(lengths) - lengths
        position = np.arange(int(lengths.sum())) - np.repeat(first, lengths)
        replies = (position >= np.repeat(prompts, lengths)) & (position < np.repeat(ends, lengths))
        for begin, encoding, example in zip(first.tolist(), encodings, examples, strict=True):
            for start, end in example.replies:
                end = self._without_next_token(encoding, example.text, start, end)
                if (tokens := _tokens_of(encoding, start, end)) is not None:
                    replies[begin + tokens.start : begin + tokens.stop] = True
        return replies

    def _without_next_token(self, encoding: Encoding, text: str, start: int, end: int) -> int:
        """The end of a reply, or that before a special token of which it holds the first characters alone.

        What a template writes after a reply, and at a chat's end, may begin alike beyond the turn's end: `<|user|>`, `</s>`.
        """
        token = encoding.char_to_token(end - 1)
        if token is None or not self._is_special[encoding.ids[token]]:
            return end
        first, stop = encoding.token_to_chars(token) or (start, end)
        return end if stop <= end else start + len(text[start:first].rstrip())

    def _word_starts(self, tokens: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        word_starts = self.spec.begins_word[tokens]
        word_starts[1:] |= self.spec.ends_word[tokens[:-1]]
        word_starts[starts] = True
        return word_starts


def _flatten(ids: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    return np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=int(lengths.sum())), lengths


def _prompt_tokens(encoding: Encoding, example: Example) -> int:
    """Tokens that end within the prompt; one that crosses its end holds part of the answer."""
    if not example.prompt_chars:
        return 0
    token = _token_at(encoding, range(example.prompt_chars, len(example.text)))
    return len(encoding) if token is None else token


def _last_token(encoding: Encoding, example: Example) -> int:
    """The last token before trailing white space."""
    token = _token_at(encoding, range(len(example.text.rstrip()) - 1, -1, -1))
    return len(encoding) - 1 if token is None else token


def _entity_numbers(encoding: Encoding, example: Example) -> NDArray[np.int64]:
    """The number of each token's entity, from 1; 0 outside. A token that touches a span is inside."""
    numbers = np.zeros(len(encoding), dtype=np.int64)
    for number, (start, end) in enumerate(example.entities or (), start=1):
        if (tokens := _tokens_of(encoding, start, end)) is not None:
            numbers[tokens.start : tokens.stop] = number
    return numbers


def _tokens_of(encoding: Encoding, start: int, end: int) -> range | None:
    """The tokens that touch these characters; None where there is none."""
    first, last = (
        _token_at(encoding, range(start, end)),
        _token_at(encoding, range(end - 1, start - 1, -1)),
    )
    if first is None or last is None:
        return None
    # A character of several bytes can be several tokens, and the first of them was found.
    while (after := encoding.token_to_chars(last + 1)) is not None and after[0] < end:
        last += 1
    return range(first, last + 1)


def _token_at(encoding: Encoding, characters: range) -> int | None:
    """The first token of the first of these characters that has one: normalizers can remove characters."""
    return next((t for t in map(encoding.char_to_token, characters) if t is not None), None)
