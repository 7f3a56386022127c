"""The reports of the matrix: terminal, page and files for other programs."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from xml.etree import ElementTree

import pytest
from rich.console import Console

from unidrop.conformance import BackendNotRun, NotApplicable, Result
from unidrop.conformance.reports import (
    Report,
    print_report,
    to_html,
    to_json,
    to_junit,
    to_markdown,
)
from unidrop.mask import STREAM_VERSION

HOSTILE = "</script><b>|&\"'\x1b[31m"


EXPLAINED = ("a mistake", "unidrop diff of it", "Traceback of it")


def result(contract, dtype, *what, mode="eager", status="passed"):
    return Result(contract, "mine", "cpu", dtype, mode, status, 0.25, *what)


@pytest.fixture
def report():
    return Report(
        [
            result("output", "float16"),
            result("output", "float32", "1.5", HOSTILE, *EXPLAINED, status="failed"),
            result("mask", "float32"),
            NotApplicable("layout", "mine", "eager", "it has no strides"),
            NotApplicable("output", "mine", "graph", f"not yet {HOSTILE}"),
            BackendNotRun("absent", "ModuleNotFoundError: no", "", is_missing=True),
            BackendNotRun("dead", f"it died {HOSTILE}", "where it died"),
        ]
    )


class Page(HTMLParser):
    """The cells, elements, scripts and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.tags, self.scripts, self.text = [], [], {}, []
        self._script = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        if tag == "td":
            self.cells.append(named["class"])
        if tag == "script":
            self._script = named.get("id", "")
            self.scripts[self._script] = ""
        for name in ("src", "href"):
            assert name not in named, "a self-contained page loads nothing"

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text.append(data)
        else:
            self.scripts[self._script] += data


def test_shows_a_cell_for_each_contract_and_column_on_page(report):
    page = Page(to_html(report))
    # mask, layout and output, in this order; eager and graph.
    assert page.cells == ["passed", "", "missing", "", "failed", "missing"]


def test_shows_evidence_of_each_cell_on_page(report):
    data = json.loads(Page(to_html(report)).scripts["data"])
    assert data["columns"] == [["mine", "eager"], ["mine", "graph"]]
    row = data["contracts"].index("output")
    passed, failed = data["evidence"][row][0]["results"]
    assert passed["status"] == "passed"
    evidence = dict(failed["evidence"])
    assert [evidence[name] for name in ("expected", "actual", "cause")] == [
        *("1.5", HOSTILE, "a mistake")
    ]
    assert failed["details"] == "Traceback of it"
    assert (
        "check('output', 'mine', device='cpu', dtype='float32', mode='eager')" in evidence["rerun"]
    )
    assert data["evidence"][row][1] == {"results": [], "reasons": [f"not yet {HOSTILE}"]}


def test_escapes_text_of_backends_on_page(report):
    page = Page(to_html(report))
    assert "b" not in page.tags
    assert page.tags.count("script") == 2
    assert f"it died {HOSTILE}" in "".join(page.text)


def test_fits_page_to_dark_screens_and_phones(report):
    text = to_html(report)
    assert "color-scheme: light dark" in text
    assert 'name="viewport" content="width=device-width' in text


def test_writes_everything_to_json(report):
    data = json.loads(to_json(report))
    assert [cell["status"] for cell in data["cells"]] == ["passed", "failed", "passed"]
    failed = data["cells"][1]
    assert failed["actual"] == HOSTILE
    assert (failed["cause"], failed["diff"], failed["details"]) == EXPLAINED
    assert "check('output'" in failed["reproduce"]
    assert "actual" not in data["cells"][0]
    assert data["missing"][0]["reason"] == "it has no strides"
    assert [backend["backend"] for backend in data["unavailable"]] == ["absent", "dead"]


