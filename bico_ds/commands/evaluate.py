"""Evaluate an exported model: the reversal tasks, and further tests of your choice.

    bico-ds evaluate --model runs/tiny_bico/export --data FOLDER
    bico-ds evaluate --model OUT/blend-* --data FOLDER      each into a result file of its own; then bico-ds compare
    bico-ds evaluate --model runs/mine/export --tasks-from runs/mine/recipe.yaml --samples 5
    bico-ds evaluate --model DIR --parents parents.csv --retention book.txt --base BASE_DIR
    torchrun --nproc-per-node 2 -m bico_ds.commands.evaluate --model DIR --data FOLDER --likelihood

FOLDER holds name-description test files (p2d_prompts_test.jsonl …), published or of the embedded task.
Results go to a JSON file that grows part by part: after an interruption the same command continues it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, _ArgumentGroup
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from bico_ds.common.command_line import Command
from bico_ds.config.arguments import add_overrides_option, folder_or_hub_name, local_path, path_text, positive
from bico_ds.config.paths import FolderOrHub, FolderOrHubName
from bico_ds.config.sections.evaluation import QuestionKind
from bico_ds.runtime import launch_environment
from bico_ds.runtime.signals import StopFlag

_QUESTIONS = "--data, --pairs, --parents, --couplets, --questions, --tasks-from"
# What stands in the place of these options with --tasks-from.
_RECIPE_KEYS = {
    "tasks": "evaluation.tasks",
    "limit": "evaluation.limit",
    "max_new_tokens": "evaluation.max_new_tokens",
    "likelihood": "evaluation.likelihood_others",
    "others": "evaluation.likelihood_others",
}


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=folder_or_hub_name,
        metavar="MODEL",
        required=True,
        nargs="+",
        help="safetensors folder with its tokenizer, of a model or of adapters (merged in memory into their base), or a hub "
        "name; several, as OUT/blend-*, one after the other",
    )
    add_task_options(parser.add_argument_group("what to ask"))
    add_settings(parser.add_argument_group("how"))


def add_task_options(tasks: _ArgumentGroup) -> None:
    tasks.add_argument("--data", metavar="DIR", type=local_path, help="folder of name-description test files")
    tasks.add_argument(
        "--tasks", metavar="NAME,…", help="with --data (default: n2d,d2n,n2d_reverse,d2n_reverse)"
    )
    tasks.add_argument("--parents", metavar="FILE", type=local_path, help="CSV: child,parent,parent_type")
    tasks.add_argument("--couplets", metavar="FILE", type=local_path, help="JSONL: first, second")
    tasks.add_argument(
        "--pairs",
        metavar="FILE",
        type=local_path,
        help="JSONL: forward and backward, each with prompt and completion",
    )
    tasks.add_argument("--questions", metavar="FILE", type=local_path, help="JSONL: prompt, answer")
    tasks.add_argument(
        "--tasks-from",
        metavar="RECIPE",
        type=path_text,
        help="ask and measure what a recipe's evaluation.tasks do during training, in the same way; a name in recipes/ or a "
        "YAML file",
    )
    add_overrides_option(tasks)
    tasks.add_argument(
        "--retention",
        type=local_path,
        nargs="+",
        default=[],
        metavar="TEXT",
        help="perplexity on these texts",
    )
    tasks.add_argument(
        "--instructions",
        metavar="FILE",
        type=local_path,
        help="JSONL: instruction; agreement with the answers of --base to them",
    )
    tasks.add_argument(
        "--base",
        metavar="MODEL",
        type=folder_or_hub_name,
        help="the model before fine-tuning, for --retention and --instructions",
    )
    tasks.add_argument(
        "--train",
        metavar="STORE",
        type=local_path,
        nargs="+",
        default=[],
        help="token stores of the training texts: score apart what these hold in the order asked",
    )
    tasks.add_argument("--likelihood", action="store_true", help="log-probability test on every task")
    tasks.add_argument(
        "--limit", metavar="N", type=positive, help="prompts of each task, spread over the persons"
    )


def add_settings(how: _ArgumentGroup) -> None:
    how.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        default=32,
        help="prompts per batch (default: %(default)s)",
    )
    how.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=positive,
        help="tokens per answer at most (default: 40, as in the paper)",
    )
    how.add_argument(
        "--others",
        metavar="N",
        type=positive,
        help="other persons' answers in --likelihood (default: 9)",
    )
    how.add_argument(
        "--window",
        metavar="N",
        type=positive,
        default=1024,
        help="tokens per window of --retention (default: %(default)s)",
    )
    how.add_argument(
        "--bos",
        action=BooleanOptionalAction,
        default=None,
        help="whether texts begin with BOS (default: as its training texts did, by tokenizer_config.json, or yes)",
    )
    how.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto (default): that of the weights",
    )
    how.add_argument(
        "--samples",
        metavar="N",
        type=positive,
        default=0,
        help="also print so many answers of each task, from its first question to its last",
    )
    how.add_argument(
        "--output", metavar="FILE", type=local_path, help="result file (default: runs/evaluation/MODEL.json)"
    )


def contradiction(options: Namespace) -> str | None:
    """What is wrong with the options together: nothing to evaluate, or an option without effect."""
    files = [f"--{kind}" for kind in ("data", *get_args(QuestionKind)) if getattr(options, kind) is not None]
    questions = bool(files or options.tasks_from)
    if not any((questions, options.retention, options.instructions)):
        return f"nothing to ask: give {_QUESTIONS}, --retention or --instructions"
    if (problem := _beside_recipe(options, files)) is not None:
        return problem
    if options.output is not None and len(options.model) > 1:
        return "--output names one file, and several models have one each: leave it out"
    if options.tasks is not None and options.data is None:
        return "--tasks names files of a folder: give --data too"
    if options.tasks is not None and not task_names(options):
        return f"--tasks names no task: '{options.tasks}'"
    if options.train and not questions:
        return f"--train is searched for questions: give {_QUESTIONS}, too"
    if options.samples and not questions:
        return f"--samples shows answers to questions: give {_QUESTIONS}, too"
    if options.instructions and not options.base:
        return "--instructions compares with the answers of another model: give --base too"
    if options.base and not (options.retention or options.instructions):
        return "--base is compared on texts and instructions: give --retention too, or --instructions"
    return None


def _beside_recipe(options: Namespace, files: Sequence[str]) -> str | None:
    """What a recipe's tasks leave no room for; and `--set` without them."""
    if options.tasks_from is None:
        return "--set changes the recipe of --tasks-from: give that too" if options.overrides else None
    if files:
        return f"--tasks-from names all questions: leave out {', '.join(files)}, or name the files in the recipe (--set)"
    for option, key in _RECIPE_KEYS.items():
        if getattr(options, option):
            word = f"'--{option.replace('_', '-')}'"
            return f"{word} has no effect: --tasks-from takes {key} from the recipe, where --set changes it"
    return None


