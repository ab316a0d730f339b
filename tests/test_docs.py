"""What the pages name is there: other pages, their headings, files of the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "config" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEPT = ("benchmarks", "config", "docs", "envs", "neuromamba", "tests", "workflow")
"""Folders of the repository, of which a path in backticks names a file."""


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links them."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path):
    named = re.findall(rf"`((?:{'|'.join(KEPT)})/[\w./*-]+\.\w+)`", page.read_text())
    assert [name for name in named if not list(ROOT.glob(name))] == []


def test_every_page_can_be_reached_from_the_first():
    first = PAGES[0].read_text()
    assert [page.name for page in PAGES[1:] if f"{page.parent.name}/{page.name}" not in first] == []
