"""The shards' small stores to the final store: in the order of the input, without duplicates, some documents held out."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.data.exported_tokenizer import save_tokenizer
from bico_ds.data.held_out import held_out
from bico_ds.data.prepare.encode_shard import DIGEST_BYTES, DIGESTS, GROUPS, RESULT, SKIPPED, Notice
from bico_ds.data.prepare.encoder import EncoderSpec
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.report import IngestReport, write_report
from bico_ds.data.prepare.store_writer import TokenStoreWriter
from bico_ds.data.store import TokenStore

if TYPE_CHECKING:
    from bico_ds.data.tokenizer import FastTokenizer

HELD_OUT, TOKENIZER = "held_out", "tokenizer"
_TRAIN, _HELD_OUT, _DUPLICATE = 0, 1, 2
_BLOCK_TOKENS = 1 << 22


def merge_parts(
    parts: list[Path],
    output: Path,
    spec: EncoderSpec,
    tokenizer: FastTokenizer,
    *,
    overwrite: bool,
    passed_over: dict[str, list[str]] | None = None,
    provenance: str | None = None,
) -> IngestReport:
    """Join the stores of all shards into the store at `output`, with its report, tokenizer, provenance and skipped lines.

    Raises `UserError` where no document is left, or none for the held-out store, and without `overwrite` for an output
    that exists.
    """
    stores = [TokenStore.open(part, verify="structure") for part in parts]
    fate, share_held = _fate(parts, stores, spec.options)
    with ExitStack() as writers:
        train = writers.enter_context(
            TokenStoreWriter(output, spec.header, overwrite=overwrite, has_replies=spec.options.has_replies)
        )
        targets = [(train, _TRAIN)]
        if spec.options.held_out:
            beside = writers.enter_context(
                TokenStoreWriter(train.beside(HELD_OUT), spec.header, has_replies=spec.options.has_replies)
            )
            targets.append((beside, _HELD_OUT))
        first = 0
        for store in stores:
            for writer, kind in targets:
                _copy(store, np.flatnonzero(fate[first : first + len(store)] == kind), writer)
            first += len(store)
        report = replace(
            _report(parts, stores, fate),
            passed_over=passed_over or {},
            share_held=share_held,
            chat_templates=_chat_templates(tokenizer, spec.options),
            derived=spec.options.derive,
        )
        _check_not_empty(report, spec.options)
        _write_skipped(parts, train.beside(SKIPPED), report)
        write_report(report, train.beside("report.txt"), train.beside("lengths.png"))
        for writer, _ in reversed(targets):  # the training store last: the other one lies in it
            save_tokenizer(tokenizer, writer.beside(TOKENIZER))
            writer.note_provenance(provenance)
            writer.finish(with_checksums=[TOKENIZER])
    return replace(report, path=output)


def _fate(
    parts: list[Path], stores: list[TokenStore], options: IngestOptions
) -> tuple[NDArray[np.int8], str]:
    """Decide for every document: training, held out, or a duplicate of an earlier one; and say how many are held out."""
    share_held = ""
    fate = np.zeros(sum(len(store) for store in stores), dtype=np.int8)
    digests = np.concatenate([np.fromfile(part / DIGESTS, dtype="<u8") for part in parts])
    digests = digests.reshape(-1, DIGEST_BYTES // 8)
    if options.held_out:
        if options.group_field is None:
            key, what = digests[:, 0], "different texts"
            there = np.unique(key)
        else:  # a person's documents stay together
            key, what = np.concatenate([store.groups for store in stores]).astype(np.uint64), "groups"
            there = np.unique(np.concatenate([np.fromfile(part / GROUPS, dtype="<u8") for part in parts]))
        chosen = held_out(there, options.held_out, options.seed)
        fate[np.isin(key, chosen)] = _HELD_OUT
        share = (
            f"{100 * len(chosen) / max(len(there), 1):.3g} %, of the {100 * options.held_out:.3g} % asked for"
        )
        share_held = f"{len(chosen):,} of {len(there):,} {what} ({share})"
    if options.drops_duplicates:
        order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the first of equal ones stays first
        ordered = digests[order]
        fate[order[1:][np.all(ordered[1:] == ordered[:-1], axis=1)]] = _DUPLICATE
    return fate, share_held


def _copy(store: TokenStore, ids: NDArray[np.int64], writer: TokenStoreWriter) -> None:
    """Append these documents in blocks of bounded memory."""
    block_of = np.cumsum(store.lengths[ids]) // _BLOCK_TOKENS
    for block in np.split(ids, np.flatnonzero(np.diff(block_of)) + 1):
        if len(block):
            documents = store.whole(block)
            assert documents.word_starts is not None
            writer.append(
                documents.token_ids,
                documents.lengths,
                prompt_lengths=documents.prompt_length,
                groups=documents.group,
                word_starts=documents.word_starts,
                entity_numbers=documents.entity_number,
                replies=documents.is_reply,
            )


def _report(parts: list[Path], stores: list[TokenStore], fate: NDArray[np.int8]) -> IngestReport:
    lengths = np.concatenate([store.lengths for store in stores])
    prompt_lengths = np.concatenate([store.prompt_lengths for store in stores])
    skipped: Counter[str] = Counter()
    notices: dict[str, Notice] = {}
    for part in parts:
        result = json.loads((part / RESULT).read_text(encoding="utf-8"))
        skipped.update(result["skipped"])
        for reason, notice in result["notices"].items():
            first = notices.setdefault(reason, Notice(count=0, first=notice["first"]))
            first.count += notice["count"]
    return IngestReport(
        lengths=lengths[fate == _TRAIN],
        prompt_lengths=prompt_lengths[fate == _TRAIN],
        held_out_lengths=lengths[fate == _HELD_OUT],
        duplicates=int((fate == _DUPLICATE).sum()),
        skipped=dict(sorted(skipped.items())),
        warnings=[f"{n.count:,} documents {reason} (the first: {n.first})" for reason, n in notices.items()],
    )


def _chat_templates(tokenizer: FastTokenizer, options: IngestOptions) -> list[str]:
    """The names of the templates, where chats were written and there are several."""
    templates = tokenizer.chat_template if options.messages_field else None
    return sorted(templates) if isinstance(templates, dict) else []


def _check_not_empty(report: IngestReport, options: IngestOptions) -> None:
    if not len(report.lengths) and len(report.held_out_lengths):
        raise UserError(
            f"--held-out {options.held_out} takes all {len(report.held_out_lengths):,} documents: give a "
            "smaller fraction; no store was written"
        )
    if options.derive is not None and not len(report.lengths) and not report.skipped:
        reasons = "; ".join(report.warnings) or "it has no records"
        raise UserError(
            f"derive {options.derive} makes no text of the input: {reasons}; no store was written"
        )
    if not len(report.lengths):
        skipped = "".join(f"; {count:,} lines skipped: {reason}" for reason, count in report.skipped.items())
        hint = " (--on-error stop names the first)" if skipped else ""
        raise UserError(f"the input has no documents{skipped}{hint}: no store was written")
    if options.held_out and not len(report.held_out_lengths):
        raise UserError(
            f"--held-out {options.held_out} of so few documents (or groups) is none: give a larger fraction"
        )


def _write_skipped(parts: list[Path], file: Path, report: IngestReport) -> None:
    if report.skipped:
        with file.open("wb") as out:
            for part in parts:
                out.write((part / SKIPPED).read_bytes())
