"""A browser that runs without a screen, and what axe-core says of a page in it."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIETLY = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=10000",  # ms that a page may take for its scripts, without waiting
)
DARK = ("--blink-settings=preferredColorScheme=0",)
AXE = ("axe_playwright_python", "axe_core_python")
"""Packages that bring `axe.min.js`, the newest first."""


def find_browser() -> str:
    """The browser's program; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser that runs without a screen ({', '.join(NAMES)})")
    return found


def find_axe() -> str:
    """The script of axe-core; the test is skipped where no package brings it."""
    for name in AXE:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).with_name("axe.min.js").read_text(encoding="utf-8")
    pytest.skip(f"no package brings axe-core (one of {', '.join(AXE)})")


class Browser:
    """Opens pages from files, each with a profile of its own folder."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder

    def run(self, page: Path, *options: str, fragment: str = "") -> str:
        command = [self.program, *QUIETLY, f"--user-data-dir={self.folder}/browser", *options]
        done = subprocess.run(
            [*command, page.resolve().as_uri() + fragment],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return done.stdout

    def ask(self, page: str, script: str, width: int = 1200, *options: str) -> Any:
        """The value, by way of JSON, of a JavaScript expression (or its promise) in a page.

        The page is put into a frame of that width, as windows have a least width of their own.
        """
        told = (
            "<script>addEventListener('load', () => setTimeout(async () => {"
            f"const found = await ({script});"
            "const told = parent.document.createElement('pre'); told.id = 'told';"
            "told.textContent = JSON.stringify(found); parent.document.body.append(told);"
            "}, 500))</script>"
        )
        framed = html.escape(page.replace("</body>", f"{told}</body>"))
        outer = self.folder / "outer.html"
        outer.write_text(
            f'<!doctype html><iframe width="{width}" height="900" srcdoc="{framed}"></iframe>',
            encoding="utf-8",
        )
        shown = self.run(outer, "--dump-dom", *options)
        found = re.search(r'<pre id="told">(.*?)</pre>', shown, re.DOTALL)
        assert found, "the page's script did not come to its end"
        return json.loads(html.unescape(found[1]))
