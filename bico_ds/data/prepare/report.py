"""What an ingestion did, for reading: text, and a picture of the document lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bico_ds.config.sections.data import Derive

_CAPACITIES = (1024, 2048, 4096, 8192)
_BAR, _MOST_LINES, _MOST_NAMES = 50, 16, 8


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What became of the input."""

    # Tokens of each training document, and of its prompt; 0 where it has none.
    lengths: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    held_out_lengths: NDArray[np.int64]
    duplicates: int
    # Lines by reason.
    skipped: dict[str, int]
    # What is as it was asked for, and may not be what was meant.
    warnings: list[str] = field(default_factory=list)
    # Names of the tokenizer's templates, where it has several and chats were written with the default.
    chat_templates: list[str] = field(default_factory=list)
    # Names of what lies beside the input, by reason.
    passed_over: dict[str, list[str]] = field(default_factory=dict)
    # How many groups, or texts, are held out, of how many, beside the share that was asked for; "": none are.
    share_held: str = ""
    # Which texts of the input's these are; None: its own.
    derived: Derive | None = None
    path: Path | None = None
    # Tokens that this run tokenized, not those of an interrupted one before it, and in which time, without starting.
    tokenized: int = 0
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The report as lines of text; without times, so that it is a function of the input."""
        lines = [f"documents    {len(self.lengths):,}", f"tokens       {int(self.lengths.sum()):,}"]
        if self.derived is not None:
            lines.append(f"derived      {self.derived}: made of the input's texts, which are not among them")
        names = ("min", "25 %", "median", "75 %", "max")
        quartiles = np.percentile(self.lengths, [0, 25, 50, 75, 100]).astype(int)
        lines.append("lengths      " + ", ".join(f"{n} {q:,}" for n, q in zip(names, quartiles, strict=True)))
        if prompts := int((self.prompt_lengths > 0).sum()):
            lines.append(f"prompts      {prompts:,} of {len(self.lengths):,} documents have one")
        if alone := int((self.prompt_lengths >= self.lengths).sum()):
            lines.append(f"no reply     {alone:,} documents: nothing in them is a completion")
        if len(self.held_out_lengths):
            documents, tokens = len(self.held_out_lengths), int(self.held_out_lengths.sum())
            lines.append(f"held out     {documents:,} documents, {tokens:,} tokens: {self.share_held}")
        if self.duplicates:
            lines.append(f"dropped      {self.duplicates:,} duplicates of an earlier text")
        lines += [f"skipped      {count:,} lines: {reason}" for reason, count in self.skipped.items()]
        lines += [f"warning      {warning}" for warning in self.warnings]
        if self.chat_templates:
            lines.append(f"template     'default', of {', '.join(self.chat_templates)}")
        lines += [f"passed over  {what}" for what in describe_passed_over(self.passed_over)]
        lines += ["", "tokens per document", *self._histogram(), "", *self._overlong()]
        return "\n".join(lines) + "\n"

    def _histogram(self) -> list[str]:
        for bins_per_octave in (8, 4, 2, 1):
            edges, counts = length_histogram(self.lengths, bins_per_octave=bins_per_octave)
            if len(counts) <= _MOST_LINES:
                break
        tallest = max(int(counts.max()), 1)
        labels = [f"{low:,}–{high - 1:,}" if high - low > 1 else f"{low:,}" for low, high in pairwise(edges)]
        width = max(map(len, labels))
        return [
            f"  {label:>{width}} {'█' * round(_BAR * count / tallest):<{_BAR}} {count:,}"
            for label, count in zip(labels, counts, strict=True)
        ]

    def _overlong(self) -> list[str]:
        """What packing will have to cut; ingestion itself cuts nothing."""
        lines = []
        for capacity in _CAPACITIES:
            if count := int((self.lengths > capacity).sum()):
                lines.append(
                    f"longer than {capacity:,}: {count:,} documents "
                    f"(packing into bins of {capacity:,} splits, truncates or drops them, by data.overlong)"
                )
        return lines or [f"no document is longer than {_CAPACITIES[0]:,}: packing has nothing to split"]


def describe_passed_over(names_by_reason: dict[str, list[str]]) -> list[str]:
    """Return a line for each reason: how many names, the reason, and the first names."""
    return [
        f"{len(names):,} ({reason}): {', '.join(names[:_MOST_NAMES])}{', …' if len(names) > _MOST_NAMES else ''}"
        for reason, names in sorted(names_by_reason.items())
    ]


def length_histogram(
    lengths: NDArray[np.int64], *, bins_per_octave: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count lengths in bins of equal width on a log scale: edges [B + 1] and counts [B]."""
    low = int(np.floor(np.log2(lengths.min()) * bins_per_octave))
    high = int(np.floor(np.log2(lengths.max()) * bins_per_octave)) + 1
    edges = np.unique(np.ceil(2.0 ** (np.arange(low, high + 1) / bins_per_octave) - 1e-9).astype(np.int64))
    edges[-1] = max(edges[-1], int(lengths.max()) + 1)
    return edges, np.histogram(lengths, bins=edges)[0]


def write_report(report: IngestReport, text_file: Path, picture: Path) -> None:
    """Write the report's text, and its histogram as PNG."""
    from matplotlib.figure import Figure

    text_file.write_text(report.text, encoding="utf-8")
    edges, counts = length_histogram(report.lengths, bins_per_octave=8)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("tokens per document")
    axes.set_ylabel("documents")
    axes.set_title(f"{len(report.lengths):,} documents, {int(report.lengths.sum()):,} tokens")
    figure.savefig(picture, dpi=120, metadata={"Software": None})
