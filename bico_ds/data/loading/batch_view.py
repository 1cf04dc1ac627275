"""A packed batch for reading: every token of every document, whether it was masked, and what predicts it.

It is read back from the batch alone, so it shows what the model gets, not what the objective intended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from bico_ds.attention.plan import AttentionPlan
from bico_ds.batch import PackedBatch, total_weight
from bico_ds.data.tokenizer import Tokenizer

State = Literal["kept", "live", "dead"]
_STYLE: dict[State, str] = {"kept": "", "live": "bold yellow", "dead": "dim red"}
Decode = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """One original token.

    `row` is its row in the batch (None for dead ones), `predicts` the target of that row and `weight` that of its loss,
    where the batch has weights. `keys_before`: how many kept tokens of the document lie at or before it (0 for dead ones).
    `span`: the number of the span of live rows in which it sees those before it; None: it sees no live row.
    """

    position: int
    token: int
    state: State
    row: int | None
    predicts: int | None
    keys_before: int
    weight: float | None = None
    span: int | None = None


@dataclass(frozen=True, kw_only=True)
class DocumentView:
    """One document of a batch, in its original order."""

    source: int
    id: int
    piece: int
    tokens: tuple[TokenView, ...]


def view_batch(batch: PackedBatch) -> list[DocumentView]:
    """Read a CPU batch back into documents. Masked tokens are found by the predictions of them."""
    plan, ids, positions = batch.plan, batch.input_ids.tolist(), batch.position_ids.tolist()
    loss_rows = batch.loss_rows.tolist()
    prediction = dict(zip(loss_rows, batch.targets.tolist(), strict=True))
    weights = (
        {} if batch.loss_weights is None else dict(zip(loss_rows, batch.loss_weights.tolist(), strict=True))
    )
    # The first masked token of a document is predicted at a kept row, unless each is at its own.
    ahead = 1 if any(row < plan.num_kept for row in prediction) else 0
    span_of_row = _span_of_row(plan)
    starts = plan.cu_seqlens.tolist()
    live_rows = _rows_by_document(plan)
    views = []
    for number, (source, document, piece) in enumerate(batch.documents.tolist()):
        kept = range(starts[number], starts[number + 1])
        tokens: dict[int, tuple[int, State, int | None]]
        tokens = {positions[row]: (ids[row], "kept", row) for row in kept}
        rows = {positions[row]: row for row in (*kept, *live_rows[number])}
        for position, row in rows.items():
            target_at = position + ahead
            if row in prediction and target_at not in tokens:
                masked: State = "live" if target_at in rows else "dead"
                tokens[target_at] = (prediction[row], masked, rows.get(target_at))
        seen = []
        for position in sorted(tokens):
            token, state, own_row = tokens[position]
            target = prediction.get(own_row) if own_row is not None else None
            seen.append(
                TokenView(
                    position=position,
                    token=token,
                    state=state,
                    row=own_row,
                    predicts=target,
                    keys_before=_keys_before(plan, own_row, starts[number]),
                    weight=None if own_row is None else weights.get(own_row),
                    span=None if own_row is None else span_of_row.get(own_row),
                )
            )
        views.append(DocumentView(source=source, id=document, piece=piece, tokens=tuple(seen)))
    return views


def shown_text(tokenizer: Tokenizer) -> Decode:
    """What a token is shown as: its text, with blanks and line ends made visible by Python's escapes."""
    return lambda token: repr(tokenizer.batch_decode([[token]])[0])[1:-1]


def _keys_before(plan: AttentionPlan, row: int | None, document_start: int) -> int:
    if row is None:
        return 0
    return row - document_start + 1 if row < plan.num_kept else int(plan.live_split[row - plan.num_kept])


def _span_of_row(plan: AttentionPlan) -> dict[int, int]:
    """The number of the span of each live row; of none where live rows are no keys."""
    if plan.span_cu_seqlens is None:
        return {}
    lengths = plan.span_cu_seqlens.diff().tolist()
    spans = (number for number, length in enumerate(lengths) for _ in range(length))
    return dict(enumerate(spans, start=plan.num_kept))


def _rows_by_document(plan: AttentionPlan) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(plan.num_documents)]
    for number, document in enumerate(plan.live_document.tolist()):
        rows[document].append(plan.num_kept + number)
    return rows


