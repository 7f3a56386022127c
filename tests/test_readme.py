"""Every block of code in the README and on the pages of docs/ runs, and prints what it says."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from unidrop.cli import main

ROOT = Path(__file__).parent.parent
PAGES = {
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in ("README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))))
}


def blocks(language, page="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


PYTHON = [
    pytest.param(page, block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks("python", page))
]


@pytest.mark.parametrize(("page", "block"), PYTHON)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")
def test_a_python_block_runs(page, block):
    # A module by name: PyTorch's compiler looks functions up in theirs.
    exec(compile(block, page, "exec"), {"__name__": "a_page_of_the_documentation"})


@pytest.mark.parametrize("block", blocks("console"))
def test_a_console_block_prints_what_it_shows(block):
    command, _, expected = block.removeprefix("$ unidrop ").partition("\n")
    assert CliRunner().invoke(main, shlex.split(command)).output == expected


def test_the_commands_are_those_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert '--constraint constraints.txt ".[test]"' in ci
    install, test = blocks("sh")[:2]
    assert '--constraint constraints.txt ".[test]"' in install
    assert "unidrop conformance" in install
    assert "\nunidrop conformance\n" in ci
    assert f"\n{test}" in ci


LINKS = [
    (page, link)
    for page, text in PAGES.items()
    for link in re.findall(r"\]\(([^)h#][^)]*)\)", text)
]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_what_a_page_links_to_exists(page, link):
    assert (ROOT / page).parent.joinpath(link.partition("#")[0]).exists()
