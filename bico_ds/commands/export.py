"""Turn a checkpoint, of any number of ranks, full or LoRA, into a Hugging Face folder.

    bico-ds export runs/llama70b_bico OUT                    the best checkpoint of a run that keeps one, else the newest
    bico-ds export runs/llama70b_bico OUT --step last        the newest complete one in any case; --step 1000: that step's
    bico-ds export runs/llama70b_bico/checkpoints/step-001000 OUT --dtype fp32
    bico-ds export runs/mine_lora OUT --adapter              a LoRA run's adapters alone, as peft loads them; else merged
    bico-ds export runs/llama70b_bico OUT --blend 0.5,0.7,0.9           OUT/blend-0.50 …: base + 0.5 (trained − base) …

Needs no ranks, no GPU and none of the run's data, and memory for one shard. OUT appears complete or not at all. fp32
gives the optimizer's master weights where all weights were trained under ZeRO-3; else the training's dtype, widened.

A checkpoint is trusted input: DeepSpeed's files are Python pickles, which run code when they are read. Its checksums find
damage, not malice. Export checkpoints of your own runs alone, and pass exports on: those are safetensors.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.config.arguments import folder_or_hub_name, local_path, positive_number
from bico_ds.config.paths import FolderOrHub, FolderOrHubName
from bico_ds.config.schema import Recipe

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from bico_ds.checkpoint.manifest import FoundCheckpoint
    from bico_ds.data.exported_tokenizer import ExportedTokenizer
    from bico_ds.data.tokenizer import FastTokenizer
    from bico_ds.model.weights.blend import Blend
    from bico_ds.training.export.write_card import ExportCard


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=local_path, help="a checkpoint folder, or a run folder")
    parser.add_argument(
        "--step",
        type=_step,
        metavar="best|last|N",
        help="which checkpoint of a run folder (default: the best where checkpoint.keep_best keeps one, else the newest)",
    )
    parser.add_argument("output", type=local_path, help="the folder to write; must be new or empty")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="of the weights (default: bf16; of --adapter, as trained)"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a LoRA run: write its adapters as a folder for peft, without the base that they belong to",
    )
    parser.add_argument(
        "--base",
        type=folder_or_hub_name,
        metavar="MODEL",
        help="where the model that the run started from is now, if it has moved",
    )
    parser.add_argument(
        "--blend",
        type=_shares,
        metavar="SHARE,…",
        default=[],
        help="write base + SHARE (trained - base), 0 to 1; several go to OUT/blend-SHARE",
    )
    parser.add_argument(
        "--tokenizer",
        type=folder_or_hub_name,
        metavar="PATH",
        help="default: the one in the run folder, or where that has none, the recipe's",
    )
    parser.add_argument(
        "--bos",
        action=BooleanOptionalAction,
        default=None,
        help="whether the tokenizer adds BOS to a text (default: as the training texts began)",
    )
    parser.add_argument(
        "--shard-gb", type=positive_number, metavar="GB", default=4.0, help="largest shard (default: 4)"
    )


def contradiction(options: Namespace) -> str | None:
    """What is wrong with the options together."""
    if options.adapter and options.blend:
        return "--blend mixes whole models: leave --adapter out"
    return None


def export(options: Namespace) -> None:
    from transformers import GenerationConfig

    from bico_ds.data.exported_tokenizer import ExportedTokenizer
    from bico_ds.model.architecture import id_list
    from bico_ds.model.weights.shards import refuse_existing
    from bico_ds.training.export.facts import run_of
    from bico_ds.training.export.write_card import card_of

    refuse_existing(options.output)
    found = _checkpoint(options.checkpoint, options.step)
    recipe = _recipe_with_base(found, options)
    if options.adapter:
        _check_has_adapters(recipe)
    tokenizer = _tokenizer(found, recipe, options)
    dtype = options.dtype or (recipe.model.dtype if options.adapter else "bf16")
    what = "the adapters of " if options.adapter else ""
    print(f"exporting {what}step {found.step} of '{recipe.name}' to {options.output} ({dtype})", flush=True)
    recorded = found.content.get("export")
    exported = ExportedTokenizer(tokenizer, _adds_bos(options, recorded, recipe, tokenizer))
    card = card_of(found.content, recipe, run_of(found.path))
    write = partial(
        _write_adapters if options.adapter else _write_models,
        found,
        recipe,
        exported,
        options,
        card,
        dtype=dtype,
        generation=None if recorded is None else GenerationConfig.from_dict(recorded["generation_config"]),
        base=found.content["base"],
    )
    stops = id_list(write().eos_token_id)
    for note in card.notes:
        print(f"note: {note}")
    print(f"done: {options.output}; {exported.describe(stops)}")


def _check_has_adapters(recipe: Recipe) -> None:
    if recipe.model.lora is None:
        raise UserError(
            f"--adapter: '{recipe.name}' trained all weights, and has no adapters: leave the option out for the whole model"
        )
    if recipe.model.path is None:
        raise UserError(
            f"--adapter: '{recipe.name}' began with random weights (model.path: null), which are in no file: adapters alone "
            "belong to nothing"
        )


def _write_adapters(
    found: FoundCheckpoint,
    recipe: Recipe,
    tokenizer: ExportedTokenizer,
    options: Namespace,
    card: ExportCard,
    **settings: Any,
) -> GenerationConfig:
    from bico_ds.model.weights.export_adapter import export_adapter_checkpoint, stops_unlike_base
    from bico_ds.model.weights.export_checkpoint import exported_config

    generation = export_adapter_checkpoint(
        found.path,
        recipe.model,
        tokenizer,
        options.output,
        write_card=partial(card.write, kind="adapter"),
        **settings,
    )
    if recipe.model.path is not None and recipe.model.path.is_folder and not recipe.model.path.is_here():
        print(f"note: the base, '{recipe.model.path}', is not on this machine; --base says where it is")
    elif note := stops_unlike_base(recipe.model, exported_config(recipe.model, reads_base=False), generation):
        print(f"note: {note}")
    return generation


def _write_models(
    found: FoundCheckpoint,
    recipe: Recipe,
    tokenizer: ExportedTokenizer,
    options: Namespace,
    card: ExportCard,
    **settings: Any,
) -> GenerationConfig:
    """The whole model, or its blends with the base."""
    from transformers import AutoConfig

    from bico_ds.data.exported_tokenizer import misreading
    from bico_ds.model.weights.export_checkpoint import export_checkpoint

    blends = _blends(options.blend, found, recipe)
    generation = export_checkpoint(
        found.path,
        recipe.model,
        tokenizer,
        options.output,
        **settings,
        blends=blends,
        write_card=lambda blend, folder: card.write(folder, blend=blend),
        max_shard_bytes=int(options.shard_gb * 1e9),
    )
    config = AutoConfig.from_pretrained(options.output / next(iter(blends or ["."])), trust_remote_code=False)
    if (warning := misreading(tokenizer, config)) is not None:
        print(f"warning: {warning}")
    return generation


def _step(text: str) -> str | int:
    """`best`, `last`, or the number of a step."""
    if text in ("best", "last"):
        return text
    if not text.isascii() or not text.isdigit():
        raise ArgumentTypeError(f"'{text}' is neither best nor last, nor the number of a step")
    return int(text)


def _checkpoint(path: Path, step: str | int | None) -> FoundCheckpoint:
    """The checkpoint in a folder, or that of a run folder which is asked for, verified."""
    from bico_ds.checkpoint import best, manifest, record
    from bico_ds.runtime.run_folder import RunFolder

    folder = RunFolder(path)
    if step is not None and not folder.checkpoints.is_dir():
        raise UserError(f"--step {step}: '{path}' is no run folder: it has no 'checkpoints'")
    kept = best.read(folder) if step in (None, "best") else None
    if kept is not None:
        print(f"the best checkpoint is exported: {kept} (--step last: the newest one)")
        return manifest.verify(kept.path(folder))
    if step == "best":
        raise UserError(f"--step best: '{path}' keeps none (checkpoint.keep_best); name last, or a step")
    if isinstance(step, int):
        return manifest.verify(_of_step(folder.checkpoints, step))
    found = record.at(path, print)
    if found is None:
        raise UserError(f"'{path / 'checkpoints'}' holds no checkpoint")
    return found


def _of_step(checkpoints: Path, step: int) -> Path:
    from bico_ds.checkpoint import manifest

    there = {manifest.step_of(path): path for path in manifest.checkpoints_in(checkpoints)}
    if step not in there:
        known = ", ".join(map(str, there)) or "none"
        raise UserError(f"--step {step}: '{checkpoints}' has no checkpoint of that step; there are {known}")
    return there[step]


def _shares(text: str) -> list[float]:
    """Numbers from 0 to 1, each once."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is not a number, or several with commas between them") from None
    for share in shares:
        if not 0 <= share <= 1:
            raise ArgumentTypeError(f"{share:g} is not between 0 (the base) and 1 (the run's own weights)")
        if shares.count(share) > 1:
            raise ArgumentTypeError(f"{share:g} is there twice")
    return shares


