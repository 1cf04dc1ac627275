"""Turn a checkpoint, of any number of ranks, full or LoRA, into a Hugging Face folder.

    python tools/export_hf.py runs/llama70b_bico OUT                    the newest complete checkpoint of a run
    python tools/export_hf.py runs/llama70b_bico/checkpoints/step-001000 OUT --dtype fp32

Needs no ranks, no GPU and none of the run's data, and one shard of memory. OUT appears complete or not at all. fp32 gives
the optimizer's master weights where all weights were trained under ZeRO-3; else it is the training's dtype, widened.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bico_ds.common.errors import UserError
from bico_ds.config.arguments import folder_or_hub_name, local_path
from bico_ds.config.paths import FolderOrHub
from bico_ds.config.schema import Recipe


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=local_path, help="a checkpoint folder, or a run folder")
    parser.add_argument("output", type=local_path, help="the folder to write; must be new or empty")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument(
        "--base", type=folder_or_hub_name, help="LoRA: where the base model lies now, if it has moved"
    )
    parser.add_argument(
        "--tokenizer",
        type=folder_or_hub_name,
        help="default: the one in the run folder, or where that has none, the recipe's",
    )
    parser.add_argument("--shard-gb", type=float, default=4.0, help="largest shard (default 4)")
    arguments = parser.parse_args()
    if arguments.shard_gb <= 0:
        parser.error(f"--shard-gb must be positive, found {arguments.shard_gb:g}")
    try:
        export(arguments)
    except UserError as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return 2
    return 0


def export(arguments: argparse.Namespace) -> None:
    from bico_ds.checkpoint import manifest
    from bico_ds.config.load import recorded_recipe
    from bico_ds.data.tokenizer import load_tokenizer
    from bico_ds.model.weights.export_checkpoint import export_checkpoint
    from bico_ds.model.weights.shards import refuse_existing

    refuse_existing(arguments.output)
    root = arguments.checkpoint / "checkpoints"
    found = manifest.find(root, print) if root.is_dir() else manifest.verify(arguments.checkpoint)
    if found is None:
        raise UserError(f"'{root}' holds no checkpoint")
    recipe = recorded_recipe(found.content["recipe"], found.path / manifest.MANIFEST, objectives=False)
    if arguments.base is not None:
        model = recipe.model.model_copy(update={"path": arguments.base})
        recipe = recipe.model_copy(update={"model": model})
    elif recipe.model.lora is not None and recipe.model.path is not None:
        with _option_in_errors("--base"):
            recipe.model.path.here()
    with _option_in_errors("--tokenizer"):
        tokenizer = load_tokenizer(
            arguments.tokenizer.here() if arguments.tokenizer else tokenizer_of_run(found.path, recipe)
        )
    print(
        f"exporting step {found.step} of '{recipe.name}' to {arguments.output} ({arguments.dtype})",
        flush=True,
    )
    export_checkpoint(
        found.path,
        recipe.model,
        tokenizer,
        arguments.output,
        arguments.dtype,
        max_shard_bytes=int(arguments.shard_gb * 1e9),
    )
    print(f"done: {arguments.output}")


def tokenizer_of_run(checkpoint: Path, recipe: Recipe) -> FolderOrHub:
    """The one in the run folder; without it (runs of 0.1.0, checkpoints copied elsewhere) the one that the recipe means.

    Raises `UserError` where that cannot be told on this machine.
    """
    from bico_ds.runtime.run_folder import RunFolder
    from bico_ds.training.assembly import tokenizer_path

    root = checkpoint.absolute().parent
    recorded = RunFolder(root.parent).tokenizer
    return recorded if root.name == "checkpoints" and recorded.is_dir() else tokenizer_path(recipe)


@contextmanager
def _option_in_errors(option: str) -> Iterator[None]:
    """The recipe is the checkpoint's, which nobody edits: name the option that stands for its key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (here: {option})") from None
