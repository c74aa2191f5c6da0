"""The docs site builds without a warning and without a network, and asks for nothing from outside."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import interp_models

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(
    r"""<(?:script|img|iframe|source|audio|video)\b[^>]*\ssrc\s*=\s*["']?(?:https?:)?//[^\s"'>]+"""
    r"""|<link\b(?=[^>]*\brel\s*=\s*["']?(?:stylesheet|preconnect|preload|icon))[^>]*\bhref\s*=\s*["']?(?:https?:)?//"""
    r"""|(?:url\(|@import)\s*["']?(?:https?:)?//[^\s"')]+""",
    re.IGNORECASE,
)
"""Scripts, styles, fonts and pictures of another host."""
NO_NETWORK = """
import socket, sys
def refused(self, address):
    raise OSError(f"the site must be built without a network; it asks for {address}")
socket.socket.connect = refused
from mkdocs.__main__ import cli
cli()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="mkdocs, mkdocs-material and mkdocstrings[python] build the site")
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-c", NO_NETWORK, "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in (*ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/**/*.ipynb")):
        place = page.relative_to(ROOT / "docs").with_suffix("")
        place = place.parent if place.name == "index" else place
        assert (site / place / "index.html").is_file(), page
    assert list(site.rglob("*.ipynb")) == list(site.rglob("*.py")) == []


def test_nothing_comes_from_outside(site: Path) -> None:
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert OUTSIDE.findall(path.read_text()) == [], path


@pytest.mark.parametrize(
    ("text", "outside"),
    [
        ('<script src="https://unpkg.com/a.js"></script>', True),
        ("<script src=//unpkg.com/a.js></script>", True),
        ('<link rel="stylesheet" href="https://fonts.googleapis.com/css">', True),
        ('<link href="https://fonts.gstatic.com" rel="preconnect">', True),
        ("@font-face{src:url(https://fonts.gstatic.com/a.woff2)}", True),
        ('<img alt="" src="http://example.org/a.png">', True),
        ('<script src="assets/a.js"></script><link rel="stylesheet" href="../a.css">', False),
        ('<img src="data:image/png;base64,AA==">', False),
        ('<a href="https://keepachangelog.com">a link that a reader may follow</a>', False),
    ],
)
def test_what_comes_from_outside_is_seen(text: str, outside: bool) -> None:
    assert bool(OUTSIDE.search(text)) is outside


def test_the_reference_has_every_public_name(site: Path) -> None:
    text = (site / "api" / "index.html").read_text()
    registries = {"DATASETS", "EXPLAINERS", "METRICS", "MODELS", "PROTOTYPE_METRICS"}
    for name in set(interp_models.__all__) - {"__version__"}:
        if name in registries:
            assert name in text
        else:
            assert re.search(rf'id="interp_models\.[\w.]*\.{name}"', text), f"{name} is not in the reference"


def test_the_navigation_has_every_page() -> None:
    def pages(item: object) -> list[str]:
        if isinstance(item, str):
            return [item]
        parts = item.values() if isinstance(item, dict) else item
        return [page for part in parts for page in pages(part)]  # type: ignore[attr-defined]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    there = [str(path.relative_to(ROOT / "docs").with_suffix(".md")) for path in ROOT.glob("docs/**/*.md")]
    there += [str(path.relative_to(ROOT / "docs").with_suffix(".md")) for path in ROOT.glob("docs/**/*.ipynb")]
    assert sorted(named) == sorted(there)
