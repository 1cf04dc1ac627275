"""Chat templates are programs of strangers: preparing ends soon, with one message, or writes what transformers writes."""

from __future__ import annotations

import gc
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from bico_ds.common.errors import UserError
from bico_ds.data import chat_rendering
from bico_ds.data.chat_rendering import ChatRenderer
from bico_ds.data.prepare.chats import ChatTemplate, template_begins_with_bos
from bico_ds.data.prepare.records import BadRecord
from bico_ds.data.tokenizer import FastTokenizer, load_tokenizer
from tests.cpu_time import cpu_seconds_below
from tests.data.prepare.ingesting import ingest_files, write_jsonl

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
_LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}%s{% endfor %}{% endfor %}"
_GROWS = "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
WITHOUT_END = {
    "silent loops": (_LOOPS.replace("%s", ""), "seconds of processor time"),
    "loops that write": (_LOOPS.replace("%s", "{{ 'x' }}"), "seconds of processor time"),
    "only in a chat with a reply": (
        "{% if messages|length > 1 %}" + _LOOPS.replace("%s", "") + "{% endif %}{{ messages[0].content }}",
        "seconds of processor time",
    ),
    "calls in calls": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "seconds of processor time",
    ),
    "numbers that grow": (_GROWS.replace("~", "*") + "{{ n.x > 1 }}", "seconds of processor time"),
    "texts that double": (_GROWS, "GiB of memory"),
    "a width": ("{{ 'x'|center(99999999999) }}", "GiB of memory"),
    "a long list": ("{{ [0] * 99999999999 }}", "GiB of memory"),
    "a power": ("{% set x = 9 %}{{ x**x**x**x**x }}", "raises a number to a power"),
    "a power of constants": ("{{ 10 ** 1000000000 }}", "raises a number to a power"),
    "a long text": ("{{ 'x' * 17000000 }}", "wrote 17,000,000 characters"),
}


def _tokenizer(source: str, folder: Path, template: str) -> FastTokenizer:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", WITHOUT_END)
def test_a_template_without_end_is_refused_by_one_message_that_names_it(
    name: str, tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_rendering, "MOST_SECONDS", 0.1 if "seconds" in WITHOUT_END[name][1] else 5)
    monkeypatch.setattr(chat_rendering, "_MOST_BYTES", 1 << 28)
    template, message = WITHOUT_END[name]
    tokenizer = _tokenizer(bpe_tokenizer, tmp_path / "t", template)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with cpu_seconds_below(5):
        for _ in range(2):  # nothing is left of the first time
            with pytest.raises(UserError) as caught:
                ChatTemplate(tokenizer).render(CHAT)
            assert message in str(caught.value) and str(tmp_path / "t") in str(caught.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_comes_again(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is raised in a callback of the garbage collector goes nowhere, and hypothesis has one."""
    for name in ("MOST_SECONDS", "_SECONDS_BETWEEN"):
        monkeypatch.setattr(chat_rendering, name, 0.1)

    def drops(*_: object) -> None:
        if signal.getitimer(signal.ITIMER_PROF)[0]:
            gc.callbacks.remove(drops)
            while True:
                pass

    template, message = WITHOUT_END["calls in calls"]
    renderer = ChatRenderer(_tokenizer(bpe_tokenizer, tmp_path / "t", template))
    thresholds = gc.get_threshold()
    gc.callbacks.append(drops)
    gc.set_threshold(50)
    with pytest.raises(UserError, match=message):
        renderer.write(CHAT)
    gc.set_threshold(*thresholds)
    assert drops not in gc.callbacks


def test_no_skipping_goes_on_with_such_a_template_and_nothing_is_written(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_rendering, "MOST_SECONDS", 0.1)
    _tokenizer(bpe_tokenizer, tmp_path / "t", WITHOUT_END["silent loops"][0])
    file = write_jsonl(tmp_path / "a.jsonl", [{"m": CHAT}] * 9)
    with pytest.raises(UserError, match="processor time for one chat"):
        ingest_files(file, str(tmp_path / "t"), tmp_path / "s", messages_field="m", on_error="skip")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.getcwd() }}", "unsafe"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_what_a_template_may_not_do_is_an_error_of_the_chat(
    template: str, message: str, tmp_path: Path, bpe_tokenizer: str
) -> None:
    with pytest.raises(BadRecord, match=message):
        ChatTemplate(_tokenizer(bpe_tokenizer, tmp_path / "t", template)).render(CHAT)
    assert template_begins_with_bos(load_tokenizer(tmp_path / "t"))  # no error, where it is only asked


def test_what_ends_is_written_as_transformers_writes_it(tmp_path: Path, bpe_tokenizer: str) -> None:
    harmless = (
        "{{ dict(**{'a': 2})['a'] * 3 }}{% for m in messages %}{{ '-' * 80 }}{{ m.content }} ** {% endfor %}"
    )
    tokenizer = _tokenizer(bpe_tokenizer, tmp_path / "t", harmless)
    chat: list[dict[str, Any]] = [{"role": "user", "content": "x" * 100_000}, *CHAT]
    assert ChatRenderer(tokenizer).write(chat) == tokenizer.apply_chat_template(chat, tokenize=False)
