"""Instructions to a model: JSONL of {"instruction": …}, each asked as the tokenizer's chat template writes a question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bico_ds.common.errors import UserError
from bico_ds.data.prepare.chats import ChatTemplate, check_template
from bico_ds.data.prepare.records import BadRecord
from bico_ds.data.tokenizer import FastTokenizer
from bico_ds.evaluation.scoring.generation import check_lengths, encode_prompts
from bico_ds.evaluation.tasks.jsonl import read_fields


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """An instruction, the line of the file that it stands on, and the token ids of the prompt that asks it."""

    text: str
    line: int
    ids: tuple[int, ...]


def read_instructions(
    path: Path, tokenizer: FastTokenizer, *, add_bos: bool, new_tokens: int, context: int | None
) -> list[Instruction]:
    """The instructions at `path`, as prompts for the models with this tokenizer.

    The chat template writes all of a prompt, BOS too if it has one; without a template the prompt is the instruction, with
    BOS where `add_bos`. Raises `UserError`, with file and line, for a record without an instruction, one that the template
    cannot write, and one that leaves no room for `new_tokens` tokens in a context of `context`.
    """
    records = read_fields(path, required=["instruction"])
    texts = [record["instruction"] for _, record in records]
    names = [f"{path}:{line}" for line, _ in records]
    if tokenizer.chat_template:
        check_template(tokenizer, path)
        template = ChatTemplate(tokenizer)
        prompts = [_asked(template, text, name) for text, name in zip(texts, names, strict=True)]
        encoded = encode_prompts(tokenizer, prompts, add_bos=False)
    else:
        encoded = encode_prompts(tokenizer, texts, add_bos=add_bos)
    check_lengths(encoded, new_tokens=new_tokens, context=context, names=names)
    return [
        Instruction(text=text, line=line, ids=tuple(ids))
        for (line, _), text, ids in zip(records, texts, encoded, strict=True)
    ]


def _asked(template: ChatTemplate, text: str, name: str) -> str:
    try:
        return template.ask(text)
    except BadRecord as error:
        raise UserError(
            f"{name}: the tokenizer's chat template does not write this instruction: {error}"
        ) from error
