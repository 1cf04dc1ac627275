"""Every command of docs/examples/own_facts, in order, with a tiny model in the place of SmolLM2 and few steps."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests import ROOT
from tests.distributed.launching import environment

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1500)]

PAGE = ROOT / "docs" / "examples" / "own_facts" / "README.md"
# A download of 100 MB (tests/commands/test_import_gguf.py has what it does), and a server, whose packages are not here.
NOT_HERE = ("tools/fetch_model.py", "transformers serve", "curl ")
IN_THE_CHECKOUT = ("docs", "launch", "tools", "recipes", "ds_configs", "bico_ds")
FEW = {"steps: 400": "steps: 8", "every_steps: 100": "every_steps: 4", "tokens: 40000": "tokens: 400",
       "warmup_steps: 30": "warmup_steps: 1", "limit: 30": "limit: 6"}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def tiny_model(folder: Path) -> None:
    """A random Llama with a byte-level tokenizer, whose end of text is a token of its own."""
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    texts = (PAGE.parent / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    rules.train_from_iterator([json.loads(text)["text"] for text in texts], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder like a checkout, with a recipe of few steps."""
    folder = tmp_path_factory.mktemp("desk")
    for name in IN_THE_CHECKOUT:
        if name != "docs":
            (folder / name).symlink_to(ROOT / name)
    shutil.copytree(PAGE.parent, folder / "docs" / "examples" / "own_facts")
    recipe = folder / "docs" / "examples" / "own_facts" / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    for many, few in FEW.items():
        assert many in text, many
        text = text.replace(many, few)
    recipe.write_text(text, encoding="utf-8")
    tiny_model(folder / "models" / "smollm2-135m")
    return folder


def run(desk: Path, command: list[str]) -> str:
    done = subprocess.run(
        command, cwd=desk, env=environment() | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_of_the_page_does_what_it_says(desk):
    lines = [line for block in blocks("bash")[1:] for line in block.splitlines()]
    lines = [line for line in lines if not any(name in line for name in NOT_HERE)]
    if find_spec("lm_eval") is None:
        lines = [line for line in lines if not line.startswith("lm-eval")]
    for line in lines:
        words = shlex.split(line)
        assert words[0] in ("python", "lm-eval"), line
        here = [sys.executable] if words[0] == "python" else [str(Path(sys.executable).parent / words[0])]
        run(desk, [*here, *words[1:]])
    exported = desk / "runs" / "own_facts" / "export"
    assert (exported / "model.safetensors").is_file() and (exported / "README.md").is_file()
    best = json.loads((desk / "runs" / "own_facts" / "best_checkpoint.json").read_text())
    assert best["metric"] == "company_backward/headline" and best["step"] in (4, 8)
    assert (desk / "runs" / "own_facts" / "report.html").is_file()
    asked = json.loads((desk / "runs" / "own_facts" / "all_questions.json").read_text())
    assert len(asked["tasks"]["company_backward"]["rows"]) == 139
    assert (desk / "runs" / "own_facts_lora" / "export" / "adapter_model.safetensors").is_file()
    assert (desk / "runs" / "own_facts_lora_merged" / "model.safetensors").is_file()
    for code in blocks("python"):
        assert run(desk, [sys.executable, "-c", code]).strip()
