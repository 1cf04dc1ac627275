#!/usr/bin/env python
"""Cost of searching training texts for the questions of an evaluation, against decoding the texts alone.

    python tools/bench/question_search.py --store STORE --data FOLDER

STORE is a token store of `bico-ds prepare`, with its tokenizer; FOLDER holds the four name-description test files. Figures
are per CPU second of one process; the best of three rounds of each side in turn.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import this_checkout  # noqa: F401  first on sys.path

from bico_ds.common.command_line import Command
from bico_ds.config.arguments import local_path
from bico_ds.evaluation.contamination import TrainingTexts, find_orders, open_training_texts
from bico_ds.evaluation.scoring.share import ONE_PROCESS
from bico_ds.evaluation.tasks.task import TASK_NAMES, load_tasks

ROUNDS = 3


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--store", metavar="STORE", type=local_path, required=True, help="the texts")
    parser.add_argument("--data", metavar="DIR", type=local_path, required=True, help="the questions")


def decode(texts: TrainingTexts) -> None:
    for _ in texts.chunks(ONE_PROCESS):
        pass


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def run(options: Namespace) -> None:
    texts = open_training_texts([options.store], options.store)
    tasks = load_tasks(options.data, TASK_NAMES)
    works = {
        "decode": lambda: decode(texts),
        "decode and search": lambda: find_orders(tasks, texts, ONE_PROCESS),
    }
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, work in works.items():
            best[name] = min(best[name], cpu_seconds(work))
    print(f"{texts.documents:,} documents, {texts.tokens:,} tokens, {sum(map(len, tasks)):,} questions")
    for name, seconds in best.items():
        print(f"{name}: {texts.documents / seconds:,.0f} documents/s, {texts.tokens / seconds:,.0f} tokens/s")


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
