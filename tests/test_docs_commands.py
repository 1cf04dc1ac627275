"""Every command line of README, docs/ and the helps is one that its command takes, and what shows something here does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from bico_ds.__main__ import COMMANDS
from bico_ds.common.errors import UserError
from bico_ds.config.load import list_recipes, load_recipe
from tests import ROOT
from tests.test_docs import BENCHMARKS, EXAMPLES, READERS_PAGES, by_name

PAGES = [ROOT / "README.md", *READERS_PAGES]
COMMAND = re.compile(
    r"(?:launch|tools)/(?!bench/)[\w/]+\.py|bico-ds [a-z][\w-]*|-m bico_ds [a-z][\w-]*|bico_ds\.commands\.\w+(?:\.\w+)?"
)
INCOMPLETE = re.compile(r"error: (?:the following arguments are|--recipe is) required")
# What stands for a user's own, where the parser wants a number or a folder that is there.
PLACEHOLDERS = {"N": "1", "K": "0", "M": "1", "P": "2.5", "LIMIT": "60", "FEATURES": "h100"}


@dataclass(frozen=True)
class Line:
    """A command line of `where`: the command's module in `bico_ds.commands`, and the words after it.

    `is_mentioned` in a sentence or table, where what it needs besides may be left out; else it stands to be copied.
    """

    where: str
    module: str
    words: tuple[str, ...]
    is_mentioned: bool

    def __str__(self) -> str:
        return f"{self.where}: {self.module} {shlex.join(self.words)}"


def lines_of(page: Path) -> Iterator[Line]:
    content = page.read_text(encoding="utf-8").replace("\\\n", " ")
    variables = dict(re.findall(r'^([A-Z]+)="(.*)"', content, re.MULTILINE))
    parts = re.split(r"^ *```.*$", content, flags=re.MULTILINE)
    for number, part in enumerate(parts):
        blocks = part.splitlines() if number % 2 else re.findall(r"`([^`]+)`", part)
        for text in blocks:
            text = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[1]), text)
            yield from lines_in(" ".join(text.split()), by_name(page), is_mentioned=number % 2 == 0)


def lines_of_help(module: str) -> Iterator[Line]:
    description = import_module(f"bico_ds.commands.{module}").main.description
    for line in description.replace("\\\n", " ").splitlines():
        if line.startswith("    "):  # examples; two spaces part them from what they do
            yield from lines_in(re.split(r"(?<=\S) {2,}", line.strip())[0], module, is_mentioned=True)


def lines_in(text: str, where: str, *, is_mentioned: bool) -> Iterator[Line]:
    found = COMMAND.search(text)
    if found is None:
        return
    rest = re.split(r" (?:--[\w-]+ )?(?:…|\.\.\.)|; done", text[found.end() :])[0]
    words = shlex.split(rest, comments=True)
    if words or not is_mentioned:
        yield Line(
            where, module_of(found[0]), tuple(PLACEHOLDERS.get(word, word) for word in words), is_mentioned
        )


def module_of(command: str) -> str:
    if command.startswith("bico_ds."):
        return command.removeprefix("bico_ds.commands.")
    if command.endswith(".py"):
        starts = re.search(
            r"from bico_ds\.commands\.([\w.]+) import main", (ROOT / command).read_text(encoding="utf-8")
        )
        assert starts is not None, command
        return starts[1]
    return COMMANDS[command.split()[-1]]


LINES = list(dict.fromkeys(line for page in [*PAGES, *BENCHMARKS, *EXAMPLES] for line in lines_of(page)))
HELPS = list(dict.fromkeys(line for module in COMMANDS.values() for line in lines_of_help(module)))
OVERRIDE = re.compile(r"`[^`]*?--set ('[^']+'|[^\s`]+)[^`]*`")


def test_the_lines_are_found():
    """The pages have about fifty, and those of README stand for all kinds: blocks, tables, launchers, comments."""
    assert len(LINES) > 40
    assert len(HELPS) > 20
    found = {(line.module, line.words[:2]) for line in LINES if line.where == "README.md"}
    assert {
        ("train", ("--list-recipes",)),
        ("train", ("--recipe", "llama70b_bico")),
        ("slurm.submit", ("--help",)),
        ("export", ("RUN", "OUT")),
        ("show.inspect_batch", ("--recipe", "tiny_bico")),
    } <= found


@pytest.mark.parametrize("line", [*LINES, *HELPS], ids=str)
def test_a_command_takes_its_line(line, capsys):
    main = import_module(f"bico_ds.commands.{line.module}").main
    try:
        options = main.parse(line.words)
    except SystemExit as ended:
        if ended.code and not (line.is_mentioned and INCOMPLETE.search(capsys.readouterr().err)):
            pytest.fail(f"{line}: not what the command takes")
        return
    names = getattr(options, "recipe", None)
    for name in [names] if isinstance(names, str) else names or []:
        if name in list_recipes():  # else a user's own
            assert load_recipe(name, options.overrides)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_what_a_page_sets_is_a_key_of_some_recipe(page):
    named = {shlex.split(text)[0] for text in OVERRIDE.findall(page.read_text(encoding="utf-8"))}
    named = {override for override in named if "=" in override and not re.match(r"[A-Z]|.*…$", override)}
    wrong = [override for override in named if not fits_some_recipe(override)]
    assert not wrong


def fits_some_recipe(override: str) -> bool:
    override = re.sub(r"=(?:FOLDER|PATH|MODEL|DIR)$", "=/models/mine", override)
    for name in (
        "tiny_bico",
        "llama70b_bico",
        "llama3_8b_bico_lora",
        "smollm2_135m_bico_keep",
        "tiny_masked_ft",
    ):
        if name in list_recipes():
            try:
                load_recipe(name, [override])
            except UserError:
                continue
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_target_of_make_exists(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert not named - targets


# Each in one page: most stand in several.
ONCE = {(line.module, line.words): line for line in reversed(LINES)}.values()
SHOWS = {
    "plan": (),
    "slurm.status": (),
    "slurm.submit": ("--dry-run",),
    "show.inspect_batch": ("--set", "data.cache_dir=CACHE"),
}


def shown_by(line: Line, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the line, where the user has nothing: no weights, no data, no runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    words = [word.replace("CACHE", str(tmp_path / "cache")) for word in (*line.words, *more)]
    words = ["tiny_bico" if word == "NAME" else word for word in words]
    return import_module(f"bico_ds.commands.{line.module}").main(words)


@pytest.mark.parametrize(
    "line", [line for line in ONCE if line.module in SHOWS and "--help" not in line.words], ids=str
)
def test_what_only_shows_something_shows_it_without_weights_and_data(line, tmp_path, monkeypatch, capsys):
    assert shown_by(line, SHOWS[line.module], tmp_path, monkeypatch) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [line for line in ONCE if line.module == "train" and "--dry-run" in line.words], ids=str
)
def test_a_dry_run_of_the_pages_needs_no_weights(line, tmp_path, monkeypatch, capsys):
    assert shown_by(line, ("--set", "data.cache_dir=CACHE"), tmp_path, monkeypatch) == 0, (
        capsys.readouterr().err
    )
    assert "what would run" in capsys.readouterr().out
