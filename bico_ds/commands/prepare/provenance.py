"""The options that say where the texts of a store are from."""

from __future__ import annotations

from argparse import ArgumentParser


def add_provenance(parser: ArgumentParser) -> None:
    parser.add_argument("--source", metavar="TEXT", help="a line kept in the store: where its texts are from")
    parser.add_argument(
        "--licence", metavar="TEXT", help="a line kept in the store: the licence of its texts"
    )
