"""The documentation: its code does what it says, and its links lead somewhere.

A page is followed as its reader would, from top to bottom, in a folder of its own.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from unidrop.cli import main
from unidrop.conformance import load_backends

ROOT = Path(__file__).parents[2]


def markdown(*patterns):
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p))


PAGES = ["README.md", *markdown("docs/**/*.md")]
ALL = [*PAGES, *markdown("C*.md", "examples/**/*.md", "unidrop/**/*.md")]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in ALL}

# One session, of which a block goes on with the names of those before; elsewhere each stands alone.
SESSION = "docs/tutorial.md"

# Commands that take minutes or a compiler, and where they are run all the same.
RUN_BY = {
    r"python3 -m venv .*": ".ci/run",
    r"pytest --numprocesses .*": ".ci/run",
    r"python examples/(?P<script>\w+\.py)": "tests/test_examples.py",
    r"cc .*/(?P<script>\w+\.c) .*": "tests/test_vectors.py",
}
FOLLOWED_BY = {"docs/extending.md": "tests/test_extending.py"}


class Block(NamedTuple):
    """A fenced block of a page, and the number of lines before its code."""

    language: str
    line: int
    code: str

    @property
    def file(self):
        """The name of the file that its first line says it is, such as ``# plain.py``."""
        match = re.match(r"# (\w+\.py)\n", self.code)
        return match and match[1]

    @property
    def commands(self):
        """The commands of a block of the shell, each with what it prints, if that is shown."""
        if self.language == "sh":
            return [(re.sub(r" +# .*", "", line), None) for line in self.code.splitlines()]
        if self.language == "console":
            return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", self.code, flags=re.MULTILINE)
        return []


def get_blocks(page):
    fences = re.finditer(r"^```(\S*)\n(.*?)^```$", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    return [Block(f[1], TEXTS[page].count("\n", 0, f.start(2)), f[2]) for f in fences]


BLOCKS = {page: get_blocks(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_code_that_is_run_or_says_that_it_is_none(page):
    languages = {block.language for block in BLOCKS[page] if block.language[:1] != "{"}
    assert languages <= {"python", "console", "sh", "toml", "text", ""}


WITH_CODE = [
    page
    for page, blocks in BLOCKS.items()
    if any(block.language == "python" or block.commands for block in blocks)
]


@pytest.mark.parametrize("page", WITH_CODE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")
def test_the_code_of_a_page_does_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    scripts = {command for block in BLOCKS[page] for command, _ in block.commands}
    for block in BLOCKS[page]:
        if page not in FOLLOWED_BY:
            for command, printed in block.commands:
                follow(command, printed)
        if block.language != "python":
            continue
        if block.file:
            Path(block.file).write_text(block.code, encoding="utf-8")
        if f"python {block.file}" in scripts:
            continue
        if page != SESSION or not names:
            # A module by name: PyTorch's compiler looks functions up in theirs.
            names = {"__name__": "a_page_of_the_documentation"}
        # Below as many lines as on the page, so that an error is shown where it stands there.
        exec(compile("\n" * block.line + block.code, ROOT / page, "exec"), names)


def follow(command, printed):
    """Do what a page says to type: it ends well, or prints what is shown."""
    for pattern, path in RUN_BY.items():
        match = re.fullmatch(pattern, command)
        if match:
            assert match.groupdict().get("script", "") in (ROOT / path).read_text(encoding="utf-8")
            return
    program, *arguments = shlex.split(command)
    if program == "unidrop":
        done = CliRunner().invoke(main, arguments, prog_name="unidrop")
        code, output = done.exit_code, done.output
    else:
        code, output = run_process(program, arguments)
    if printed is None:
        assert code == 0, output
    else:
        assert re.sub(r" +$", "", output, flags=re.MULTILINE) == printed


def run_process(program, arguments):
    modules = {"python": [], "pytest": ["-m", "pytest"]}
    done = subprocess.run(
        [sys.executable, *modules[program], *arguments],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


def test_the_pages_that_are_followed_elsewhere_are():
    for page, test in FOLLOWED_BY.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


def test_the_commands_are_those_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert '--constraint constraints.txt ".[test]"' in ci
    install, test = [block.code for block in BLOCKS["README.md"] if block.language == "sh"][:2]
    assert '--constraint constraints.txt ".[test]"' in install
    assert "unidrop conformance" in install
    assert "\nunidrop conformance\n" in ci
    assert f"\n{test}" in ci


def test_the_extras_that_pages_install_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r'"\.\[([\w,]+)\]"', "\n".join(TEXTS.values()))
    assert named
    assert set(",".join(named).split(",")) <= set(project["optional-dependencies"])


IN_THIS_PROCESS = ["torch", "tensorflow", "keras", "jax", "flax"]


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_the_table_of_modes_has_every_mode_of_a_backend(name):
    rows, backend = {}, ""
    for first, modes in re.findall(
        r"^\| (`\S+` )?\| (`.*?) \|", TEXTS["docs/modes.md"], re.MULTILINE
    ):
        backend = first.strip("` ") or backend
        rows.setdefault(backend, []).extend(re.findall(r"`(.*?)`", modes))
    (loaded,) = load_backends([name])
    assert sorted(rows[name]) == sorted(set(loaded.modes) - {"eager", "fused"})


def get_slugs(page):
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def get_links(page):
    """Yield what a page links to on the machine, outside of code."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "`", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)]*)\)", text):
        if not link.startswith("https://"):
            yield link


LINKS = [(page, link) for page in TEXTS for link in dict.fromkeys(get_links(page))]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_to_a_file_and_a_heading_that_exist(page, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if anchor:
        assert anchor in get_slugs(str(target.resolve().relative_to(ROOT)))
