"""The type check knows what it checks: torch's tensors, transformers' models, DeepSpeed's engine, our tokenizers."""

from __future__ import annotations

import re
import subprocess
import sys

from tests import ROOT

PROBE = """\
from pathlib import Path
from torch import Tensor
from transformers import PretrainedConfig
from bico_ds.data.tokenizer import Tokenizer, load_tokenizer
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.evaluation.loading import load_for_evaluation

def probe(x: Tensor, tokenizer: Tokenizer, engine: Engine) -> None:
    x.no_such_method()  # wrong
    PretrainedConfig.no_such_method()  # wrong
    tokenizer.no_such_method()  # wrong
    engine.no_such_method()  # wrong
    engine(x)  # wrong
    engine.step(3)  # wrong
    load_tokenizer(Path("a")).no_such_method()  # wrong
    load_for_evaluation(Path("a"))[0].no_such_method()  # wrong
    x.sum(), PretrainedConfig().to_dict(), tokenizer.get_vocab(), engine.get_lr()
"""


def test_wrong_calls_on_tensors_configs_tokenizers_and_engines_are_type_errors(tmp_path):
    """By the repository's own settings and cache, in which `make test` has just put torch and transformers."""
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(probe)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    wrong = {int(line) for line in re.findall(r"probe\.py:(\d+): error", done.stdout)}
    expected = {number for number, line in enumerate(PROBE.splitlines(), 1) if "# wrong" in line}
    assert wrong == expected, done.stdout + done.stderr


def test_no_engine_and_no_tokenizer_is_any():
    untyped = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "bico_ds").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\b(engine|tokenizer): Any\b", line)
    ]
    assert untyped == []
