"""Retention texts of a run: their perplexity, and the limit on it."""

from __future__ import annotations

import math

import pytest

from bico_ds.config.sections.evaluation import TextTaskSpec
from bico_ds.evaluation.retention_texts import RetentionText, above_limit, measure
from bico_ds.evaluation.scoring.likelihood import encode_windows, text_perplexity
from bico_ds.evaluation.scoring.share import ONE_PROCESS

TEXT = " ".join(f"w{number * 7 % 40}" for number in range(50))


def test_the_perplexity_is_that_of_bico_ds_evaluate_and_is_compared_with_the_same_windows_alone(
    tiny_llama, tokenizer
):
    spec = TextTaskSpec(name="other", file="t.txt", window=9)
    text = RetentionText(spec=spec, windows=encode_windows(tokenizer, TEXT, window=9))
    expected = text_perplexity(tiny_llama, tokenizer, TEXT, window=9)
    found = measure(tiny_llama, [text], {}, ONE_PROCESS)["other"]
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert (found["tokens"], found["times"]) == (expected.tokens, None)
    half = {"other": {**found, "perplexity": found["perplexity"] / 2}}
    assert measure(tiny_llama, [text], half, ONE_PROCESS)["other"]["times"] == pytest.approx(2)
    changed = RetentionText(spec=spec, windows=text.windows[1:])
    assert measure(tiny_llama, [changed], half, ONE_PROCESS)["other"]["times"] is None


@pytest.mark.parametrize(
    ("times", "is_above"), [(1.5, False), (1.51, True), (math.nan, True), (math.inf, True), (None, False)]
)
def test_a_limit_holds_against_more_than_it_and_against_what_is_no_number(times, is_above):
    spec = TextTaskSpec(name="other", file="t.txt", stop_if_above=1.5)
    assert (above_limit({"other": {"times": times}}, [spec]) is not None) == is_above