def _blends(shares: list[float], found: FoundCheckpoint, recipe: Recipe) -> dict[str, Blend] | None:
    """What to write, by folder: one blend into the output folder itself, several below it."""
    from bico_ds.model.weights.blend import Blend

    if not shares:
        return None
    if found.content["base"] is None and recipe.model.path is not None:
        print(
            f"warning: the checkpoint, of an earlier version, does not record its base's fingerprint: that "
            f"'{recipe.model.path}' is its base is checked by names and shapes alone"
        )
    blends = [
        Blend(
            share=share,
            base=str(recipe.model.path),
            fingerprint=found.content["base"],
            run=recipe.name,
            step=found.step,
        )
        for share in shares
    ]
    return {"." if len(blends) == 1 else blend.folder: blend for blend in blends}


def _recipe_with_base(found: FoundCheckpoint, options: Namespace) -> Recipe:
    """The recipe that the checkpoint recorded, with `--base` in the place of its start model where that is given."""
    from bico_ds.checkpoint import manifest
    from bico_ds.config.load import recorded_recipe

    recipe = recorded_recipe(found.content["recipe"], found.path / manifest.MANIFEST, objectives=False)
    if options.base is not None:
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": options.base})})
    merges = recipe.model.lora is not None and not options.adapter
    if (options.blend or merges) and recipe.model.path is not None:
        with _option_in_errors("--base"):
            _check_is_there(recipe.model.path)
    return recipe


