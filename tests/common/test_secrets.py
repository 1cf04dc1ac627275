"""What is left out of recipes, command lines and messages as a secret, and what ordinary words stay as they are."""

from __future__ import annotations

import random

import pytest

from bico_ds.common.secrets import (
    LEFT_OUT,
    left_out_keys,
    secret_keys,
    text_without_secrets,
    without_secrets,
    word_without_secrets,
    words_without_secrets,
)
from bico_ds.config.load import list_recipes, load_recipe
from tests.cpu_time import cpu_seconds_below

# A part of each secret below.
KEPT_BY_NOBODY = "s3cr3tvalue"

SECRET_WORDS = [
    "secret_key=s3cr3tvalue",
    "AWS_SECRET_ACCESS_KEY=s3cr3tvalue",
    "api-key=s3cr3tvalue",
    "apiKey=s3cr3tvalue",
    "clientSecret=s3cr3tvalue",
    "tokens=s3cr3tvalue",
    "tokens=[s3cr3tvalue, b]",
    "HF_TOKEN=s3cr3tvalue",
    "OPENAI_KEY=s3cr3tvalue",
    "PGPASSWORD=s3cr3tvalue",
    "DB_PASS=s3cr3tvalue",
    "MYSQL_PWD=s3cr3tvalue",
    "hub.password=s3cr3tvalue and more of it",
    "hub.secrets.database=s3cr3tvalue",
    "hub.tokens.read=s3cr3tvalue",
    "hf_token={value: s3cr3tvalue}",
    "HFTOKEN=s3cr3tvalue",
    "authkey=s3cr3tvalue",
    "creds=s3cr3tvalue",
    "pass-word=s3cr3tvalue",
    "//user:s3cr3tvalue@host/path",
    "--api-key=s3cr3tvalue",
    "--set=hub.api_key=s3cr3tvalue",
    "--sbatch=--export=ALL,HF_TOKEN=s3cr3tvalue",
    "a={b: {password: s3cr3tvalue and more, c: 1}}",
    "a={b: {password: 's3cr3tvalue, and more'}}",
    "a=[{b: 1}, {hf_token: s3cr3tvalue}]",
    "a={passwords: [x, s3cr3tvalue]}",
    '{"password": "s3cr3tvalue"}',
    '{\\"api_key\\": \\"s3cr3tvalue\\"}',
    "Server=x;AccountKey=s3cr3tvalue;b=1",
    "https://user:s3cr3tvalue@host/path",
    "https://user:p@s3cr3tvalue@host/path",
    "model.path=https://user:s3cr3tvalue@host/path",
    "redis://:s3cr3tvalue@host:6379",
    "https://s3cr3tvalue@github.com/x",
    "https://host/x?a=1&access_token=s3cr3tvalue&b=2",
    "https://host/x?key=s3cr3tvalue",
    "https://host/x?X-Amz-Signature=s3cr3tvalue",
    "Authorization: Bearer s3cr3tvalue",
    "X-Api-Key: s3cr3tvalue",
    "export WANDB_API_KEY=s3cr3tvalue",
    "wandb_key=0123456789abcdef0123456789abcdef0123s3cr3tvalue",
]

# Known by their own shape, after whatever name; built here, so that no scanner of repositories takes them for real ones.
SHAPES = {
    "hf": "hf_" + "aBcD" * 8,
    "openai": "sk-" + "aBc1" * 8,
    "openai project": "sk-proj-" + "aB_1" * 8,
    "github": "ghp_" + "aBc1" * 9,
    "github fine": "github_pat_" + "aBc1_" * 9,
    "aws": "AKIA" + "ABCD" * 4,
    "google": "AIza" + "aB-1" * 8,
    "jwt": "eyJ" + "hbGciOi." + "eyJ" + "zdWIi.aB-1",
    "slack": "xoxb-" + "1234-abcd-" * 3,
    "gitlab": "glpat-" + "aBc1" * 5,
    "replicate": "r8_" + "aBc1" * 9,
    "xai": "xai-" + "aBc1" * 20,
    "bearer": "Bearer " + "aBc1" * 5,
    "pem": "-----BEGIN RSA PRIVATE KEY-----\nabcd\nefgh\n-----END RSA PRIVATE KEY-----",
    "cut pem": "-----BEGIN PRIVATE KEY-----\nabcd",
    "password": "ftp://user:aBcD@host",
}

