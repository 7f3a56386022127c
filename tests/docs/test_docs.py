"""The code of the documentation runs and prints the shown output, and every link has a target.

The tests follow a page as a reader does: from top to bottom, in an empty folder.
"""

import os
import re
import shlex
import shutil
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

# The blocks of this page share one session. On all other pages, each block runs by itself.
SESSION = "docs/tutorial.md"

# Commands that take minutes or a compiler, and the file that runs them.
RUN_BY = {
    r"python3 -m venv .*": ".ci/run",
    r"pytest --numprocesses .*": ".ci/run",
    r"python examples/(?P<script>\w+\.py)": "tests/docs/test_examples.py",
    r"cc .*/(?P<script>\w+\.c) .*": "tests/conformance/test_vectors.py",
}
FOLLOWED_BY = {"docs/extending.md": "tests/conformance/test_extending.py"}


class Block(NamedTuple):
    """A fenced block of a page, and the number of lines before its code."""

    language: str
    line: int
    code: str

    @property
    def file(self):
        """The file name in its first line, such as ``# plain.py``, or None."""
        match = re.match(r"# (\w+\.py)\n", self.code)
        return match and match[1]

    @property
    def commands(self):
        """The shell commands of the block, each with the output that the page shows, or None."""
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
def test_names_a_known_language_for_every_block(page):
    languages = {block.language for block in BLOCKS[page] if block.language[:1] != "{"}
    assert languages <= {"python", "console", "sh", "toml", "text", ""}


WITH_CODE = [
    page
    for page, blocks in BLOCKS.items()
    if any(block.language == "python" or block.commands for block in blocks)
]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")
@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch's exporter itself
def test_runs_the_code_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    scripts = {command for block in BLOCKS[page] for command, _ in block.commands}
    for block in BLOCKS[page]:
        if page not in FOLLOWED_BY:
            for command, printed in block.commands:
                run_command(command, printed)
        if block.language != "python":
            continue
        if block.file:
            Path(block.file).write_text(block.code, encoding="utf-8")
        if f"python {block.file}" in scripts:
            continue
        if page != SESSION or not names:
            # Dynamo looks up functions in their module, so the block needs a module name.
            names = {"__name__": "a_page_of_the_documentation"}
        # The empty lines let a traceback show the line of the page.
        exec(compile("\n" * block.line + block.code, ROOT / page, "exec"), names)


def run_command(command, printed):
    """Run a command of a page: it succeeds, and prints the output that the page shows."""
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


def test_runs_the_commands_of_other_pages_elsewhere():
    for page, test in FOLLOWED_BY.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
if [ "$*" = "-m venv .venv" ]; then mkdir -p .venv/bin && touch .venv/bin/activate; fi
[ "$*" != "$FAILS" ]
"""


@pytest.fixture
def run_ci(tmp_path):
    """Run ``.ci/run`` in a clone where all programs do nothing, and return what it calls."""
    clone, programs = tmp_path / "clone", tmp_path / "programs"
    (clone / ".ci").mkdir(parents=True)
    programs.mkdir()
    for name in ("python3", "python", "pip", "unidrop", "pytest", "ruff", "mypy"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci" / "run")

    def run_ci(readme=TEXTS["README.md"], fails="nothing"):
        (clone / "README.md").write_text(readme, encoding="utf-8")
        log = tmp_path / "log"
        log.write_text("")
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "LOG": str(log), "FAILS": fails}
        done = subprocess.run([clone / ".ci" / "run"], env=environment, capture_output=True)
        return done.returncode, log.read_text().splitlines(), done.stderr.decode()

    return run_ci


def test_runs_the_readme_commands_in_ci(run_ci, tmp_path):
    code, calls, errors = run_ci()
    assert (code, errors) == (0, "")
    expected = ["python3 -m venv .venv", "pip install --constraint constraints.txt .[test]"]
    expected += ["unidrop conformance", "pytest --numprocesses auto --dist loadfile"]
    assert calls[:4] == expected
    linters = {"ruff check .", "python tools/lint_prose.py", "pytest tests/docs/test_site.py"}
    assert linters <= set(calls)
    assert not (tmp_path / "clone" / ".venv").exists()
    other = TEXTS["README.md"].replace("unidrop conformance\n", "unidrop conformance --jobs 3\n")
    assert "unidrop conformance --jobs 3" in run_ci(other)[1]


@pytest.mark.parametrize("command", ["conformance", "--numprocesses auto --dist loadfile"])
def test_fails_ci_if_a_readme_command_fails(run_ci, command):
    code, calls, _ = run_ci(fails=command)
    assert code == 1
    assert calls[-1].endswith(command)


@pytest.mark.parametrize("block", ["python3 -m venv", "pytest --numprocesses"])
def test_fails_ci_if_the_readme_lacks_a_command(run_ci, block):
    code, calls, errors = run_ci(TEXTS["README.md"].replace(f"```sh\n{block}", "```sh\n"))
    assert (code, calls) == (1, [])
    assert "README.md must begin with" in errors


def test_keeps_an_environment_that_ci_did_not_make(run_ci, tmp_path):
    environment = tmp_path / "clone" / ".venv"
    environment.mkdir()
    code, calls, errors = run_ci()
    assert (code, calls) == (1, [])
    assert ".venv exists" in errors
    assert environment.exists()


def test_installs_only_extras_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r'"\.\[([\w,]+)\]"', "\n".join(TEXTS.values()))
    assert named
    assert set(",".join(named).split(",")) <= set(project["optional-dependencies"])


IN_THIS_PROCESS = ["torch", "tensorflow", "keras", "jax", "flax"]


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_lists_every_mode_of_a_backend(name):
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
    """Yield the local targets of a page's links, outside of code."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "`", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)]*)\)", text):
        if not link.startswith("https://"):
            yield link


LINKS = [(page, link) for page in TEXTS for link in dict.fromkeys(get_links(page))]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_finds_the_target_of_a_link(page, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if anchor:
        assert anchor in get_slugs(str(target.resolve().relative_to(ROOT)))
