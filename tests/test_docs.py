"""The documentation points at things that exist, and each page is short and begins with what most readers want."""

from __future__ import annotations

import re
from argparse import SUPPRESS, ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import pytest

from bico_ds.__main__ import COMMANDS
from tests import ROOT

# Not read through, but looked into; written by `bico-ds explain --markdown`.
REFERENCE = ROOT / "docs" / "recipe.md"
READERS_PAGES = sorted((ROOT / "docs").glob("*.md"))
BENCHMARKS = sorted((ROOT / "docs" / "benchmarks").glob("*.md"))
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*/README.md"))
ROOT_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*ROOT_PAGES, *READERS_PAGES, *BENCHMARKS, *EXAMPLES]

MOST_WORDS = 2000
MOST_WORDS_IN_ALL = 12_000
FIRST_LINES = 3  # what most readers came for stands in so many lines, or in one command

# What begins with one of these is a path of the checkout; the rooms of bico_ds/ may stand without their package.
ROOTS = ("bico_ds", "docs", "ds_configs", "launch", "recipes", "tests", "tools")
FILE = re.compile(r"(?<![\w/.$}~-])((?:[\w-]+/)+[\w.-]+\.(?:py|cpp|md|json|yaml|sbatch|png|example))\b")
FOLDER = re.compile(rf"(?<![\w/.$}}~-])((?:{'|'.join(ROOTS)})/(?:[\w-]+/)*)(?=[`\s),;:]|$)", re.MULTILINE)
# Paths of a user: in a run folder, or of data and models.
ELSEWHERE = ("data/", "models/", "runs/", "stores/", "checkpoints/", "evaluation/", "logs/", "slurm/")