ORDINARY_WORDS = [
    "tokenizer=abc",
    "model.tokenizer=meta-llama/Llama-2-7b",
    "keys=[a, b]",
    "monkey=abc",
    "tokens_per_second=abc",
    "replay.tokens=1000000",
    "replay.tokens=1_000_000",
    "replay.tokens=1e6",
    "replay={tokens: 1000000, weight: 2}",
    "--tokens=64",
    "mask.rate=0.3",
    "mask.unit=token",
    "objectives.1.mask.rate=[0.2, 0.6]",
    "key_padding=abc",
    "text_key=prompt",
    "pad_token=<pad>",
    "mask_token=[MASK]",
    "bos_token_id=1",
    "eos_token_id=[1, 2]",
    "password=null",
    "password=${PASSWORD}",
    "api_key=$API_KEY",
    "https://host:8080/a@b",
    "https://host/x?page=2",
    "https://git@github.com/owner/name",
    "git@github.com:owner/name",
    "docker://image:latest@sha256:0123",
    "data.sources=[{store: stores/mine}]",
    "deepspeed.overrides={zero_optimization: {stage: 2}}",
    "task-abcdefghijklmnopqrstuvwx",
    "hf_transformers",
    "sk-learn-pipeline",
    "author=Ann",
    "passes=3",
    "0123456789abcdef0123456789abcdef01234567",
]


@pytest.mark.parametrize("word", SECRET_WORDS)
def test_a_secret_is_left_out_of_a_word_and_nothing_else_with_it(word):
    kept = word_without_secrets(word)
    assert KEPT_BY_NOBODY not in kept
    assert LEFT_OUT in kept
    assert kept.startswith(word[: word.index("s3cr3t")].rpartition("=")[0][:4])
    assert word_without_secrets(kept) == kept


@pytest.mark.parametrize("secret", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("around", ["{}", "a={}", "a={{b: [{}]}}", "cannot read '{}': no such file"])
def test_a_secret_is_known_by_its_shape_whatever_stands_before_it(secret, around):
    text = around.format(secret)
    for kept in (
        word_without_secrets(text),
        text_without_secrets(text),
        without_secrets({"a": [text]})["a"][0],
    ):
        assert LEFT_OUT in kept
        assert not [part for part in ("aBc", "abcd", "ABCD", "1234") if part in kept]


@pytest.mark.parametrize("word", ORDINARY_WORDS)
def test_an_ordinary_word_stays_as_it_is(word):
    assert word_without_secrets(word) == word
    assert text_without_secrets(word) == word


def test_the_word_after_an_option_that_is_named_like_a_secret_is_one():
    words = [
        "x.py",
        "--api-key",
        "abc",
        "--tokens",
        "64",
        "--token",
        "-abc",
        "--set",
        "a.password=abc",
        "--recipe",
        "y",
    ]
    left_out = ["--api-key", LEFT_OUT, "--tokens", "64", "--token", LEFT_OUT]
    assert words_without_secrets(words) == [
        "x.py",
        *left_out,
        "--set",
        f"a.password={LEFT_OUT}",
        "--recipe",
        "y",
    ]


def test_nested_mappings_and_lists_keep_their_form():
    tree = {
        "password": 12345,
        "credentials": {"user": "me", "ids": [1, "b"], "on": True},
        "tokens": 1_000_000,
        "hub": [{"token": "abc"}, {"url": "s3://me:abc@host/x", "rate": 0.5, "none": None}],
        "token": None,
        "bos_token": "<s>",
        "HF_TOKEN": {"of": [{"reader": "abc", "limit": 3}]},
    }
    assert without_secrets(tree) == tree | {
        "password": LEFT_OUT,
        "credentials": {"user": LEFT_OUT, "ids": [LEFT_OUT, LEFT_OUT], "on": True},
        "hub": [{"token": LEFT_OUT}, {"url": f"s3://me:{LEFT_OUT}@host/x", "rate": 0.5, "none": None}],
        "HF_TOKEN": {"of": [{"reader": LEFT_OUT, "limit": 3}]},
    }
    found = [
        "password",
        "credentials.user",
        "credentials.ids.0",
        "credentials.ids.1",
        "hub.0.token",
        "hub.1.url",
        "HF_TOKEN.of.0.reader",
    ]
    assert list(secret_keys(tree)) == found
    assert [".".join(map(str, key)) for key in left_out_keys(without_secrets(tree))] == found


@pytest.mark.parametrize("name", list_recipes())
def test_no_shipped_recipe_has_a_key_that_is_taken_for_a_secret(name):
    assert list(secret_keys(load_recipe(name).model_dump(mode="json"))) == []


def test_messages_for_people_stay_whole():
    for text in (
        "recipe.yaml:3: model.token: this key is required",
        "tokens: must be at least 1, found 0",
        "password: unknown key; known keys here: name",
        "set model.attention_backend=auto",
    ):
        assert text_without_secrets(text) == text


def test_no_text_takes_long_or_is_changed_by_a_second_time():
    parts = [
        "token=[",
        "https://",
        "://a:",
        "password: ",
        "sk-",
        "a-",
        "\\",
        '"',
        "'",
        "{",
        "]",
        "=",
        "eyJ.",
        "a",
        " ",
        "@",
        ")",
    ]
    texts = [part * (5_000 // len(part)) for part in parts]
    texts += ["".join(random.choices(parts, k=60)) for _ in range(200)]
    for text in texts:
        for function in (text_without_secrets, word_without_secrets):
            with cpu_seconds_below(1, text):
                kept = function(text)
            assert function(kept) == kept