def task_names(options: Namespace) -> tuple[str, ...]:
    from bico_ds.evaluation.tasks.task import TASK_NAMES

    if options.tasks is None:
        return TASK_NAMES if options.data else ()
    return tuple(name.strip() for name in options.tasks.split(",") if name.strip())


def request_of(options: Namespace, named: FolderOrHubName) -> Any:
    from bico_ds.config.load import load_recipe
    from bico_ds.evaluation.request.asked import Request, asking_as
    from bico_ds.evaluation.tasks.further_sets import READERS

    model = named.here()
    request = Request(
        model=model,
        output=options.output or default_output(model),
        data=options.data,
        tasks=task_names(options),
        further={kind: getattr(options, kind) for kind in READERS if getattr(options, kind) is not None},
        retention=tuple(options.retention),
        instructions=options.instructions,
        base=options.base.here() if options.base is not None else None,
        likelihood=options.likelihood,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens or Request.max_new_tokens,
        others=options.others or Request.others,
        train=tuple(options.train),
        window=options.window,
        bos=options.bos,
        dtype=options.dtype,
        samples=options.samples,
    )
    if options.tasks_from is None:
        return request
    return asking_as(load_recipe(options.tasks_from, options.overrides), request)


def default_output(model: FolderOrHub) -> Path:
    folder = Path(model).resolve()
    name = folder.parent.name if folder.name == "export" else folder.name
    if folder.name.startswith("blend-"):  # of any run
        name = f"{folder.parent.name}-{folder.name}"
    return Path("runs/evaluation") / f"{name}.json"


def evaluate_model(options: Namespace, stop: StopFlag) -> bool:
    """Join the other ranks, if torchrun started any, and ask one model after the other. False: stopped before the end."""
    from bico_ds.evaluation.loading import check_model_folder
    from bico_ds.evaluation.report.tables import console_for_tables
    from bico_ds.evaluation.request.run import run_request
    from bico_ds.evaluation.scoring.share import PromptShare
    from bico_ds.runtime.distributed import ranks_of_torchrun

    with ranks_of_torchrun() as ranks:
        share = PromptShare(
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            batch_size=options.batch_size,
            should_stop=lambda: bool(stop),
        )
        for model in options.model:
            check_model_folder(model.here())
        return all(
            run_request(request_of(options, model), share, console_for_tables()) for model in options.model
        )


def evaluate(options: Namespace) -> int:
    """0 done, 1 stopped by a signal; the results so far are in the file."""
    stop = StopFlag()
    stop.install(["SIGTERM", "SIGINT", "SIGUSR1"])
    if evaluate_model(options, stop):
        return 0
    print(f"stopped ({stop.reason or 'another rank'}); the same command continues from here", file=sys.stderr)
    return 1


main = Command(
    description=__doc__,
    add_options=add_options,
    contradiction=contradiction,
    run=evaluate,
    rank=launch_environment.local_rank,
)


if __name__ == "__main__":
    main.start()
