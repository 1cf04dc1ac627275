"""Compute what was asked for as parts of a result file, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from rich.console import Console

from bico_ds.evaluation.contamination import open_training_texts
from bico_ds.evaluation.loading import load_for_evaluation, load_tokenizer_and_context, weights_stamp
from bico_ds.evaluation.prompt_progress import PromptProgress
from bico_ds.evaluation.request.asked import Request
from bico_ds.evaluation.request.held_out import held_out_of, held_out_parts
from bico_ds.evaluation.request.instructions import agreement_parts, answer_parts, instructions_of
from bico_ds.evaluation.request.questions import contamination_parts, task_parts, tasks_of
from bico_ds.evaluation.request.shown import how_asked, show_results
from bico_ds.evaluation.request.texts import recipe_text_parts, retention_parts, texts_at, texts_of_recipe
from bico_ds.evaluation.result_file import ResultFile
from bico_ds.evaluation.run_tasks import prepare_task
from bico_ds.evaluation.scoring.choice import encode_candidates
from bico_ds.evaluation.scoring.likelihood import encode_windows
from bico_ds.evaluation.scoring.share import PromptShare
from bico_ds.evaluation.tasks.task import Task


def run_request(request: Request, share: PromptShare, console: Console) -> bool:
    """Compute what the result file lacks, and show on the first rank what was asked for. Collective.

    Returns False where it was stopped before the end. Raises `UserError` for bad input, before a model is loaded, and for
    weights that cannot be loaded.
    """
    tasks = tasks_of(request)
    recipe_texts = texts_of_recipe(request)
    texts = texts_at(request.retention)
    window = _check_inputs(request, tasks, texts)
    instructions = instructions_of(request)
    training_texts = open_training_texts(request.train, request.model)
    held_out = held_out_of(request, [store for store, _ in training_texts.stores], share)
    load = lru_cache(maxsize=1)(  # one model in memory at a time
        lambda path, option: load_for_evaluation(
            path, option=option, dtype=request.dtype, device=share.device
        )
    )
    weights = weights_stamp(request.model)
    file = ResultFile(
        request.output, model=str(request.model), weights=f"{weights} {request.dtype}", share=share
    )
    if share.is_first:
        for line in how_asked(request):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    with PromptProgress(console, share) as progress:
        counted = replace(share, on_batch=progress.advance)
        parts = [
            *answer_parts(request, counted, instructions, load),
            *retention_parts(request, share, texts, window, load),
            *recipe_text_parts(request, share, recipe_texts, load),
            *agreement_parts(request, counted, instructions, load, file),
            *(part for task in tasks for part in task_parts(request, counted, task, load, file)),
            *held_out_parts(request, counted, held_out, load),
            *contamination_parts(request, counted, tasks, training_texts, file),
        ]
        finished = file.run(parts, progress.begin_part)
    if share.is_first:
        show_results(
            file.results(parts), file.values.get("retention_before", {}), console, samples=request.samples
        )
        console.print(f"written: {request.output}", soft_wrap=True, highlight=False)
    return finished


def _check_inputs(request: Request, tasks: Sequence[Task], texts: Mapping[str, str]) -> int:
    """The tokens per window of a retention text: `request.window`, or the smallest context of the models where that is less.

    Raises `UserError`, before any weights are loaded, for what these models cannot be asked.
    """
    tokenizer, context = load_tokenizer_and_context(request.model)
    for task in tasks:
        prepare_task(tokenizer, task, request.generation, context=context)
        if request.likelihood:
            encode_candidates(
                tokenizer, task, others=request.others, add_bos=request.add_bos, context=context
            )
    models = [(tokenizer, context)]
    if request.base is not None:
        models.append(load_tokenizer_and_context(request.base, option="--base"))
    window = min([request.window, *(context for _, context in models if context is not None)])
    for tokenizer, _ in models:
        for text in texts.values():
            encode_windows(tokenizer, text, window=window, add_bos=request.add_bos)
    return window
