"""The reports of a run: in the terminal, as a page, and as files for other programs."""

from unidrop.conformance.reports.files import to_json, to_junit, to_markdown
from unidrop.conformance.reports.page import to_html
from unidrop.conformance.reports.report import Report
from unidrop.conformance.reports.terminal import print_report

__all__ = ["Report", "print_report", "to_html", "to_json", "to_junit", "to_markdown"]
