"""Small tokenizers of the kinds that people have, as folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS = 1, 2
_SPECIAL = ["<unk>", "<s>", "</s>", "<|eot|>"]
_CORPUS = [*Path(__file__).read_text(encoding="utf-8").splitlines(), "Größe, naïve café, 北京 🙂"]
_BYTES = processors.ByteLevel(trim_offsets=True)
_PAIR = (("</s>", EOS), ("<s>", BOS))


def _template(text: str) -> Any:
    return processors.TemplateProcessing(single=text, special_tokens=[("<s>", BOS), ("</s>", EOS)])


# What a tokenizer's own post-processor does, and what its export then must not do any more.
POST_PROCESSORS: dict[str, Any] = {
    "none": None,
    "bytes": _BYTES,
    "bos": _template("<s> $A"),
    "bos_and_eos": _template("<s> $A </s>"),
    "eos": _template("$A </s>"),
    "llama3": processors.Sequence([_BYTES, _template("<s> $A")]),
    "nested": processors.Sequence([processors.Sequence([_BYTES]), _template("$A </s>")]),
    "roberta": processors.RobertaProcessing(*_PAIR),
    "bert": processors.BertProcessing(*_PAIR),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama_class": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": True},
    "gpt2_class": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False},
    "qwen_class": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "add_bos_token": False},
    "more_tokens": {"additional_special_tokens": ["<|eot|>", "<|new|>"]},
    "named_tokens": {"extra_special_tokens": {"image_token": "<|eot|>"}},
    "templates": {
        "chat_template": [
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
            {"name": "tool_use", "template": "tools"},
        ]
    },
    "clean_up": {"clean_up_tokenization_spaces": True, "padding_side": "left", "model_max_length": 77},
    "wrong_prefix": {"add_prefix_space": True},
}


def _byte_level(**options: Any) -> Tokenizer:
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    rules.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(rules, trainers.BpeTrainer, initial_alphabet=alphabet)
    return rules


def _train(rules: Tokenizer, trainer: Callable[..., Any], *more: str, **options: Any) -> None:
    options |= {"vocab_size": 500, "special_tokens": [*_SPECIAL, *more], "show_progress": False}
    rules.train_from_iterator(_CORPUS, trainer(**options))


def _metaspace() -> Tokenizer:
    rules = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    rules.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rules.decoder = decoders.Sequence(spaces)
    _train(rules, trainers.BpeTrainer, *(f"<0x{byte:02X}>" for byte in range(256)))
    rules.post_processor = _template("<s> $A")
    return rules


def write_kinds(root: Path) -> list[Path]:
    """A folder below `root` for every kind; BOS has id 1 and EOS id 2."""
    rules = {}
    for name, processor in POST_PROCESSORS.items():
        rules[name] = _byte_level()
        if processor is not None:
            rules[name].post_processor = processor
    rules |= {name: _byte_level() for name in CONFIGS}
    rules["prefix"], rules["cut"], rules["nfc"], rules["words"] = (_byte_level() for _ in range(4))
    rules["prefix"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rules["cut"].enable_truncation(5)
    rules["cut"].enable_padding(length=9)
    rules["nfc"].normalizer = normalizers.NFC()
    rules["llama2"] = _metaspace()
    rules["words"] = Tokenizer(models.WordLevel(unk_token="<unk>"))
    rules["words"].pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _train(rules["words"], trainers.WordLevelTrainer)
    for name, made in rules.items():
        (root / name).mkdir(parents=True)
        made.save(str(root / name / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"} | CONFIGS.get(name, {})
        (root / name / "tokenizer_config.json").write_text(json.dumps(config))
    return [root / name for name in rules]
