"""The child process of one backend: sends the plan of its cells, then the result of each.

`unidrop.conformance.isolation.Child` starts it as ``python -m unidrop.conformance.child``, with the
number of a file descriptor and a request as arguments.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from unidrop.conformance.backend import BackendNotRun, entry_points_named
from unidrop.conformance.contracts import Cell
from unidrop.conformance.error_text import error_text
from unidrop.conformance.runner import NotApplicable, Request, Result, items, run_cell
from unidrop.conformance.subprocess_backend import SubprocessBackend

__all__ = ["main"]


def main() -> None:
    """Run the cells of a request."""
    connection, request = Connection(int(sys.argv[1])), Request(**json.loads(sys.argv[2]))
    broken = _enter_environment(request.backend)
    _prepare(connection)
    plan = [broken] if broken else _plan(request)
    _send(connection, [_described(item) for item in plan])
    for item in plan:
        if isinstance(item, Cell):
            _send(connection, asdict(_result(item)))


def _enter_environment(name: str) -> BackendNotRun | None:
    """Start this process again if the backend's entry point declares other variables.

    Returns what stands for the backend if its entry point raises: a second import might succeed,
    and hide the reason.
    """
    point = entry_points_named(name)[0]
    try:
        loaded = point.load()
    except BaseException as error:
        return BackendNotRun.from_error(name, error, own=point.module)
    if isinstance(loaded, SubprocessBackend) and loaded.full_environment() != os.environ:
        os.execve(sys.executable, sys.orig_argv, loaded.full_environment())
    return None


def _prepare(connection: Connection) -> None:
    """Tie the connection and this process to each other."""
    # Otherwise the parent would not see that this process has ended before its children have.
    os.set_inheritable(connection.fileno(), False)
    os.register_at_fork(after_in_child=connection.close)
    Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    # Compilers create so many lasting objects that looking for garbage takes a tenth of their time.
    gc.set_threshold(20_000, 50, 50)


def _end_with_parent(connection: Connection) -> None:
    with suppress(EOFError, OSError):
        connection.recv_bytes()  # the parent sends nothing, so this ends with the parent
    os.killpg(0, signal.SIGKILL)


def _plan(request: Request) -> Sequence[Cell | NotApplicable | BackendNotRun]:
    """Load the backend, and return its cells and the contracts that do not apply."""
    try:
        return list(items(request))
    except BaseException as error:  # including an interrupt or an exit of the backend's own
        return [BackendNotRun.from_error(request.backend, error)]


def _described(item: Cell | NotApplicable | BackendNotRun) -> tuple[str, dict[str, Any]]:
    fields = item.names() if isinstance(item, Cell) else asdict(item)
    return type(item).__name__, fields


def _result(cell: Cell) -> Result:
    try:
        return run_cell(cell)
    except KeyboardInterrupt as error:  # the backend's own: Ctrl-C interrupts only the parent
        failure = {"expected": "no error", "actual": error_text(error)}
        return Result.from_cell(cell, "failed", 0, **failure)


def _send(connection: Connection, message: object) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    main()
