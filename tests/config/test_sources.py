"""Data sources of a recipe: who names them, shares of them, `replay` among them, and lists that are added to."""

from __future__ import annotations

import pytest

from bico_ds.config.load import dump_recipe, load_recipe
from tests.config.mistakes import error_of

TWO_SOURCES = """\
model:
  {config: {model_type: llama}, lora: {rank: 4}}
data:
  sources:
    - facts: all
      name: facts
objectives:
  - kind: ntp
    probability: 0.5
  - kind: bico
    probability: 0.5
    sources: [facts]
replay:
  store: other
  token_share: 0.5
retention:
  kl: 1
  on: [replay]
training:
  epochs: 3
  epochs_of: facts
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "sources: [facts]",
            "sources: [fcats]",
            "mine.yaml:12: objectives.1.sources: there is no data source 'fcats' (did you mean 'facts'?); there are facts",
        ),
        ("on: [replay]", "on: [replai]", "mine.yaml:18: retention.on: there is no data source 'replai' (did you"),
        ("epochs_of: facts", "epochs_of: fact", "mine.yaml:21: training.epochs_of: there is no data source 'fact'"),
        (
            "probability: 0.5\n",
            "probability: 0.5\n    sources: [facts]\n",
            "data source 'replay' is in no objective's 'sources'",
        ),
        (
            "      name: facts",
            "      name: facts\n    - {name: replay, store: x}",
            "mine.yaml:14: replay: 'replay' adds a data source of this name, and 'data.sources' has one",
        ),
        (
            "      name: facts",
            "      name: facts\n      weight: 2",
            "mine.yaml:14: replay: 'replay' has a share of the tokens, and 'weight' of 'data.sources' counts documents",
        ),
        (
            "      name: facts",
            "      name: facts\n    - {store: x, token_share: 0.5}\n    - {store: y}",
            "objectives.0: the 'token_share' of its data sources sum to 1, which leaves nothing",
        ),
        (
            "      name: facts",
            "      name: facts\n    - {store: x, token_share: 0.499999}\n    - {store: y}",
            "objectives.0: the 'token_share' of its data sources sum to 0.999999, which leaves less than 0.0001",
        ),
        ("token_share: 0.5", "token_share: 5e-324", "mine.yaml:15: replay.token_share: must be at least 1e-09"),
        ("name: facts", 'name: "a\\0b"', "mine.yaml:6: data.sources.0.name: 'a b': it has the control character 0x00"),
        ("name: facts", "name: ../../x", "mine.yaml:6: data.sources.0.name: '../../x': it leads out of 'data.cache_dir'"),
        ("name: facts", "name: /x", "mine.yaml:6: data.sources.0.name: '/x': it leads out of 'data.cache_dir'"),
        (", lora: {rank: 4}", "", "retention: the start model is found by switching adapters off, and"),
        (", lora: {rank: 4}", ", lora: null", "name its stored log-probabilities as 'teacher'"),
        ("kind: ntp", "kind: bico", "retention: it is a term of causal steps, and no objective like"),
        ("  epochs: 3", "  steps: 3", "'epochs_of' says what 'epochs' counts"),
        ("token_share: 0.5", "token_share: 1.0", "mine.yaml:15: replay.token_share: must be less than 1"),
        ("  store: other", "  store: other\n  tokens: 5", "exactly one of 'tokens' (sampled from the start model) and"),
        ("  store: other\n", "", "exactly one of 'tokens' (sampled from the start model) and 'store'"),
    ],
)  # fmt: skip
def test_a_mistake_about_sources_is_named_with_key_file_and_line(recipe_file, old, new, expected):
    assert expected in error_of(recipe_file(TWO_SOURCES.replace(old, new, 1)))


@pytest.mark.parametrize("kind", ["reverse", "masked_ft"])
def test_a_stored_teacher_does_not_know_texts_that_an_objective_changes(recipe_file, kind):
    with_teacher = TWO_SOURCES.replace("kl: 1", "kl: 1\n  teacher: stored")
    refused = "mine.yaml:8: objectives.0: 'retention.teacher' holds log-probabilities"
    assert refused in error_of(recipe_file(with_teacher.replace("kind: ntp", f"kind: {kind}", 1)))
    load_recipe(
        str(recipe_file(TWO_SOURCES.replace("kind: ntp", f"kind: {kind}", 1)))
    )  # adapters are switched off


@pytest.mark.parametrize("first", ["weight: 1", "epochs: 2", "token_share: 0.5"])
@pytest.mark.parametrize("second", ["weight: 1", "epochs: 2", "token_share: 0.5"])
def test_a_source_has_one_kind_of_share(first, second):
    if first != second:
        message = error_of("tiny_base", f"data.sources=[{{facts: all, {first}, {second}}}]")
        assert "exclude each other" in message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("store: x, derive: other_order", "'derive' makes texts of 'files' or 'facts'"),
        ("sampled: 9, derive: other_order", "'derive' makes texts of 'files' or 'facts'"),
        ("facts: all, derive: both_orders", "'other_order' or 'identity_bridge'"),
        ("facts: all, entities_pattern: x", "['entities_pattern'] set how 'files' are read"),
        ("files: [x], messages_field: m, derive: other_order", "no texts of chats"),
        ("files: [x], messages_field: m, entities_pattern: x", "excludes 'prompt_field' and entities"),
        ("files: [x], derive: other_order", "'entities_pattern' (or 'prompt_field' and 'completion_field')"),
        (
            "files: [x], prompt_field: p, completion_field: c, derive: identity_bridge",
            "'derive: identity_bridge' needs to know the entities: give 'entities_field' or 'entities_pattern'",
        ),
        ("files: [x], entities_field: e, entities_pattern: x", "exclude each other"),
        ("files: [x], entities_pattern: ''", "'entities_pattern' is empty, and marks nothing"),
        ("files: [x], entities_pattern: '('", "'entities_pattern' is no regular expression: missing )"),
    ],
)
def test_texts_that_cannot_be_derived_are_refused_before_a_file_is_read(source, expected):
    assert expected in error_of("tiny_base", f"data.sources=[{{{source}}}]")


def test_derived_texts_are_a_source_beside_their_origin_with_a_name_and_a_share():
    added = "data.sources+={facts: both_orders, derive: identity_bridge, token_share: 0.2}"
    recipe = load_recipe("tiny_base", [added])
    assert recipe.data.source_names == ["facts_both_orders", "facts_both_orders_identity_bridge"]


@pytest.mark.parametrize("other", ["store: x", "files: [x]", "facts: all"])
def test_sampled_text_is_a_kind_of_source_and_has_none_of_another_kind_s_keys(other):
    assert "exactly one of" in error_of("tiny_base", f"data.sources=[{{sampled: 10, {other}}}]")
    assert "a store has what" in error_of("tiny_base", "data.sources=[{sampled: 10, add_bos: false}]")
    assert "set how 'files' are read" in error_of("tiny_base", "data.sources=[{sampled: 10, text_by: file}]")


@pytest.mark.parametrize("kind", ["store: other", "tokens: 5000"])
def test_replay_is_one_more_source_once_however_often_the_recipe_is_dumped(recipe_file, kind):
    recipe = load_recipe(recipe_file(TWO_SOURCES.replace("store: other", kind)))
    assert recipe.data.source_names == ["facts", "replay"]
    assert recipe.data.sources[1].token_share == 0.5
    again = recipe
    for number in range(2):
        again = load_recipe(recipe_file(dump_recipe(again), f"dumped{number}"), ["name=mine"])
        assert again == recipe


def test_the_key_on_is_a_word_in_files_and_in_overrides(recipe_file):
    """YAML 1.1 reads it as `true`."""
    path = recipe_file(TWO_SOURCES)
    assert load_recipe(path).retention.on == ["replay"]
    assert load_recipe(path, ["retention={kl: 2, on: [facts]}"]).retention.on == ["facts"]
    assert load_recipe(path, ["retention.on=[facts]"]).retention.on == ["facts"]


def test_one_line_adds_to_an_inherited_list(recipe_file):
    recipe_file(TWO_SOURCES, "base")
    entry = "{name: more, store: x, token_share: 0.1}"
    for written in (entry, f"[{entry}]", f"\n    - {entry}"):
        recipe = load_recipe(recipe_file(f"extends: base\ndata:\n  sources+: {written}\n"))
        assert recipe.data.source_names == ["facts", "more", "replay"]
    overridden = load_recipe(recipe_file(TWO_SOURCES), [f"data.sources+={entry}"])
    assert overridden.data.source_names == ["facts", "more", "replay"]


def test_a_mistake_in_what_is_added_is_named_where_it_was_written(recipe_file):
    recipe_file(TWO_SOURCES, "base")
    added = "extends: base\ndata:\n  sources+:\n    - store: x\n    - stroe: y\n"
    assert "mine.yaml:5: data.sources.2.stroe: unknown key (did you mean 'store'?)" in error_of(
        recipe_file(added)
    )
    message = error_of(recipe_file("extends: base\ndata:\n  sorces+: [{store: x}]\n"))
    assert "mine.yaml:3: data.sorces+: it adds to a list, and there is no list 'data.sorces'" in message
    assert "there is no list 'training.steps'" in error_of(recipe_file(TWO_SOURCES), "training.steps+=3")


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("{kind: txt, name: a, file: a}", "questions, text, held_out (found 'txt') (did you mean 'text'?)"),
        ("{kind: text, name: a}", "evaluation.tasks.0: give exactly one of 'file' and 'store'"),
        (
            "{name: a, file: a, stop_if_above: 0.5}",
            "evaluation.tasks.0.stop_if_above: must be greater than 1",
        ),
    ],
)
def test_a_mistake_in_a_text_that_is_watched_is_told_once(task, expected):
    message = error_of("tiny_base", f"evaluation.tasks=[{task}]")
    assert expected in message
    assert len(message.splitlines()) == 1
