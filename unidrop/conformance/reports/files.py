"""The matrix as files for other programs: JSON, JUnit XML and Markdown."""

import json
import platform
import re
from dataclasses import asdict
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from unidrop.conformance.contracts import CONTRACTS
from unidrop.conformance.reports.report import Report
from unidrop.conformance.runner import Result
from unidrop.mask import STREAM_VERSION

__all__ = ["to_json", "to_junit", "to_markdown"]

# The attributes of a result that only a failed one has.
_FAILURE_ATTRIBUTES = ("expected", "actual", "cause", "diff", "details")

# XML cannot hold control characters, which an error's message may contain.
_XML_SUBSTITUTES = dict.fromkeys(
    set(range(32)) - {9, 10, 13} | {*range(0xD800, 0xE000), 0xFFFE, 0xFFFF},
    "\N{REPLACEMENT CHARACTER}",
)


def to_json(report: Report) -> str:
    """Return everything as JSON: an object for each cell, exclusion and unavailable backend."""
    return json.dumps(
        {
            "stream": STREAM_VERSION,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cells": [_as_dict(result) for result in report.results],
            "missing": [asdict(missing) for missing in report.missing],
            "unavailable": [
                {"backend": backend.name, "error": backend.error, "details": backend.details}
                for backend in report.unavailable
            ],
        },
        indent=1,
    )


def _as_dict(result: Result) -> dict[str, Any]:
    described = asdict(result) | {"seconds": round(result.seconds, 4)}
    if result.status == "failed":
        return described | {"reproduce": result.reproduce}
    return {name: value for name, value in described.items() if name not in _FAILURE_ATTRIBUTES}


def _commands(result: Result) -> str:
    """Return the commands that analyze and rerun a failure, one on each line."""
    return "\n".join(filter(None, (result.diff, result.reproduce)))


def to_junit(report: Report) -> str:
    """Return the XML that CI systems read: a suite for each column, a case for each cell.

    A contract that does not apply is skipped, and a broken backend is an error.
    """
    root = ElementTree.Element("testsuites", name="unidrop conformance")
    suites: dict[tuple[str, str], ElementTree.Element] = {}

    def case(backend: str, mode: str, name: str, seconds: float = 0) -> ElementTree.Element:
        if (backend, mode) not in suites:
            named = _xml(f"{backend} {mode}".rstrip())
            suites[backend, mode] = ElementTree.SubElement(root, "testsuite", name=named)
        where = {"classname": _xml(f"unidrop.{backend}.{mode}".rstrip(".")), "name": _xml(name)}
        return ElementTree.SubElement(
            suites[backend, mode], "testcase", where, time=f"{seconds:.3f}"
        )

    for result in report.results:
        name = f"{result.contract}[{result.device}-{result.dtype}]"
        item = case(result.backend, result.mode, name, result.seconds)
        if result.status == "failed":
            because = f": {result.cause}" if result.cause else ""
            message = f"expected {result.expected}, got {result.actual}{because}"
            failure = ElementTree.SubElement(item, "failure", message=_xml(message))
            failure.text = _xml(f"{_commands(result)}\n{result.details}")
    for missing in report.missing:
        item = case(missing.backend, missing.mode, missing.contract)
        ElementTree.SubElement(item, "skipped", message=_xml(missing.reason))
    for backend in report.unavailable:
        kind = "skipped" if backend.is_missing else "error"
        item = case(backend.name, "", "is loaded and run to the end")
        ElementTree.SubElement(item, kind, message=_xml(backend.error)).text = _xml(backend.details)
    for suite in suites.values():
        for attribute, kind in (("failures", "failure"), ("errors", "error"), ("skipped",) * 2):
            suite.set(attribute, str(len(suite.findall(f"testcase/{kind}"))))
        suite.set("tests", str(len(suite)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _xml(text: str) -> str:
    return text.translate(_XML_SUBSTITUTES)


def to_markdown(report: Report) -> str:
    """Return a badge, a row for each column, and the failures, for a README or a CI summary."""
    color = "brightgreen" if report.is_good else "red"
    label, message = (
        quote(text.replace("-", "--"))
        for text in (f"unidrop stream {STREAM_VERSION}", report.summary)
    )
    lines = [
        f"![unidrop conformance](https://img.shields.io/badge/{label}-{message}-{color})",
        "",
        f"unidrop conformance, stream {STREAM_VERSION}: **{report.summary}**.",
        "",
        "| backend | mode | passed | failed | not applicable |",
        "|---|---|---:|---:|---:|",
    ]
    for column in report.columns:
        row = report.row([column])
        counts = f"{row.passed} | {row.failed or ''} | {row.missing or ''}"
        lines.append(f"| {_line(column[0])} | {_line(column[1])} | {counts} |")
    lines += [f"| {_line(b.name)} | {_line(b.error)} | | | |" for b in report.unavailable]
    lines += ["", *(f"- {_line(str(first))}" for first in report.root_failures())]
    for result in report.failures:
        lines += [
            "",
            f"**{_line(str(result))}**: {CONTRACTS[result.contract].promise}",
            f"Expected {_line(result.expected)}, got {_line(result.actual)}.",
            *([f"Cause: {_line(result.cause)}."] if result.cause else []),
            "",
            *_fenced(_commands(result)),
        ]
    return "\n".join(lines) + "\n"


def _fenced(commands: str) -> list[str]:
    """Return lines of code in a fence that is longer than any fence among them."""
    longest = max(map(len, re.findall("`+", commands)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", commands, fence]


def _line(text: str) -> str:
    """Return text on one line, without markup."""
    for special in "\\`*_[]<>|$~&":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())
