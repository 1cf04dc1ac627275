"""Run by the Python of .venv-transformers4: `read_by_transformers4.py ROOT OUT.json` reads every folder below ROOT.

With another transformers it does the same, which is how its answers are compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def read_model(folder: Path, ids: list[int]) -> list[list[float]]:
    """Logits [tokens, vocabulary] of `ids`."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        return model.float().eval()(torch.tensor([ids])).logits[0].tolist()


def read_tokenizer(folder: Path, texts: list[str]) -> dict[str, Any]:
    """What a tokenizer does to `texts`, and what it is."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]
    return {
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "plain ids": plain,
        "pair": tokenizer("a b", "c")["input_ids"],
        "decoded": [tokenizer.decode(ids) for ids in plain],
        "decoded without special tokens": [tokenizer.decode(ids, skip_special_tokens=True) for ids in plain],
        "special tokens": [
            tokenizer.bos_token,
            tokenizer.eos_token,
            tokenizer.pad_token,
            tokenizer.unk_token,
        ],
        "special ids": sorted(set(tokenizer.all_special_ids)),
        "settings": [tokenizer.padding_side, tokenizer.model_max_length, sorted(tokenizer("a"))],
        "chat": tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else None,
    }


def answers(folder: Path, prompts: list[str]) -> list[str]:
    """Greedy answers of a plain pipeline."""
    answer = pipeline("text-generation", model=str(folder), trust_remote_code=False)
    return [answer(prompt, max_new_tokens=12, do_sample=False)[0]["generated_text"] for prompt in prompts]


def read_all(root: Path) -> dict[str, Any]:
    asked = json.loads((root / "asked.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"version": transformers.__version__}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        what = found.setdefault(folder.name, {})
        has_model, has_tokenizer = ((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
        if has_model:
            what["logits"] = read_model(folder, asked["ids"])
        if has_tokenizer:
            what["tokenizer"] = read_tokenizer(folder, asked["texts"])
        if has_model and has_tokenizer:
            what["answers"] = answers(folder, asked["texts"])
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(read_all(Path(sys.argv[1]))), encoding="utf-8")
