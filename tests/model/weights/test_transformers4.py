"""Exports under transformers 4, in an environment of its own: the same logits, tokens and answers as under 5 and here."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bico_ds.config.sections.model import ModelSpec
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.model.architecture import adopt_special_tokens
from bico_ds.model.build import build_model
from bico_ds.model.weights.export_model import export_model
from tests import ROOT
from tests.data.tokenizer_kinds import write_kinds
from tests.model.rope_types import CASES, ORIGINAL, architecture
from tests.model.weights import read_by_transformers4

PYTHON = ROOT / ".venv-transformers4" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no transformers 4 here: make transformers4"),
]
Readings = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def readings(tmp_path_factory) -> Readings:
    """What is in every folder: as it is here (`ours`), and as transformers 4 and 5 read it."""
    root = tmp_path_factory.mktemp("exports")
    ids = np.random.default_rng().integers(0, 501, 4 * ORIGINAL).tolist()
    texts = [
        "Hello, it's a don 't test .",
        " two  spaces\n",
        "Größe 北京 🙂 <|eot|> a</s>b",
        f"{random.random()}",
    ]
    (root / "asked.json").write_text(json.dumps({"ids": ids, "texts": texts}))
    kinds = write_kinds(root.parent / "kinds")
    for path in kinds:
        tokenizer = load_tokenizer(path)
        for add_bos in {tokenizer.bos_token_id is not None, False}:
            ExportedTokenizer(tokenizer, add_bos).save_pretrained(root / f"{path.name} {add_bos}")
    ours = {f"{kind} {rope}": _export(root / f"{kind} {rope}", kind, rope, ids) for kind, rope in CASES}
    whole = _export(root / "complete", "llama", "llama3", ids, load_tokenizer(kinds[0]))
    out = root.parent / "read.json"
    command = [str(PYTHON), read_by_transformers4.__file__, str(root), str(out)]
    hidden = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return {
        "ours": {**ours, "complete": whole},
        "4": json.loads(out.read_text()),
        "5": json.loads(json.dumps(read_by_transformers4.read_all(root))),
    }


def _export(folder: Path, model_type: str, rope: str, ids: list[int], tokenizer: Any = None) -> np.ndarray:
    """Export a random model; its logits."""
    spec = ModelSpec(config=architecture(model_type, rope), dtype="fp32")
    model = build_model(spec, seed=5, ds_config=None, device="cpu", longest_document=64).causal_lm.eval()
    exported = None if tokenizer is None else ExportedTokenizer(tokenizer, True)
    if exported is not None:
        adopt_special_tokens(exported, model.config, model.generation_config)
    export_model(model, exported, folder, "fp32")
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def test_the_versions_are_what_they_should_be(readings):
    assert readings["4"]["version"].startswith("4.") and readings["5"]["version"].startswith("5.")


@pytest.mark.parametrize(("model_type", "rope"), CASES)
def test_logits_are_the_same_in_transformers_4_and_5_and_here(readings, model_type, rope):
    name = f"{model_type} {rope}"
    ours = readings["ours"][name]
    for version in ("4", "5"):
        np.testing.assert_allclose(
            readings[version][name]["logits"], ours, rtol=0, atol=1e-5 * np.abs(ours).max()
        )


def test_tokenizers_are_the_same_in_transformers_4_and_5(readings):
    names = [name for name, what in readings["5"].items() if "tokenizer" in what]
    assert len(names) > 30
    for name in names:
        for key, value in readings["5"][name]["tokenizer"].items():
            assert readings["4"][name]["tokenizer"][key] == value, (name, key)


def test_a_plain_pipeline_answers_the_same_in_transformers_4_and_5(readings):
    answers = readings["5"]["complete"]["answers"]
    assert readings["4"]["complete"]["answers"] == answers and len(set(answers)) > 1