def test_counts_cases_failures_errors_and_skips_in_junit(report):
    root = ElementTree.fromstring(to_junit(report))
    suites = {suite.get("name"): suite for suite in root}
    counts = {
        name: tuple(int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped"))
        for name, suite in suites.items()
    }
    assert counts == {
        "mine eager": (4, 1, 0, 1),
        "mine graph": (1, 0, 0, 1),
        "absent": (1, 0, 0, 1),
        "dead": (1, 0, 1, 0),
    }
    failure = root.find(".//failure")
    assert "expected 1.5, got </script>" in failure.get("message")
    assert failure.get("message").endswith(": a mistake")
    assert "unidrop diff of it" in failure.text
    assert "check('output'" in failure.text
    assert "Traceback of it" in failure.text


def test_writes_badge_rows_and_failures_to_markdown(report):
    text = to_markdown(report)
    assert "unidrop%20stream%201-2%20passed%2C%201%20failed-red" in text.splitlines()[0]
    rows = [line for line in text.splitlines() if line.startswith("| mine")]
    assert rows == ["| mine | eager | 2 | 1 | 1 |", "| mine | graph | 0 |  | 1 |"]
    assert "unidrop diff of it\npython -c" in text
    assert "Cause: a mistake." in text
    assert all(
        len(re.findall(r"(?<!\\)\|", line)) == 6 for line in text.splitlines() if "|" in line[:1]
    )


def test_escapes_names_in_markdown():
    report = Report([Result("mask", "```$x$~", "cpu", "float32", "eager", "failed", 0, "1", "2")])
    lines = to_markdown(report).splitlines()
    begin = lines.index("````sh")
    assert lines[begin + 1].startswith("python -c '")
    assert lines[begin + 2] == "````"
    assert "| \\`\\`\\`\\$x\\$\\~ | eager |" in "\n".join(lines)


def printed(report, width=200, **options):
    console = Console(width=width, file=StringIO())
    print_report(report, console, **options)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 200])
def test_prints_title_on_one_line_at_any_width(report, width):
    first, *_ = printed(report, width).splitlines()
    assert first == f"unidrop conformance, stream {STREAM_VERSION}"


def test_prints_a_line_for_each_backend(report):
    text = printed(report)
    assert re.search(r"^mine +1 +2 +1 +2$", text, re.MULTILINE)
    assert "\nabsent: skipped (ModuleNotFoundError: no)\n" in text
    assert "\n✗ dead: broken (it died " in text
    assert "layout" not in text


def test_prints_every_failure_in_full(report):
    text = printed(report)
    assert "\n✗ output-mine-cpu-float32-eager\n" in text
    for line in (
        "promise ",
        "expected   1.5",
        "cause      a mistake",
        "analyze    unidrop diff of it",
    ):
        assert f"\n  {line}" in text
    assert "  rerun      python -c" in text


def test_prints_the_rest_on_request(report):
    *_, hint = printed(report).splitlines()
    assert re.findall("--[a-z]+", hint) == ["--table", "--reasons", "--traceback"]
    text = printed(report, table=True, reasons=True, tracebacks=True)
    assert re.search(r"│ output +│ ✗ 1 of 2 │ +- +│", text)
    assert "- mine (eager): it has no strides: layout" in text
    assert "\n    where it died\n" in text
    assert "\n    Traceback of it\n" in text
    assert "more:" not in text


def red(*contracts, mode="eager"):
    return [result(name, "float32", "1", "2", mode=mode, status="failed") for name in contracts]


def test_lists_root_failures_first_and_names_them():
    report = Report(
        [
            *red("output", "bad-rate", "mask"),
            *red("output", "mask", mode="graph"),
            *red("mask", mode="jit"),
        ]
    )
    first, *rest = (str(failure) for failure in report.failures)
    assert first == "bad-rate-mine-cpu-float32-eager"
    assert [name.partition("-")[0] for name in rest] == ["mask", "mask", "mask", "output", "output"]
    expected = [
        "start with mask, bad-rate in mine (eager): the other failures there depend on them",
        "start with mask in mine (graph): the other failures there depend on it",
    ]
    assert [str(roots) for roots in report.root_failures()] == expected
    assert expected[1] in "".join(Page(to_html(report)).text)
    assert "\n- start with mask, bad-rate in mine" in to_markdown(report)


def test_finds_no_root_of_independent_failures():
    assert Report(red("bad-rate", "mask")).root_failures() == []


def test_colors_markdown_badge_green_if_all_passed():
    assert "brightgreen" in to_markdown(Report([result("mask", "float32")]))


def test_writes_empty_report_in_every_format():
    for write in (to_html, to_json, to_junit, to_markdown):
        assert write(Report())
