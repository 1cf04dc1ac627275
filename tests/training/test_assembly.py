"""What a run works on: objectives that the data cannot serve are refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.data.loading.loader import RankShare
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.training import assembly

NTP = "{kind: ntp, loss_on: completion}"
BICO = "{kind: bico, mask: {eligible: completion}}"


@pytest.fixture
def opened(tmp_path: Path):
    """`opened("objectives=…")`: the inputs of tiny_bico, read by a loader too, on two files, one of them without prompts."""
    for name, text in (("pairs", "the fox"), ("texts", "a plain text")):
        records = [{"prompt": "who runs?", "completion": " " + text, "text": text}] * 3
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs = f"{{files: [{tmp_path}/pairs.jsonl], prompt_field: prompt, completion_field: completion}}"
    texts = f"{{files: [{tmp_path}/texts.jsonl]}}"
    common = [f"data.cache_dir={tmp_path}/cache", "evaluation.tasks=[]"]
    tokenizer = assembly.facts_folder(load_recipe("tiny_bico", common).data) / "tokenizer"

    def open_with(
        objectives: str, sources: tuple[str, ...] = ("pairs",), overrides: tuple[str, ...] = ()
    ) -> assembly.RunInputs:
        named = [{"pairs": pairs, "texts": texts}[source] for source in sources]
        mine = [
            f"model.tokenizer={tokenizer}",
            f"objectives=[{objectives}]",
            f"data.sources=[{', '.join(named)}]",
        ]
        recipe = load_recipe("tiny_bico", [*common, *mine, *overrides])
        inputs = assembly.open_inputs(recipe, weights_needed=False)
        assembly.build_loader(recipe, inputs, RankShare()).close()
        return inputs

    return open_with


@pytest.mark.parametrize(
    ("objectives", "key"), [(NTP, r"objectives\[0\]\.loss_on"), (BICO, r"objectives\[0\]\.mask\.eligible")]
)
def test_completions_alone_are_refused_where_a_source_has_none(opened, objectives, key):
    with pytest.raises(
        UserError, match=rf"source 'texts.jsonl': {key} is 'completion'.*the 3 documents.*{key}: all"
    ):
        opened(objectives, ("pairs", "texts"))
    assert opened(objectives, ("pairs",)).stores[0].completions == 3
    assert opened(objectives.replace("completion", "all"), ("texts",)).stores[0].completions == 0


def test_a_placeholder_past_the_models_vocabulary_is_refused(opened, tmp_path):
    last = load_recipe("tiny_bico").model.config["vocab_size"] - 1
    opened(f"{{kind: bico, placeholder_id: {last}}}")
    beyond = f"{{kind: bico, placeholder_id: {last + 1}}}"
    with pytest.raises(UserError, match=rf"objectives\[0\]\.placeholder_id: {last + 1} .* from 0 to {last}"):
        opened(beyond)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"vocab_size": last + 2}))
    opened(beyond, overrides=(f"model.path={tmp_path}/model", "model.config=null"))
    with pytest.raises(UserError, match="placeholder_id"):  # the tokenizer's vocabulary is all that is known
        opened(beyond, overrides=(f"model.path={tmp_path}/absent", "model.config=null"))


@pytest.mark.parametrize(("rank", "local_rank", "reads"), [(0, 0, True), (3, 3, False), (8, 0, True)])
def test_the_first_process_of_each_machine_compares_the_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, reads: bool
) -> None:
    common = [f"data.cache_dir={tmp_path}/cache", "evaluation.tasks=[]"]
    (store,) = assembly.prepare_stores(load_recipe("tiny_base", common), progress=False)
    recipe = load_recipe("tiny_base", [*common, f"data.sources=[{{store: {store}}}]"])
    content = bytearray((store / "tokens.bin").read_bytes())
    content[50] ^= 1
    (store / "tokens.bin").write_bytes(content)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    if reads:
        with pytest.raises(UserError, match=r"wrong checksum of tokens\.bin"):
            assembly.open_inputs(recipe)
    else:
        assert len(assembly.open_inputs(recipe).stores) == 1


@pytest.mark.parametrize("lines", [(1, 4), (4, 1), (2, 2)])
def test_where_some_texts_begin_with_bos_most_decide_and_a_warning_counts_them(tmp_path, lines):
    with_bos, without = lines
    sources = []
    for name, count, add_bos in (("a", with_bos, "true"), ("b", without, "false")):
        (tmp_path / f"{name}.txt").write_text("today | fox\n" * count)
        sources.append(f"{{files: [{tmp_path}/{name}.txt], add_bos: {add_bos}}}")
    inputs, config = _opened(tmp_path, sources)
    assert inputs.exported_tokenizer.add_bos == (with_bos >= without)
    (warning,) = assembly.export_warnings(inputs, config)
    does = "adds" if with_bos >= without else "does not add"
    assert f"{with_bos} of {sum(lines)} texts begin with BOS, and the export's tokenizer {does} it" in warning


def test_texts_with_a_leading_space_that_prompts_do_not_have_are_warned_of(tmp_path, bpe_tokenizer):
    (tmp_path / "a.txt").write_text("today | fox\n" * 3)
    source = f"{{files: [{tmp_path}/a.txt], leading_space: true}}"
    model = [f"model.tokenizer={bpe_tokenizer}", "model.config.vocab_size=600"]
    recipe = load_recipe("tiny_bico", [*_common(tmp_path), *model, f"data.sources=[{source}]"])
    warnings = assembly.export_warnings(assembly.open_inputs(recipe, weights_needed=False), LlamaConfig())
    assert [True for line in warnings if "3 of 3 texts begin with a space (leading_space)" in line] == [True]


def test_a_tokenizer_that_transformers_reads_otherwise_beside_the_model_is_warned_of(tmp_path):
    (tmp_path / "a.txt").write_text("today | fox\n")
    inputs, _ = _opened(tmp_path, [f"{{files: [{tmp_path}/a.txt]}}"])
    (warning,) = assembly.export_warnings(inputs, Qwen2Config())
    assert "transformers loads the tokenizer of every qwen2 model as Qwen2Tokenizer" in warning
    assert assembly.export_warnings(inputs, LlamaConfig()) == []


@pytest.mark.parametrize(
    ("template", "add_bos", "warned"),
    [("", "true", True), ("", "false", False), ("{{ bos_token }}", "true", False)],
)
def test_chats_with_a_bos_that_the_template_does_not_write_are_warned_of(tmp_path, template, add_bos, warned):
    """A chat of a plain pipeline begins as the template writes it, whatever the export's tokenizer adds to other texts."""
    tokenizer = load_tokenizer(
        assembly.facts_folder(load_recipe("tiny_bico", _common(tmp_path)).data) / "tokenizer"
    )
    tokenizer.chat_template = template + "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    chat = [{"role": "user", "content": "today |"}, {"role": "assistant", "content": " fox"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    source = f"{{files: [{tmp_path}/chats.jsonl], messages_field: messages, add_bos: {add_bos}}}"
    changes = [f"model.tokenizer={tmp_path}/tokenizer", f"data.sources=[{source}]"]
    recipe = load_recipe("tiny_bico", [*_common(tmp_path), *changes])
    warnings = assembly.export_warnings(assembly.open_inputs(recipe, weights_needed=False), LlamaConfig())
    assert [True for line in warnings if "the chats begin with BOS" in line] == [True] * warned


def _common(tmp_path: Path) -> list[str]:
    return [f"data.cache_dir={tmp_path}/cache", "evaluation.tasks=[]"]


def _opened(tmp_path: Path, sources: list[str]) -> tuple[assembly.RunInputs, LlamaConfig]:
    common = [f"data.cache_dir={tmp_path}/cache", "evaluation.tasks=[]"]
    tokenizer = assembly.facts_folder(load_recipe("tiny_bico", common).data) / "tokenizer"
    changes = [f"model.tokenizer={tokenizer}", f"data.sources=[{', '.join(sources)}]"]
    return assembly.open_inputs(
        load_recipe("tiny_bico", [*common, *changes]), weights_needed=False
    ), LlamaConfig()
