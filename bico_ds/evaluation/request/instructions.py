"""How far a model's answers to instructions agree with those of its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.evaluation.agreement import agreement, answers_of_base
from bico_ds.evaluation.instructions import Instruction, read_instructions
from bico_ds.evaluation.loading import load_generation_config, load_tokenizer_and_context, weights_stamp
from bico_ds.evaluation.request.asked import Load, Request
from bico_ds.evaluation.result_file import Part, ResultFile, identity_of
from bico_ds.evaluation.scoring.generation import stop_ids
from bico_ds.evaluation.scoring.share import PromptShare


def instructions_of(request: Request) -> list[Instruction]:
    """The prompts for both models, whose token ids must mean the same. Raises `UserError` as `read_instructions` does."""
    if request.instructions is None:
        return []
    assert request.base is not None, "the command asks for both"
    tokenizer, context = load_tokenizer_and_context(request.model)
    base_tokenizer, base_context = load_tokenizer_and_context(request.base, option="--base")
    if base_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--base {request.base}: another vocabulary than {request.model} has: answers are compared token by token, "
            "which needs the model that this one was fine-tuned from"
        )
    return read_instructions(
        request.instructions,
        tokenizer,
        add_bos=request.add_bos,
        new_tokens=request.max_new_tokens,
        context=min((size for size in (context, base_context) if size is not None), default=None),
    )


def answer_parts(
    request: Request, share: PromptShare, instructions: Sequence[Instruction], load: Load
) -> Iterator[Part]:
    """The base's answers to the instructions."""
    base = request.base
    if request.instructions is None or base is None:
        return

    def compute() -> dict[str, Any] | None:
        model, tokenizer = load(base, "--base")
        return answers_of_base(
            model, tokenizer, instructions, max_new_tokens=request.max_new_tokens, share=share
        )

    yield Part(
        section="base_answers",
        name=request.instructions.name,
        identity=_answers_identity(request, instructions),
        size=3 * len(instructions),  # generated once, scored twice
        compute=compute,
    )


def agreement_parts(
    request: Request, share: PromptShare, instructions: Sequence[Instruction], load: Load, file: ResultFile
) -> Iterator[Part]:
    """How far the model agrees with the base's answers, which the file holds by then."""
    if request.instructions is None:
        return
    name = request.instructions.name

    def compute() -> dict[str, Any] | None:
        model, tokenizer = load(request.model, "--model")
        base = file.values["base_answers"][name]
        return agreement(model, tokenizer, instructions, base, share)

    yield Part(
        section="agreement",
        name=name,
        identity=identity_of(_answers_identity(request, instructions), request.stops),
        size=3 * len(instructions),
        compute=compute,
    )


def _answers_identity(request: Request, instructions: Sequence[Instruction]) -> str:
    assert request.base is not None
    stops = stop_ids(load_generation_config(request.base), load_tokenizer(request.base))
    return identity_of(
        weights_stamp(request.base),
        [[instruction.text, list(instruction.ids)] for instruction in instructions],
        request.max_new_tokens,
        stops,
    )
