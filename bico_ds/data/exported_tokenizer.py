"""Tokenizers in folders: what transformers 4 and 5, and the servers that are built on them, read alike.

transformers 5 saves names that 4 does not know (`TokenizersBackend`, a list of `extra_special_tokens`), and traces of the
machine it runs on. Where the two have other defaults, the value is written down.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from bico_ds.data.tokenizer import FastTokenizer, special_ids, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CONFIG = "tokenizer_config.json"
_COMMON_TOKENS = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
# What transformers 5 notes of the machine and of the class that it loaded, and what names code.
_TRACES = (
    "auto_map",  # Python code beside the tokenizer that this one was made of
    "backend",
    "files_loaded",
    "gguf_file",
    "is_local",
    "local_files_only",
    "name_or_path",
    "vocab_file",
)


@dataclass(frozen=True)
class ExportedTokenizer:
    """A tokenizer as an export carries it.

    `add_bos`: whether it begins a text with BOS, as the training texts began; None: as it does already. With a value it
    never ends a text with EOS, after which a prompt would have no continuation.
    """

    tokenizer: FastTokenizer
    add_bos: bool | None

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    @property
    def eos_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def pad_token_id(self) -> int | None:
        return self.tokenizer.pad_token_id

    @property
    def special_ids(self) -> frozenset[int]:
        return special_ids(self.tokenizer)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the tokenizer's files into a folder."""
        save_tokenizer(self.tokenizer, save_directory, add_bos=self.add_bos)

    def describe(self, stops: Sequence[int]) -> str:
        """What an export with this tokenizer that stops at the ids `stops` does at both ends of a text, in a few words."""
        names = self.tokenizer.convert_ids_to_tokens
        adds = adds_bos(self.tokenizer) if self.add_bos is None else self.add_bos
        begins = f"its tokenizer adds BOS {names(self.bos_token_id)}" if adds else "its tokenizer adds no BOS"
        return f"{begins}; generation stops at {' or '.join(names(list(stops)))}"


def save_tokenizer(tokenizer: FastTokenizer, folder: str | Path, *, add_bos: bool | None = None) -> None:
    """Write a tokenizer into `folder`, to be read by transformers 4 and 5; `add_bos` as of `ExportedTokenizer`."""
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer.json"
    rules = json.loads(file.read_text(encoding="utf-8"))
    if add_bos is not None:
        bos = tokenizer.convert_ids_to_tokens(tokenizer.bos_token_id) if add_bos else None
        rules["post_processor"] = _post_processor(rules["post_processor"], bos, tokenizer.bos_token_id)
        tokenizers.Tokenizer.from_str(json.dumps(rules)).save(str(file))
    _rewrite_config(Path(folder) / _CONFIG, tokenizer, rules, add_bos)


def adds_bos(tokenizer: FastTokenizer) -> bool:
    """Whether the tokenizer itself begins a text with BOS."""
    rules = tokenizer.backend_tokenizer
    with_special, without = (rules.encode("a", add_special_tokens=add).ids for add in (True, False))
    return len(with_special) > len(without) and with_special[0] == tokenizer.bos_token_id


def misreading(tokenizer: ExportedTokenizer, config: PretrainedConfig) -> str | None:
    """How transformers reads this tokenizer beside this config, where it is not what was saved; else None.

    transformers 5 goes by `model_type`: a `qwen2` model gets `Qwen2Tokenizer`, which splits texts by rules of its own.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="bico_ds-tokenizer-") as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # As `load_tokenizer` does: the Rust side raises plain Exception.
        except Exception as error:
            return f"transformers cannot load the export's tokenizer: {error}"
    if tokenizer_hash(loaded) == tokenizer_hash(tokenizer.tokenizer):
        return None
    return (
        f"transformers loads the tokenizer of every {config.model_type} model as "
        f"{type(loaded).__name__}, which splits texts otherwise than this one: load the export's tokenizer by "
        "PreTrainedTokenizerFast.from_pretrained, or train another model_type"
    )


def _post_processor(own: dict[str, Any] | None, bos: str | None, bos_id: int | None) -> dict[str, Any] | None:
    """The processor that puts `bos` in front, and otherwise does to offsets what the tokenizer's own does."""
    parts = [part for part in _flat(own) if part["type"] == "ByteLevel"]
    if bos is not None:
        # In this form, and not made by `tokenizers`, because that cannot parse tokens with a space or a colon.
        single, second = (
            [{"SpecialToken": {"id": bos, "type_id": number}}, {"Sequence": {"id": text, "type_id": number}}]
            for number, text in enumerate("AB")
        )
        token = {"id": bos, "ids": [bos_id], "tokens": [bos]}
        template = {"single": single, "pair": single + second, "special_tokens": {bos: token}}
        parts.append({"type": "TemplateProcessing", **template})
    if len(parts) < 2:
        return parts[0] if parts else None
    return {"type": "Sequence", "processors": parts}


def _flat(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A processor's parts, where it is a sequence of them."""
    if processor is None:
        return []
    if processor["type"] != "Sequence":
        return [processor]
    return [part for inner in processor["processors"] for part in _flat(inner)]


def _rewrite_config(
    file: Path, tokenizer: FastTokenizer, rules: dict[str, Any], add_bos: bool | None
) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    for key in _TRACES:
        values.pop(key, None)
    if extra := values.pop("extra_special_tokens", None):
        values["additional_special_tokens"] = extra
    if named := _named_tokens(values):
        values["extra_special_tokens"] = named
    values |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # transformers 5 does not clean up after BPE, whatever the value.
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces
        and rules["model"]["type"] != "BPE",
        # Without these the class decides, Llama's otherwise than the general one.
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": tokenizer.padding_side,
    }
    if add_bos is not None:
        # For programs that go by these and not by the post-processor.
        values |= {"add_bos_token": add_bos, "add_eos_token": False}
    # transformers 4 sets the rule to this value, or to False where there is none.
    split = rules["pre_tokenizer"] or {}
    if "add_prefix_space" in split:
        values["add_prefix_space"] = split["add_prefix_space"]
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _named_tokens(values: dict[str, Any]) -> dict[str, str]:
    """Take special tokens of a model's own (`image_token`) out of a tokenizer_config.json, by their names."""
    own = {key for key in values if key.endswith("_token") and isinstance(values[key], str)} - _COMMON_TOKENS
    return {key: values.pop(key) for key in sorted(own)}
