"""`bico-ds prepare files` and `bico-ds prepare hub`: texts that are there, tokenized into a store."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace, _ArgumentGroup, _SubParsersAction
from typing import get_args

from bico_ds.commands.prepare.provenance import add_provenance
from bico_ds.config.arguments import folder_or_hub_name, local_path, number, path_text, positive, seed
from bico_ds.config.sections.data import Derive
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.ingest import LEAST_SECONDS, ingest
from bico_ds.data.prepare.input_files import find_inputs
from bico_ds.data.prepare.output_folder import refuse_output
from bico_ds.data.prepare.report import IngestReport
from bico_ds.data.prepare.shards import SHARD_BYTES, Shard, hub_shards, plan_shards
from bico_ds.data.store import provenance


def prepare_texts(options: Namespace) -> None:
    """Ingest files or a hub data set, and print the report."""
    started = time.monotonic()
    # Resolved, since '.' has no name to put a folder of work beside.
    output = options.output.resolve()
    # Before the input is read.
    refuse_output(output, force=options.force)
    shards, passed_over = _input(options)
    report = ingest(
        shards,
        _options(options),
        options.tokenizer.here(),
        output,
        force=options.force,
        processes=options.processes,
        passed_over=passed_over,
        provenance=provenance(options.source, options.licence),
    )
    print(report.text)
    print(f"{options.output}: {_times(report, time.monotonic() - started)}")
    if report.skipped:
        print(f"skipped lines are in {options.output / 'skipped.jsonl'}")


def _times(report: IngestReport, seconds: float) -> str:
    """How long all took, and of it the tokenizing, with a speed where that was long enough to have one."""
    if not report.tokenized:
        return f"{seconds:.1f} s; all shards were tokenized by an earlier run"
    speed = "too short to tell a speed"
    if report.seconds >= LEAST_SECONDS:
        speed = f"{report.tokenized / report.seconds:,.0f} tokens/s"
    return f"{seconds:.1f} s, of which tokenizing took {report.seconds:.1f} s ({speed})"


def _input(options: Namespace) -> tuple[list[Shard], dict[str, list[str]]]:
    """The shards to read, and by reason the names of what lies beside the files and is not read."""
    if options.command == "hub":
        return hub_shards(options.name, config=options.config, split=options.split), {}
    inputs = find_inputs(options.inputs)
    shards = plan_shards(inputs.files, text_by=options.text_by, shard_bytes=SHARD_BYTES)
    return shards, inputs.passed_over


def _options(options: Namespace) -> IngestOptions:
    return IngestOptions(**{name: getattr(options, name) for name in IngestOptions.__dataclass_fields__})


def add_commands(commands: _SubParsersAction[ArgumentParser]) -> None:
    files = commands.add_parser("files", help="JSONL, Parquet and text files, or folders of them")
    files.add_argument(
        "inputs",
        type=path_text,
        metavar="INPUT",
        nargs="+",
        help="file, folder or pattern: .jsonl .json .ndjson .txt .text .md (also .gz, .zst), .parquet",
    )
    hub = commands.add_parser("hub", help="a data set of the Hugging Face hub")
    hub.add_argument("name", type=path_text, help="hub name, or a local folder that `datasets` can load")
    hub.add_argument("--config", metavar="NAME", help="configuration of the data set")
    hub.add_argument(
        "--split",
        metavar="SPLIT",
        default="train",
        help="slices and sums too: train[:10%%]+test (default: %(default)s)",
    )
    for command in (files, hub):
        _add_text_options(command)
        add_provenance(command)


def _add_text_options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", type=local_path, required=True, help="the store to write")
    parser.add_argument(
        "--force", action="store_true", help="replace a store at --output, once the new one is complete"
    )
    parser.add_argument(
        "--tokenizer",
        type=folder_or_hub_name,
        required=True,
        metavar="PATH",
        help="folder or hub name of a fast tokenizer, or a tokenizer.model",
    )
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="worker processes (default: one per CPU core)"
    )
    _add_field_options(parser.add_argument_group("fields of a record"))
    _add_document_options(parser.add_argument_group("documents"))


def _add_field_options(fields: _ArgumentGroup) -> None:
    fields.add_argument(
        "--text-field", default="text", metavar="NAME", help="the text (default: %(default)s)"
    )
    fields.add_argument(
        "--prompt-field", metavar="NAME", help="with --completion-field: two fields make the text"
    )
    fields.add_argument("--completion-field", metavar="NAME", help="with --prompt-field")
    fields.add_argument(
        "--messages-field", metavar="NAME", help="a chat, rendered with the tokenizer's template"
    )
    fields.add_argument("--group-field", metavar="NAME", help="the person or cluster: a number or a string")
    fields.add_argument(
        "--entities-field", metavar="NAME", help="[[start, end], ...] in characters, for entity masks"
    )
    fields.add_argument(
        "--entities-pattern",
        metavar="REGEX",
        help="its matches in the text are the entities, instead of a field",
    )
    fields.add_argument(
        "--text-by",
        choices=("line", "file"),
        default="line",
        help="a document of a plain-text file (default: %(default)s)",
    )


def _add_document_options(documents: _ArgumentGroup) -> None:
    documents.add_argument(
        "--no-bos", dest="add_bos", action="store_false", help="put no BOS before a document"
    )
    documents.add_argument(
        "--no-eos", dest="add_eos", action="store_false", help="put no EOS after a document"
    )
    documents.add_argument(
        "--derive",
        choices=get_args(Derive),
        help="store texts made of the records' instead: other_order has the two entities, or prompt and completion, "
        "exchanged; identity_bridge says 'The name of A is A.' of each entity A",
    )
    documents.add_argument(
        "--leading-space",
        action="store_true",
        help="tokenize each text with a space before it, so that its first word has the form of the others",
    )
    documents.add_argument(
        "--deduplicate", action="store_true", help="keep the first of documents with equal text"
    )
    documents.add_argument(
        "--held-out",
        type=number,
        default=0.0,
        metavar="FRACTION",
        help="fraction of documents for the store DIR/held_out; with --group-field, of groups, never of their parts: of "
        "fewer than 500 the nearest number, chosen among those of this input",
    )
    documents.add_argument(
        "--seed", metavar="N", type=seed, default=1, help="of the held-out choice (default: %(default)s)"
    )
    documents.add_argument(
        "--vocab-size",
        type=positive,
        metavar="N",
        help="the model's, where smaller than the tokenizer's: larger ids are errors",
    )
    documents.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a bad line: stop, or skip it and write it to DIR/skipped.jsonl (default: %(default)s)",
    )