# A command of ours, and what is given to it on the same line.
COMMAND = re.compile(
    r"\b((?:launch|tools)/[\w/]+\.py|bico-ds [a-z][\w-]*|bico_ds\.commands\.\w+(?:\.\w+)?)([^\n`|#;]*)"
)


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def words(page: Path) -> int:
    """Words as a reader counts them: the strokes of tables are none."""
    return sum(any(c.isalnum() for c in word) for word in page.read_text(encoding="utf-8").split())


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(h) for h in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_link_and_picture_exists(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_anchor_of_a_link_is_a_heading(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    targets = [(page.parent / path if path else page, anchor) for path, anchor in links]
    missing = [f"{target.name}#{anchor}" for target, anchor in targets if anchor not in anchors(target)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_path_named_exists(page):
    text = re.sub(r"https?:\S+", "", page.read_text(encoding="utf-8"))
    paths = {path for path in FILE.findall(text) if not re.search(r"\b[A-Z]+\b", path)}
    paths -= {path for path in paths if path.startswith(ELSEWHERE) and not (ROOT / "bico_ds" / path).exists()}
    roots = (ROOT, ROOT / "bico_ds", page.parent)
    missing = [path for path in paths if not any((root / path).exists() for root in roots)]
    missing += [path for path in FOLDER.findall(text) if not (ROOT / path).is_dir()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_recipe_named_exists(page):
    text = page.read_text(encoding="utf-8")
    recipes = set(re.findall(r"--recipe ([a-z]\w*)\b(?![./])", text))
    assert not [name for name in recipes if not (ROOT / "recipes" / f"{name}.yaml").is_file()]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_option_of_our_commands_exists(page):
    assert not unknown_options(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", COMMANDS.values())
def test_every_option_in_the_examples_of_a_help_exists(module):
    description = import_module(f"bico_ds.commands.{module}").main.description
    assert not unknown_options(description)


def unknown_options(text: str) -> list[str]:
    """What a text gives to a command of ours that has no such option."""
    text = text.replace("\\\n", " ")
    return [
        f"{named.group(1)} {option}"
        for named in COMMAND.finditer(text)
        for option in re.findall(r"(?<!\S)\[?(--?[a-z][\w-]*)", named.group(2))
        if option not in options_of(named.group(1))
    ]


def options_of(command: str) -> set[str]:
    """The options in the help of `bico-ds NAME`, of a module of `bico_ds.commands`, or of a script.

    A script starts such a module, or has options of its own, or those of the scripts beside it that it imports.
    """
    if command.startswith("bico-ds "):
        module = COMMANDS[command.removeprefix("bico-ds ")]
    elif command.startswith("bico_ds."):
        module = command.removeprefix("bico_ds.commands.")
    else:
        source = (ROOT / command).read_text(encoding="utf-8")
        starts = re.search(r"from bico_ds\.commands\.([\w.]+) import main", source)
        if starts is None:
            beside = [
                (ROOT / command).parent / f"{name}.py"
                for name in re.findall(r"^from (\w+) import", source, re.M)
            ]
            sources = [source, *(path.read_text(encoding="utf-8") for path in beside if path.is_file())]
            return {"--help", *re.findall(r'"(--?[a-z][\w-]*)"', "\n".join(sources))}
        module = starts.group(1)
    parser = ArgumentParser()
    import_module(f"bico_ds.commands.{module}").main.add_options(parser)
    return set(options_in(parser))


def options_in(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings if action.help != SUPPRESS else ()
        if isinstance(action, _SubParsersAction):
            for part in action.choices.values():
                yield from options_in(part)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_command_of_the_package_exists(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^)bico-ds ([a-z][\w-]*)", text, re.MULTILINE))
    assert not named - {"help", *COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_no_placeholder_is_left(page):
    assert not re.search(r"@@|TODO|FIXME|^MEASURED$", page.read_text(encoding="utf-8"), re.MULTILINE)


READ_THROUGH = [page for page in READERS_PAGES if page != REFERENCE]


@pytest.mark.parametrize("page", READ_THROUGH, ids=by_name)
def test_a_page_can_be_read_in_one_sitting(page):
    assert words(page) <= MOST_WORDS


def test_all_pages_together_can_be_read_in_an_afternoon():
    assert sum(words(page) for page in [ROOT / "README.md", *READ_THROUGH]) <= MOST_WORDS_IN_ALL


@pytest.mark.parametrize("page", [*READERS_PAGES, *BENCHMARKS], ids=by_name)
def test_a_page_begins_with_what_most_readers_came_for(page):
    title, empty, *rest = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    assert title.startswith("# ") and not empty
    first = list(takewhile(bool, rest))
    lines = [line for line in first if not line.startswith("```")]
    assert first[0].startswith(("```", "- ")) and 1 <= len(lines) <= FIRST_LINES


@pytest.mark.parametrize("page", BENCHMARKS, ids=by_name)
def test_a_benchmark_begins_with_the_command_that_makes_it(page):
    command = page.read_text(encoding="utf-8").split("```")[1]
    assert re.search(r"\b(tools/|launch/|make |pytest )", command)


def test_the_map_of_the_rooms_names_each_room():
    rooms = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## The rooms")[1]
    packages = [p.parent for p in (ROOT / "bico_ds").glob("*/**/__init__.py")]
    names = [
        *(f"{package.name}/" for package in packages),
        *(p.name for p in (ROOT / "bico_ds").glob("[a-z]*.py")),
    ]
    assert not [name for name in names if not re.search(rf"(?<![\w/]){re.escape(name)}[\s:]", rooms)]


def test_the_map_says_where_a_thing_is_and_it_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = re.findall(r"`(bico_ds/[\w/]+\.py)`: `([\w.]+)`", text)
    assert found
    for file, name in found:
        source = (ROOT / file).read_text(encoding="utf-8")
        parts = name.split(".")
        assert all(re.search(rf"\b(?:def|class) {part}\b", source) for part in parts), f"{file}: {name}"


@pytest.mark.parametrize("folder", ["bico_ds", "launch", "recipes", "tests", "tools"])
def test_every_page_that_the_code_names_exists(folder):
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml", ".sbatch", ".cpp")]
    named = {
        (path.relative_to(ROOT), page)
        for path in files
        for page in re.findall(r"\bdocs/[\w/]+\.md", path.read_text(encoding="utf-8"))
    }
    assert not [(str(path), page) for path, page in named if not (ROOT / page).is_file()]


@pytest.mark.parametrize("page", ["gpu.md", "gpu_rehearsal.md"])
def test_a_published_proof_names_no_folder_of_the_machine_that_made_it(page):
    text = (ROOT / "docs" / "benchmarks" / page).read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w….])/[\w./-]+/(?:tools|bico_ds|launch)/[\w./-]+", text)