def _check_is_there(path: FolderOrHubName) -> None:
    if path.is_folder and not path.is_here():
        raise UserError(f"model.path: the folder '{path}' does not exist")


def _tokenizer(found: FoundCheckpoint, recipe: Recipe, options: Namespace) -> FastTokenizer:
    """The tokenizer to export: `--tokenizer`, or the run's. Raises `UserError` where it cannot be this model's."""
    from bico_ds.data.tokenizer import load_tokenizer, needed_vocabulary
    from bico_ds.model.architecture import check_vocabulary
    from bico_ds.model.weights.export_checkpoint import exported_config

    with _option_in_errors("--base"):
        config = exported_config(recipe.model, reads_base=not options.adapter)
    named = options.tokenizer
    with _option_in_errors("--tokenizer"):
        path = named.here() if named is not None else tokenizer_of_run(found.path, recipe)
        tokenizer = load_tokenizer(path)
        check_vocabulary(
            config.vocab_size, needed_vocabulary(tokenizer, config.vocab_size), tokenizer=str(path)
        )
    return tokenizer


def _adds_bos(
    options: Namespace, recorded: dict[str, Any] | None, recipe: Recipe, tokenizer: FastTokenizer
) -> bool:
    """Whether the exported tokenizer begins texts with BOS: as asked for, else as the checkpoint records, else assumed.

    Raises `UserError` where it should, and has none.
    """
    if options.bos is not None:
        adds = bool(options.bos)
    else:
        adds = bool(recorded["add_bos"]) if recorded is not None else assumed_bos(recipe, tokenizer)
    if adds and tokenizer.bos_token_id is None:
        why = "the training texts began with one" if options.bos is None else "--bos asks for one"
        raise UserError(
            f"tokenizer '{tokenizer.name_or_path}' has no BOS token, and {why}: give --no-bos, or --tokenizer with one that "
            "has it"
        )
    return adds


def assumed_bos(recipe: Recipe, tokenizer: FastTokenizer) -> bool:
    """Whether the texts of a run began with BOS whose checkpoint does not record it, by its stores, or its recipe.

    Prints what was assumed.
    """
    from bico_ds.data.store import TokenStore

    sources = []
    for source in recipe.data.sources:
        add_bos = source.add_bos
        if source.store is not None:
            with suppress(UserError):
                add_bos = TokenStore.open(source.store.here()).manifest.add_bos
        sources.append(add_bos)
    assumed = any(sources) and tokenizer.bos_token_id is not None
    print(
        "the checkpoint does not record whether its training texts began with BOS; assumed by its recipe: "
        f"{'yes' if assumed else 'no'} (--bos or --no-bos says otherwise)"
    )
    return assumed


def tokenizer_of_run(checkpoint: Path, recipe: Recipe) -> FolderOrHub:
    """The tokenizer in the run folder; without it (runs of 0.1.0, checkpoints copied elsewhere) the recipe's.

    Raises `UserError` where that cannot be found out on this machine.
    """
    from bico_ds.runtime.run_folder import RunFolder
    from bico_ds.training.assembly import tokenizer_path

    root = checkpoint.absolute().parent
    recorded = RunFolder(root.parent).tokenizer
    return recorded if root.name == "checkpoints" and recorded.is_dir() else tokenizer_path(recipe)


@contextmanager
def _option_in_errors(option: str) -> Iterator[None]:
    """Name the option that replaces a key of the recipe in its errors: nobody edits a checkpoint's recipe."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (here: {option})") from None


main = Command(description=__doc__, add_options=add_options, contradiction=contradiction, run=export)


if __name__ == "__main__":
    main.start()
