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
from argparse import ArgumentParser, Namespace

from bico_ds.commands.prepare import facts, replay, teacher, texts
from bico_ds.common.command_line import Command
from bico_ds.config.arguments import folder_or_hub_name, local_path, not_negative
from bico_ds.data.inspect_store import describe_store
from bico_ds.data.prepare.ingest import IngestFailure
from bico_ds.data.store import Verify


def prepare(options: Namespace) -> int:
    """0 done, 1 the machine failed or it was interrupted. Raises `UserError`."""
    try:
        if options.inspect is not None:
            inspect(options)
        elif options.command == "facts":
            facts.prepare_facts(options)
        elif options.command == "replay":
            replay.prepare_replay(options)
        elif options.command == "teacher":
            teacher.prepare_teacher(options)
        else:
            texts.prepare_texts(options)
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
    texts.add_commands(commands)
    facts.add_command(commands)
    replay.add_command(commands)
    teacher.add_command(commands)


main = Command(
    description=__doc__,
    add_options=add_options,
    contradiction=contradiction,
    run=prepare,
    only_shows=lambda options: options.inspect is not None,
)


if __name__ == "__main__":
    main.start()