def visibility(document: DocumentView, mode: str) -> NDArray[np.int64]:
    """Return which keys each query sees, int64 [L, L] over original positions (query, key).

    0: unseen; 1: by the forward rotation; 2: by the reversed one; -1: the query is dead and has no row.
    """
    tokens = document.tokens
    matrix = np.zeros((len(tokens), len(tokens)), dtype=np.int64)
    keys = [index for index, token in enumerate(tokens) if token.state == "kept"]
    for query, token in enumerate(tokens):
        if token.row is None:
            matrix[query] = -1
            continue
        for number, key in enumerate(keys):
            if number < token.keys_before:
                matrix[query, key] = 1
            elif mode == "bidirectional":
                matrix[query, key] = 2
        if token.span is not None:
            same_span = [key for key in range(query + 1) if tokens[key].span == token.span]
            matrix[query, same_span] = 1
    return matrix


def print_batch(
    console: Console,
    batch: PackedBatch,
    decode: Decode,
    *,
    source_names: Sequence[str],
    taken: int,
    room: int,
    most_documents: int,
    most_tokens: int,
) -> None:
    """Print the batch's counts and its first documents side by side.

    `room` is the capacity of its bins in tokens, `taken` what its documents take of it as the objective expands them.
    """
    views = view_batch(batch)
    states = [token.state for view in views for token in view.tokens]
    counts = {state: states.count(state) for state in ("kept", "live", "dead")}
    console.print(
        f"{batch.plan.mode}: {len(views)} documents of {batch.represented_tokens} tokens, "
        f"which take {taken} of {room} tokens (fill {taken / room:.1%}); "
        f"rows {batch.plan.num_rows} = {counts['kept']} kept + "
        f"{counts['live']} live {'placeholders' if batch.plan.span_cu_seqlens is None else 'ones'}; "
        f"{counts['dead']} dead ones dropped; {len(batch.targets)} predictions"
        + ("" if batch.loss_weights is None else f" of weight {total_weight(batch):g} in all")
    )
    shown = views[:most_documents]
    console.print(Columns([_document(view, decode, source_names, most_tokens) for view in shown]))
    if len(views) > len(shown):
        console.print(f"… and {len(views) - len(shown)} more documents (--documents shows more)")


def _document(view: DocumentView, decode: Decode, source_names: Sequence[str], most_tokens: int) -> Group:
    title = f"{source_names[view.source]} #{view.id}" + (f" piece {view.piece}" if view.piece else "")
    # A name is no markup.
    heading = Text(title, style="table.title")
    table = Table("pos", "row", "token", "state", "predicts", title=heading, pad_edge=False)
    is_weighted = any(token.weight is not None for token in view.tokens)
    if is_weighted:
        table.add_column("weight")
    for token in view.tokens[:most_tokens]:
        table.add_row(
            str(token.position),
            "-" if token.row is None else str(token.row),
            Text(decode(token.token), style=_STYLE[token.state]),
            Text(token.state, style=_STYLE[token.state]),
            "" if token.predicts is None else Text(decode(token.predicts), style="green"),
            *(["" if token.weight is None else f"{token.weight:.3g}"] if is_weighted else []),
        )
    more = len(view.tokens) - most_tokens
    return Group(table, Text(f"… {more} more tokens (--tokens shows more)") if more > 0 else Text(""))


def plot_visibility(
    document: DocumentView, mode: str, decode: Decode, to: Path | BinaryIO, *, title: str = "", dpi: int = 130
) -> None:
    """Draw which tokens of one document see which, and write the picture, a PNG, to a path or an open file."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = {-1: "no row (dead)", 0: "unseen", 1: "forward rotation", 2: "reversed rotation"}
    colours = {-1: "#d9d9d9", 0: "#ffffff", 1: "#3b75af", 2: "#ef8636"}
    labels = [decode(token.token).replace("$", r"\$") for token in document.tokens]
    masked = [token.state != "kept" for token in document.tokens]
    size = max(4.0, 0.22 * len(labels))
    figure = Figure(figsize=(size + 2.5, size + 1.0))
    axes = figure.subplots()
    axes.imshow(visibility(document, mode), cmap=ListedColormap(list(colours.values())), vmin=-1, vmax=2)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_yticks(
        range(len(labels)),
        [
            label if token.predicts is None else f"{label}  → {decode(token.predicts)}".replace("$", r"\$")
            for label, token in zip(labels, document.tokens, strict=True)
        ],
        fontsize=7,
    )
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        for tick, hidden in zip(ticks, masked, strict=True):
            tick.set_color("#c0392b" if hidden else "black")
    axes.set(
        xlabel="key (red: masked)",
        ylabel="query → what it predicts",
        title=title or f"{mode} attention",
    )
    axes.legend(
        handles=[Patch(facecolor=colours[k], edgecolor="grey", label=names[k]) for k in names],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        fontsize=8,
    )
    if isinstance(to, Path):
        to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, format="png", dpi=dpi, bbox_inches="tight")
