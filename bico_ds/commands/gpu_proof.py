"""Prove on a GPU what nothing else can: right, how fast, beside others; and that a run survives.

    python tools/gpu_proof.py                                    six minutes; the same again: the parts left
    python tools/gpu_proof.py --parts check speed --minutes 2    only these
    python tools/gpu_proof.py --rehearse                         every part on a CPU, at a tiny size

Run it first on every new machine. It needs a checkout, one CUDA GPU (it takes the first) and no network. --out gets
report.md, report.json and the log of each part, written as they come. The same command goes on: parts that are done on
this machine, source and versions are not run again. Exit codes: 0 every part is right (or cannot be measured on this
machine, which the report says), 1 a part failed, is wrong or had no time, 2 wrong usage, or no CUDA device.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from bico_ds.common.command_line import Command
from bico_ds.config.arguments import local_path, positive_number
from bico_ds.proof.parts import PARTS
from bico_ds.proof.prove import Request, prove


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=positive_number,
        default=6.0,
        metavar="M",
        help="the most that all parts together may take (default: %(default)g)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        help="only these parts (default: all, in this order)",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, at a tiny size; shows nothing about GPUs"
    )
    parser.add_argument("--again", action="store_true", help="run parts again that are done")
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="DIR",
        help="for reports and logs (default: runs/gpu_proof, of a rehearsal runs/gpu_proof_rehearsal)",
    )


def run(options: Namespace) -> int:
    name = "gpu_proof_rehearsal" if options.rehearse else "gpu_proof"
    request = Request(
        parts=options.parts,
        out=options.out or Path("runs", name),
        minutes=options.minutes,
        rehearse=options.rehearse,
        again=options.again,
    )
    return 0 if prove(request) else 1


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
