"""Turn text into a token store, which training memory-maps.

    bico-ds prepare files data/*.jsonl.gz --tokenizer MODEL --output stores/mine
    bico-ds prepare files facts.jsonl --prompt-field prompt --completion-field completion ...
    bico-ds prepare hub OWNER/NAME --split train --tokenizer MODEL --output stores/theirs
    bico-ds prepare facts --output stores/facts
    bico-ds prepare replay --model MODEL --tokens 1000000 --output stores/replay
    bico-ds prepare teacher --model MODEL --store stores/replay --capacity 2048 --output teachers/mine
    bico-ds prepare --inspect stores/mine --documents 0 17

After an interruption the same command continues where it stopped.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from typing import get_args

from pydantic import ValidationError

from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_folder
from bico_ds.config.arguments import (
    folder_or_hub_name,
    local_path,
    not_negative,
    number,
    path_text,
    positive,
    seed,
    whole,
)
from bico_ds.config.sections.data import Derive, FactsSpec
from bico_ds.data.inspect_store import describe_store
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.facts import is_facts_folder, write_facts
from bico_ds.data.prepare.ingest import LEAST_SECONDS, IngestFailure, ingest
from bico_ds.data.prepare.input_files import find_inputs
from bico_ds.data.prepare.output_folder import refuse_output
from bico_ds.data.prepare.report import IngestReport
from bico_ds.data.prepare.shards import SHARD_BYTES, Shard, hub_shards, plan_shards
from bico_ds.data.store import Verify, provenance


def prepare(options: Namespace) -> int:
    """0 done, 1 the machine failed or it was interrupted. Raises `UserError`."""
    try:
        if options.inspect is not None:
            inspect(options)
        elif options.command == "facts":
            prepare_facts(options)
        elif options.command == "replay":
            prepare_replay(options)
        elif options.command == "teacher":
            prepare_teacher(options)
        else:
            prepare_texts(options)
    except BrokenPipeError:
        raise
    except (IngestFailure, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept, the same command continues", file=sys.stderr)
        return 1
    return 0


def contradiction(options: Namespace) -> str | None:
    if options.inspect is None and options.command is None:
        return "give a command (files, hub, facts, replay, teacher) or --inspect STORE"
    return None


def inspect(options: Namespace) -> None:
    """Print documents of a store."""
    verify: Verify = "checksums" if options.verify else "once"
    tokenizer = options.tokenizer.here() if options.tokenizer is not None else None
    for line in describe_store(
        options.inspect, documents=options.documents, tokenizer_path=tokenizer, verify=verify
    ):
        print(line)


def prepare_texts(options: Namespace) -> None:
    """Ingest files or a hub data set, and print the report."""
    started = time.monotonic()
    # Resolved, since '.' has no name to put a folder of work beside.
    output = options.output.resolve()
    # Before the input is read.
    refuse_output(output, force=options.force)
    shards, passed_over = _input(options)
    files = {shard.path: shard.size for shard in shards}
    size = f"{sum(files.values()) / 1e6:,.1f} MB in {len(files):,} file{'s' * (len(files) != 1)}"
    print(f"input: {size}; starting to tokenize …", file=sys.stderr, flush=True)
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


def prepare_facts(options: Namespace) -> None:
    """Write the embedded task's files."""
    try:
        spec = FactsSpec(**{name: getattr(options, name) for name in FactsSpec.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None
    output = options.output.resolve()
    refuse_output(output, force=options.force, is_ours=is_facts_folder)
    try:
        with atomic_folder(output, replace=options.force) as folder:
            write_facts(spec, folder)
    except OSError as error:
        raise UserError(f"cannot write to '{output.parent}': {error.strerror}") from error
    for file in sorted(output.iterdir()):
        print(file)


def prepare_replay(options: Namespace) -> None:
    """Sample texts from a model into a store; every rank of torchrun takes part."""
    from bico_ds.data.replay.sampled_store import SampleShare, SampleSpec, sample_store, start_token
    from bico_ds.evaluation.loading import (
        load_for_evaluation,
        load_generation_config,
        load_tokenizer_and_context,
        weights_stamp,
    )
    from bico_ds.evaluation.scoring.generation import stop_ids
    from bico_ds.runtime.distributed import ranks_of_torchrun

    model, output = options.model.here(), options.output.resolve()
    refuse_output(output, force=options.force)
    tokenizer, context = load_tokenizer_and_context(model)
    if options.max_length < 2:
        raise UserError("--max-length 1: a text needs a token after its first one")
    if context is not None and options.max_length > context:
        raise UserError(f"--max-length {options.max_length}: the model's context is {context}")
    spec = SampleSpec(
        tokens=options.tokens,
        most_tokens=options.max_length,
        seed=options.seed,
        start=start_token(tokenizer, options.separator),
        stops=tuple(stop_ids(load_generation_config(model), tokenizer)),
        model=f"{weights_stamp(model)} {options.dtype}",
    )
    with ranks_of_torchrun() as ranks:
        share = SampleShare(
            device=ranks.device,
            batch_size=options.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            progress=ranks.is_first,
        )
        report = sample_store(
            lambda: load_for_evaluation(model, dtype=options.dtype, device=ranks.device)[0],
            tokenizer,
            spec,
            output,
            share,
            provenance=provenance(
                options.source or f"sampled from {model}, seed {options.seed}", options.licence
            ),
            force=options.force,
        )
    if report is not None:
        print(f"{options.output}: {report}")


def prepare_teacher(options: Namespace) -> None:
    """Store a model's distributions over the texts of stores; every rank of torchrun takes part."""
    from bico_ds.config.sections.model import ModelSpec
    from bico_ds.data.store import TokenStore
    from bico_ds.data.teacher.prepare import TextCut, find_tasks, prepare_parts
    from bico_ds.data.tokenizer import load_tokenizer
    from bico_ds.model.build import build_model
    from bico_ds.runtime.distributed import ranks_of_torchrun

    spec, folder = ModelSpec(path=options.model, dtype=options.dtype), options.output.resolve()
    tokenizer, stores = load_tokenizer(options.model.here()), [TokenStore.open(s) for s in options.store]
    for store in stores:
        store.check_tokenizer(tokenizer)
    cut = TextCut(capacity=options.capacity, overlong=options.overlong)
    tasks = find_tasks(spec, stores, cut, folder, top_k=options.top_k, force=options.force)
    with ranks_of_torchrun() as ranks:
        for task in tasks if ranks.is_first else []:
            print(f"{task.store.path}: {task.size}")
        prepare_parts(
            lambda: build_model(
                spec, seed=0, ds_config=None, device=ranks.device, longest_document=options.capacity
            ),
            tasks,
            folder,
            ranks,
            batch_tokens=options.batch_tokens,
            force=options.force,
        )
    if ranks.is_first:
        print(f"{options.output}: done")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--inspect", metavar="STORE", type=local_path, help="show documents of a store, decoded"
    )
    parser.add_argument(
        "--documents", metavar="N", type=not_negative, nargs="+", help="which ones (default: the first 10)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="with --inspect: compare every byte with its checksum, however often it was done",
    )
    parser.add_argument(
        "--tokenizer",
        type=folder_or_hub_name,
        metavar="PATH",
        help="with --inspect: for a store that does not hold its own",
    )
    commands = parser.add_subparsers(dest="command", metavar="{files,hub,facts,replay,teacher}")
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
        _add_provenance(command)
    _add_facts_options(
        commands.add_parser("facts", help="the embedded task: fictitious facts, their tests, a tokenizer")
    )
    replay = commands.add_parser(
        "replay",
        help="texts sampled from a model, at temperature 1",
        description="Sample texts from a model, at temperature 1, from the whole distribution. A text ends at the first "
        "stop token of its generation config: that of a model tuned on chats may be no more than the first turn.",
    )
    _add_replay_options(replay)
    _add_teacher_options(commands.add_parser("teacher", help="a model's distributions over texts of stores"))


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


def _add_replay_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=folder_or_hub_name,
        required=True,
        metavar="MODEL",
        help="safetensors folder, or a hub name",
    )
    parser.add_argument("--output", metavar="DIR", type=local_path, required=True, help="the store to write")
    parser.add_argument("--force", action="store_true", help="replace a store at --output")
    parser.add_argument(
        "--tokens", type=positive, required=True, metavar="N", help="tokens to sample, in all"
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        default=512,
        metavar="N",
        help="tokens per text at most, where it is cut, without EOS (default: %(default)s)",
    )
    parser.add_argument(
        "--separator",
        default="auto",
        metavar="TOKEN",
        help="what texts begin with, as in pre-training: bos, eos, or a token such as '<|endoftext|>'; "
        "auto (default): BOS, or EOS where there is none",
    )
    parser.add_argument(
        "--seed", type=seed, default=1, metavar="N", help="of the samples (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="texts at a time, on every rank (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto (default): that of the weights",
    )
    _add_provenance(parser)


def _add_teacher_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=folder_or_hub_name,
        required=True,
        metavar="MODEL",
        help="the start model: safetensors folder, or a hub name",
    )
    parser.add_argument(
        "--store",
        type=local_path,
        nargs="+",
        required=True,
        metavar="STORE",
        help="stores whose texts it reads",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=local_path,
        required=True,
        help="the teacher: a folder with a part per store",
    )
    parser.add_argument("--force", action="store_true", help="replace the parts of these stores")
    parser.add_argument(
        "--capacity", type=positive, required=True, metavar="N", help="data.capacity of the recipe"
    )
    parser.add_argument(
        "--overlong",
        choices=("split", "truncate", "drop"),
        default="split",
        help="data.overlong of the recipe (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=positive,
        default=64,
        metavar="K",
        help="likeliest tokens kept per position; the others are one bucket (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-tokens",
        type=positive,
        default=8192,
        metavar="N",
        help="tokens at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="precision of the forward pass, best model.dtype of the recipe (default: %(default)s)",
    )


