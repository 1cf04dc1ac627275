"""`bico-ds prepare teacher`: a model's distributions over the texts of stores."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction

from bico_ds.config.arguments import folder_or_hub_name, local_path, positive


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


def add_command(commands: _SubParsersAction[ArgumentParser]) -> None:
    parser = commands.add_parser("teacher", help="a model's distributions over texts of stores")
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
