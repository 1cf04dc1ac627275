"""A real browser for tests of what a person sees: Debian's chromium, headless, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Visit:
    """A page, with what went wrong in it and what it asked the network for while it was open.

    `errors`: exceptions of scripts and messages of the console's kind `error`. `requests`: addresses other than the page's
    own file and `data:`.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def visit(
    address: str | Path, *, width: int = 1400, height: int = 900, scheme: str = "light"
) -> Iterator[Visit]:
    """Open a page, at a URL or from a file; `scheme`: the colours that the reader prefers, "light" or "dark".

    The test is skipped where there is no chromium or no playwright.
    """
    browser_path = shutil.which("chromium")
    if browser_path is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    url = address.resolve().as_uri() if isinstance(address, Path) else address
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        seen = Visit(page)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda line: seen.errors.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(url)
        seen.requests[:] = [x for x in seen.requests if x != url and not x.startswith("data:")]
        yield seen
        browser.close()