def _add_provenance(parser: ArgumentParser) -> None:
    parser.add_argument("--source", metavar="TEXT", help="a line kept in the store: where its texts are from")
    parser.add_argument(
        "--licence", metavar="TEXT", help="a line kept in the store: the licence of its texts"
    )


def _add_facts_options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", type=local_path, required=True, help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace such a folder at --output")
    for name, field in FactsSpec.model_fields.items():
        described = field.description or "of names, groups and fillers"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=whole,
            metavar="N",
            default=field.default,
            help=f"{described} (default: %(default)s)",
        )


def _input(options: Namespace) -> tuple[list[Shard], dict[str, list[str]]]:
    """The shards to read, and by reason the names of what lies beside the files and is not read."""
    if options.command == "hub":
        return hub_shards(options.name, config=options.config, split=options.split), {}
    inputs = find_inputs(options.inputs)
    shards = plan_shards(inputs.files, text_by=options.text_by, shard_bytes=SHARD_BYTES)
    return shards, inputs.passed_over


def _options(options: Namespace) -> IngestOptions:
    return IngestOptions(**{name: getattr(options, name) for name in IngestOptions.__dataclass_fields__})


main = Command(
    description=__doc__,
    add_options=add_options,
    contradiction=contradiction,
    run=prepare,
    only_shows=lambda options: options.inspect is not None,
)


if __name__ == "__main__":
    main.start()
