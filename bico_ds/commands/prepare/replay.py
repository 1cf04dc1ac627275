"""`bico-ds prepare replay`: texts sampled from a model into a store."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction

from bico_ds.commands.prepare.provenance import add_provenance
from bico_ds.common.errors import UserError
from bico_ds.config.arguments import folder_or_hub_name, local_path, positive, seed
from bico_ds.data.prepare.output_folder import refuse_output
from bico_ds.data.store import provenance


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


def add_command(commands: _SubParsersAction[ArgumentParser]) -> None:
    parser = commands.add_parser(
        "replay",
        help="texts sampled from a model, at temperature 1",
        description="Sample texts from a model, at temperature 1, from the whole distribution. A text ends at the first "
        "stop token of its generation config: that of a model tuned on chats may be no more than the first turn.",
    )
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
    add_provenance(parser)
