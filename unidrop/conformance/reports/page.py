"""The matrix as one self-contained HTML page, whose cells open their evidence."""

import platform
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from unidrop import __version__
from unidrop.conformance.contracts import CONTRACTS
from unidrop.conformance.reports.report import Column, Report, get_evidence
from unidrop.conformance.runner import Result
from unidrop.mask import STREAM_VERSION

__all__ = ["to_html"]

_TEMPLATES = Environment(
    loader=PackageLoader("unidrop.conformance.reports", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


def to_html(report: Report) -> str:
    """Return the page, which needs no network, and shows the table even without JavaScript."""
    columns = report.columns
    backends = {backend: sum(b == backend for b, _ in columns) for backend, _ in columns}
    return _TEMPLATES.get_template("matrix.html").render(
        report=report,
        stream=STREAM_VERSION,
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        contracts=CONTRACTS,
        columns=columns,
        promises=[CONTRACTS[name].promise for name in report.contracts],
        backends=backends,
        evidence=[
            [_evidence(report, name, column) for column in columns] for name in report.contracts
        ],
    )


def _evidence(report: Report, contract: str, column: Column) -> dict[str, Any]:
    """Return what the page shows when a cell is opened."""
    cell = report.cell(contract, column)
    return {"results": [_as_dict(result) for result in cell.results], "reasons": cell.reasons}


def _as_dict(result: Result) -> dict[str, Any]:
    where = f"{result.device}, {result.dtype}"
    fields = {"where": where, "status": result.status, "seconds": round(result.seconds, 3)}
    if result.status == "failed":
        return fields | {"evidence": list(get_evidence(result)), "details": result.details}
    return fields | {"evidence": [("rerun", result.reproduce)]}
