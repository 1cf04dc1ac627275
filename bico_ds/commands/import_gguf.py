"""Turn a Llama-like GGUF file into a Hugging Face folder: safetensors, tokenizer, generation config.

    bico-ds import-gguf model.Q4_1.gguf --output models/mine

Needs the extra `gguf` (pip install 'bico_ds[gguf]'). Quantized weights are de-quantized, which does not restore what the
quantization lost: a run that starts from them does not start from the published weights.
"""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.config.arguments import local_path
from bico_ds.data.tokenizer import FastTokenizer, Tokenizer

_MAGIC = b"GGUF"
_PROBE_NAMES = ("Daphne Barrington", "Uriah Hawthorne", "Li Wei", "José Núñez")


def import_gguf(
    file: Path, output: Path, *, dtype: Literal["bf16", "fp32"] = "fp32", overwrite: bool = False
) -> None:
    """Convert `file` into the folder `output`, which appears complete or not at all.

    Raises `UserError` for an `output` that exists (without `overwrite`), a file that is no GGUF or cannot be read, packages
    or weights that are missing, an architecture that cannot be trained here, and a tokenizer that is not the model's, or
    that `check_name_tokens` refuses.
    """
    _check_file(file)
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: exists already; name another folder, or give --overwrite")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bico_ds.data.exported_tokenizer import ExportedTokenizer
    from bico_ds.model.architecture import check_vocabulary
    from bico_ds.model.model_folder import one_line
    from bico_ds.model.swap import check_attention
    from bico_ds.model.weights.export_model import export_model

    in_folder: dict[str, Any] = {"gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), trust_remote_code=False, **in_folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **in_folder,
        )
    except Exception as error:  # transformers, gguf and numpy each raise their own on damaged files
        raise UserError(
            f"{file}: transformers cannot read this GGUF ({one_line(error)}); if it was downloaded, "
            "check that it is complete"
        ) from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise UserError(
            f"{file}: {len(lacking)} weights of the model are not in it, the first is {lacking[0]}"
        )
    if hasattr(model.config, "quantization_config"):
        # The weights are de-quantized now; with this entry nothing would load them.
        del model.config.quantization_config
    check_attention(model.config)
    check_vocabulary(model.config.vocab_size, len(tokenizer), tokenizer=str(file))
    _name_special_tokens(tokenizer, file)
    check_special_tokens(model.config, tokenizer)
    check_name_tokens(tokenizer, _PROBE_NAMES)
    output.parent.mkdir(parents=True, exist_ok=True)
    export_model(model, ExportedTokenizer(tokenizer, None), output, dtype, overwrite=overwrite)


def _name_special_tokens(tokenizer: FastTokenizer, file: Path) -> None:
    """BOS and EOS as the file has them: transformers 5.17 gives the tokenizer others."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    for name in ("bos_token", "eos_token"):
        field = reader.get_field(f"tokenizer.ggml.{name}_id")
        if field is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))


def check_special_tokens(config: Any, tokenizer: Tokenizer) -> None:
    """Raise `UserError` unless BOS and EOS of model and tokenizer are the same tokens, and EOS exists."""
    for name in ("bos_token_id", "eos_token_id"):
        in_model, in_tokenizer = getattr(config, name, None), getattr(tokenizer, name)
        if in_model != in_tokenizer:
            raise UserError(f"{name}: {in_model} in the model's config, {in_tokenizer} in the tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token: a text would never end")


def check_name_tokens(tokenizer: FastTokenizer, names: Sequence[str]) -> None:
    """Raise `UserError` unless a name after a space has the same tokens at the start of an answer and in a sentence.

    Where it has not, a model asked for " NAME" would have to write other tokens than those it was trained on.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for name in names:
        sentence, prompt, answer = encode(f"We met {name} here."), encode("We met"), encode(f" {name}")
        if encode(f"We met {name}") != prompt + answer or sentence[: len(prompt + answer)] != prompt + answer:
            raise UserError(
                f"the tokenizer splits '{name}' differently at the start of an answer ({answer}) and inside "
                f"a sentence ({sentence}): a space must belong to the first token of the word after it"
            )
        if tokenizer.decode(prompt + answer) != f"We met {name}":
            raise UserError(
                f"the tokenizer does not give '{name}' back: {tokenizer.decode(prompt + answer)!r}"
            )


def _check_file(file: Path) -> None:
    try:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        with file.open("rb") as content:
            begins = content.read(len(_MAGIC))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if begins != _MAGIC:
        raise UserError(f"{file}: not a GGUF file (it does not begin with {_MAGIC.decode()})")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the package {' and '.join(missing)} is missing: pip install 'bico_ds[gguf]'")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=local_path, help="the GGUF file")
    parser.add_argument("--output", metavar="DIR", type=local_path, required=True, help="folder to write")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(options: Namespace) -> None:
    import_gguf(options.file, options.output, dtype=options.dtype, overwrite=options.overwrite)
    print(f"written: {options.output}")


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
