"""Tokenizers for the tests of data: whole words, and byte-level BPE with a chat template."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bico_ds.config.schema import DataSpec, FactsSpec, SourceSpec
from bico_ds.data.prepare.embedded_task import write_facts
from tests.data.stores import write_store

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('role ' + m.role) }}{% endif %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("facts")
    write_facts(FactsSpec(name_first=2, description_first=2, both=2), folder)
    return str(folder / "tokenizer")


@pytest.fixture(scope="session")
def bpe_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    tokenizer.enable_truncation(5)  # as some tokenizer.json on the hub have it: must not cut documents
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two stores, with documents longer than a bin, and their data section."""
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(0)
    stores = [
        write_store(folder / "a", [*rng.integers(1, 60, 150).tolist(), 150, 97], add_bos=True),
        write_store(folder / "b", rng.integers(5, 64, 40).tolist()),
    ]

    def data(**changes) -> DataSpec:
        epochs, weights = (changes.pop(key, (None, None)) for key in ("epochs", "weights"))
        sources = [
            SourceSpec(store=str(store.path), epochs=epoch, weight=weight)
            for store, epoch, weight in zip(stores, epochs, weights, strict=True)
        ]
        return DataSpec(sources=sources, **{"capacity": 64, "workers": 0, **changes})

    return stores, data
