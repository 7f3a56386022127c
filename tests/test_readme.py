"""Every block of code in the README runs, and prints what it says."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from unidrop.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[0])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")
def test_a_python_block_runs(block):
    exec(compile(block, "README.md", "exec"), {})


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


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)h][^)]*)\)", README))
def test_what_the_readme_links_to_exists(link):
    assert (ROOT / link).exists()
