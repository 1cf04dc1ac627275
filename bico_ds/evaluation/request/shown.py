"""What the terminal shows of a request: how it is asked, and the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from rich.console import Console

from bico_ds.data.exported_tokenizer import adds_bos
from bico_ds.evaluation.report.held_out import loss_table
from bico_ds.evaluation.report.samples import sample_lines
from bico_ds.evaluation.report.tables import (
    agreement_table,
    answered_line,
    choice_tables,
    contamination_table,
    result_table,
    retention_table,
    search_notes,
)
from bico_ds.evaluation.request.asked import Request
from bico_ds.evaluation.results import EvaluationResult
from bico_ds.evaluation.scoring.generation import beyond_greedy
from bico_ds.model.weights.adapter_folder import AdapterFolder


def how_asked(request: Request) -> Iterator[str]:
    """How prompts begin and answers end, and where that is not what other programs do with this model."""
    tokenizer = request.tokenizer
    if (adapters := AdapterFolder.at(request.model)) is not None:
        yield f"{request.model}: {adapters.describe()}"
    name = tokenizer.convert_ids_to_tokens
    ends = [name(token) or f"token {token}, which its tokenizer lacks" for token in request.stops]
    has_bos = request.add_bos and tokenizer.bos_token_id is not None
    begins = f"begin with BOS {name(tokenizer.bos_token_id)}" if has_bos else "begin without BOS"
    yield f"prompts {begins}; answers end at {' or '.join(ends)}"
    if has_bos != adds_bos(tokenizer):
        does, option = ("adds it", "--bos") if not has_bos else ("adds none", "--no-bos")
        yield f"note: its tokenizer {does}, so other programs ask as {option} does"
    if tokenizer.eos_token_id not in request.stops:
        yield f"note: its generation config does not stop at the tokenizer's EOS {name(tokenizer.eos_token_id)}"
    if changes := beyond_greedy(request.generation_config):
        shown = ", ".join(f"{key} {value}" for key, value in changes.items())
        yield f"note: its generation config has {shown}, which `generate` heeds and these answers do not"


def show_results(
    results: Mapping[str, Any], before: Mapping[str, Any], console: Console, *, samples: int = 0
) -> None:
    """Print the tables of `results`, by section; `before`: perplexities under the base model, by text.

    `samples`: how many answers of each task are shown.
    """
    plain = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    if "tasks" in results:
        result = EvaluationResult.from_json(results)
        scored = {"score [95 % interval]": result}
        console.print(result_table(scored))
        if "training_texts" in results:
            console.print(contamination_table(scored))
            plain(answered_line(results["training_texts"]))
            for remark in search_notes(results["training_texts"]):
                plain(f"note: {remark}")
        for line in sample_lines(result, samples):
            plain(line)
    if "choice" in results:
        for table in choice_tables(results["choice"]):
            console.print(table)
    for name, text in results.get("texts", {}).items():
        plain(f"text {name}: perplexity {text['perplexity']:.2f} over {text['tokens']:,} tokens")
    if "held_out" in results:
        console.print(loss_table({"loss": EvaluationResult(tasks={}, held_out=results["held_out"])}))
    if "retention" in results:
        console.print(retention_table(results["retention"], before))
    if "agreement" in results:
        console.print(agreement_table(results["agreement"]))
