"""Generic English text for replay: Debian's documentation packages as one JSONL file, a line {"text"} per page.

    python tools/bench/debian_text.py --output text/debian
    python tools/prepare_data.py files text/debian/pages.jsonl --tokenizer MODEL --output stores/debian

The folder also gets prose.txt, the beginning of Bierce's Devil's Dictionary: a text of another kind, to measure forgetting
on. It is not among the pages.

It needs apt-get and dpkg-deb, and whatever mirror apt is set up for; not root. Where the mirror has other versions than the
pinned ones by now, the checksums say so and nothing is written: `--any-version` takes them, and the figures of
docs/benchmarks/results.md are then not repeated exactly.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_folder
from bico_ds.config.arguments import local_path


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package, the SHA-256 of its file, the folder of its English HTML pages, and its licence."""

    version: str
    sha256: str
    pages: str
    licence: str


PACKAGES = {
    "debian-handbook": Package(
        version="11.20220922",
        sha256="3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        pages="usr/share/doc/debian-handbook/html/en-US",
        licence="GPL-2.0-or-later or CC-BY-SA-3.0",
    ),
    "debian-policy": Package(
        version="4.6.2.0",
        sha256="ef9d01b625c3b87c3a845c2cd1b66f1a16e9240b2b9e5bee53472a00e8457a39",
        pages="usr/share/doc/debian-policy/policy.html",
        licence="GPL-2.0-or-later",
    ),
    "debian-reference-en": Package(
        version="2.100",
        sha256="9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
        pages="usr/share/debian-reference",
        licence="GPL-2.0-or-later",
    ),
    "developers-reference": Package(
        version="12.18",
        sha256="0dba82f6fa16e373f2a84ad07e7971aa9264ad2e7d2ae46b37edbc9c5fd57e2e",
        pages="usr/share/developers-reference",
        licence="GPL-2.0-only",
    ),
}

PROSE = Package(
    version="1.0-13.1",
    sha256="6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
    pages="usr/share/dictd",
    licence="public domain",
)
# From the first entry on; what comes before is about the file.
_PROSE_BEGINS, _PROSE_CHARACTERS = "ABASEMENT", 120_000

# One page of these repeats all others, or holds no sentences.
_NO_PAGES = ("developers-reference.html", "index.html", "search.html", "genindex.html")
_BLOCKS = ("p", "pre", "h1", "h2", "h3", "h4", "dt")
_NAVIGATION = ("docnav", "navheader", "navfooter", "toc", "sphinxsidebar", "related", "footer", "headerlink")


class PageText(HTMLParser):
    """The paragraphs, headings and listings of a page, in order, without its navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        # Of each open element: its tag, whether it is hidden, whether it is a paragraph.
        self._open: list[tuple[str, bool, bool]] = []
        self._pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("br", "img", "hr", "link", "meta", "input", "col"):
            return
        words = " ".join(value or "" for name, value in attrs if name in ("class", "id")).split()
        hidden = tag in ("script", "style", "head") or any(word in _NAVIGATION for word in words)
        # The handbook's paragraphs are divisions.
        is_block = tag in _BLOCKS or "para" in words
        if is_block:
            self._end_paragraph(tag)
        self._open.append((tag, hidden, is_block))

    def handle_endtag(self, tag: str) -> None:
        if tag not in (name for name, _, _ in self._open):
            return
        closed = self._open.pop()
        while closed[0] != tag:
            closed = self._open.pop()
        if closed[2]:
            self._end_paragraph(tag)

    def handle_data(self, data: str) -> None:
        is_hidden = any(hidden for _, hidden, _ in self._open)
        if not is_hidden and any(is_block for _, _, is_block in self._open):
            self._pieces.append(data)

    def _end_paragraph(self, tag: str) -> None:
        text, self._pieces = "".join(self._pieces), []
        text = text.strip("\n") if tag == "pre" else " ".join(text.split())
        if text:
            self.paragraphs.append(text)


def pages_of(folder: Path) -> Iterator[str]:
    """Yield the text of each page in a package's folder, in the order of their names."""
    for path in sorted(folder.glob("*.html")):
        language = path.name.split(".")[-2]
        if path.name in _NO_PAGES or (len(language) == 2 and language != "en"):
            continue
        parser = PageText()
        parser.feed(path.read_text(encoding="utf-8"))
        text = "\n".join(parser.paragraphs)
        if len(text) > 500:
            yield text


def download(name: str, package: Package, folder: Path, *, any_version: bool) -> Path:
    """Download a package by apt and unpack it. Raises `UserError` where that fails or the file is another one."""
    _run(["apt-get", "download", name], folder)
    (file,) = folder.glob(f"{name}_*.deb")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256 and not any_version:
        raise UserError(
            f"{name}: apt gave {file.name}, which is not version {package.version} with the checksum pinned here; "
            "--any-version takes it"
        )
    unpacked = folder / name
    _run(["dpkg-deb", "-x", str(file), str(unpacked)], folder)
    return unpacked / package.pages


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on this machine: this needs a Debian or a derivative") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"{' '.join(command)} failed: {error.stderr.strip()[-500:]}") from None


def write_pages(options: Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary, atomic_folder(options.output) as output:
        characters = 0
        with open(output / "pages.jsonl", "w", encoding="utf-8") as file:
            for name, package in PACKAGES.items():
                folder = download(name, package, Path(temporary), any_version=options.any_version)
                for text in pages_of(folder):
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    characters += len(text)
        folder = download("dict-devil", PROSE, Path(temporary), any_version=options.any_version)
        prose = gzip.decompress((folder / "devil.dict.dz").read_bytes()).decode("utf-8", "replace")
        begin = prose.index(_PROSE_BEGINS)
        (output / "prose.txt").write_text(prose[begin : begin + _PROSE_CHARACTERS], encoding="utf-8")
        packages = {**PACKAGES, "dict-devil": PROSE}
        lines = [f"{name} {package.version}, Debian, {package.licence}" for name, package in packages.items()]
        (output / "SOURCES").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{options.output / 'pages.jsonl'}: {characters:,} characters")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--output", metavar="DIR", type=local_path, required=True, help="the folder to write; must be new"
    )
    parser.add_argument(
        "--any-version", action="store_true", help="take whatever versions the mirror has now"
    )


main = Command(description=__doc__, add_options=add_options, run=write_pages)


if __name__ == "__main__":
    main.start()
