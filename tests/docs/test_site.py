"""Sphinx builds the site of docs/ without a warning, and the site needs no network.

Sphinx is in the extra `docs`, so CI runs this file last.
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

inventory = pytest.importorskip("sphinx.util.inventory", reason="needs the extra docs")

pytestmark = pytest.mark.slow  # Sphinx builds the whole site

DOCS = Path(__file__).parents[2] / "docs"
FRAMEWORKS = ("numpy", "torch", "tensorflow", "keras", "jax", "flax")
MODULES = [
    "unidrop",
    *(f"unidrop.adapters.{framework}" for framework in FRAMEWORKS),
    "unidrop.conformance",
    "unidrop.library",
    "unidrop.protocols",
    "unidrop.testing",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site with the command of CONTRIBUTING.md, and return its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_lists_every_public_name_of_a_module(site, name):
    found = inventory.InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    listed = {entry for kind, entries in found.items() if kind[:3] == "py:" for entry in entries}
    exported = {f"{name}.{public}" for public in importlib.import_module(name).__all__}
    assert exported <= listed


# The URLs that a browser loads with a page. Links that a reader may follow don't count.
LOADED = r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]*)|<link\b[^>]*\bhref=\"([^\"]*)"


def test_loads_no_file_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for page in pages:
        loaded = {a or b for a, b in re.findall(LOADED, page.read_text(encoding="utf-8"))}
        assert loaded
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", text), style
