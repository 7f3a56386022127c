"""One child process for each backend, so that a backend that crashes or hangs harms no other."""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from tempfile import TemporaryFile
from time import monotonic
from typing import Any

from unidrop.conformance.backend import BackendNotRun
from unidrop.conformance.runner import NotApplicable, Request, Result

__all__ = ["RUN_FOLDER_ENV_VAR", "Child", "Outcome", "Progress"]

Outcome = Result | NotApplicable | BackendNotRun

#: Names the folder that all child processes of a run share, which is deleted after the run.
RUN_FOLDER_ENV_VAR = "UNIDROP_RUN_FOLDER"

# For every child process, unless the user has set them.
_DEFAULTS: Mapping[str, str] = {
    # Idle threads of OpenMP and OpenBLAS spin, which takes the CPUs from the other processes.
    "OMP_WAIT_POLICY": "passive",
    "OPENBLAS_NUM_THREADS": "1",
    # Python then prints where it was when a signal kills it.
    "PYTHONFAULTHANDLER": "1",
}

_KINDS: Mapping[str, type[Outcome]] = {
    kind.__name__: kind for kind in (Result, NotApplicable, BackendNotRun)
}

# The end of a broken backend's output that is shown, since frameworks can print a lot.
_SHOWN_LINES, _SHOWN_BYTES = 60, 1 << 16


@dataclass(frozen=True, slots=True)
class Progress:
    """Callbacks of a run.

    Attributes
    ----------
    begun : callable
        Called with the name of a backend that has been loaded, and its number of outcomes.
    ran : callable
        Called with the name of a backend for each outcome.
    """

    begun: Callable[[str, int], None] = lambda backend, count: None
    ran: Callable[[str], None] = lambda backend: None


class Child:
    """The parent's end of a child process.

    The child first sends its plan, the outcomes that need no run and the names of the cells that
    it will run, and then a result for each of those cells in order. `unidrop.conformance.child` is
    the other end.

    Attributes
    ----------
    outcomes : list
        The outcomes so far, in order.
    connection : Connection
        Ready when `receive` has something to read.
    deadline : float
        When the child must have sent its next message, by `time.monotonic`.
    is_done : bool
        Whether all outcomes are known.
    """

    def __init__(
        self, request: Request, folder: str, *, timeout: float | None, progress: Progress
    ) -> None:
        """Start the process; `kill` must be called in the end."""
        self.outcomes: list[Outcome] = []
        self.is_done = False
        self._request = request
        self._timeout = timeout
        self._progress = progress
        self._plan: deque[tuple[str, dict[str, Any]]] | None = None
        self._output = TemporaryFile()  # noqa: SIM115 (`kill` closes it)
        self.connection, theirs = Pipe()
        # Without -P, files in the current folder could shadow installed packages.
        command = [sys.executable, "-u", "-P", "-m", "unidrop.conformance.child"]
        self._popen = subprocess.Popen(
            [*command, str(theirs.fileno()), json.dumps(asdict(request))],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            # The group can be killed with all that it forks, and Ctrl-C interrupts only the parent.
            start_new_session=True,
            env={**_DEFAULTS, **os.environ, RUN_FOLDER_ENV_VAR: folder},
        )
        theirs.close()
        self._extend_deadline()

    def receive(self) -> None:
        """Read the next message, or note how the process ended."""
        try:
            message = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError, ValueError):  # it has ended, or something else wrote there
            self._give_up(f"the process of backend {self._request.backend} {self._end()}")
            return
        self._extend_deadline()
        if self._plan is None:
            self._plan = deque((kind, fields) for kind, fields in message)
            self._progress.begun(self._request.backend, len(self._plan))
        else:
            self._plan.popleft()
            self._add(Result(**message))
        self._add_known_outcomes()

    def give_up_if_late(self) -> None:
        """Give the backend up if its deadline is over."""
        if monotonic() >= self.deadline:
            self._give_up(f"backend {self._request.backend} did not answer in {self._timeout:g} s")

    def kill(self) -> None:
        """End the process and all that it has forked; does nothing the second time."""
        if self.connection.closed:
            return
        with suppress(ProcessLookupError, PermissionError):  # all of them have ended
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self.connection.close()
        self._output.close()

    def _extend_deadline(self) -> None:
        self.deadline = float("inf") if self._timeout is None else monotonic() + self._timeout

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._progress.ran(self._request.backend)

    def _add_known_outcomes(self) -> None:
        """Add the outcomes before the next cell to run."""
        assert self._plan is not None
        while self._plan and self._plan[0][0] in _KINDS:
            kind, fields = self._plan.popleft()
            self._add(_KINDS[kind](**fields))
        self.is_done = not self._plan

    def _give_up(self, error: str) -> None:
        """Fail the cell that was running, if any, and report the backend as broken."""
        output = self._last_lines()
        self.kill()
        if self._plan is not None:
            _, names = self._plan.popleft()
            failure = {"expected": "an answer", "actual": error}
            self._add(
                Result(**names, status="failed", seconds=0, seed=self._request.seed, **failure)
            )
            left = [cell for cell in self._plan if cell[0] not in _KINDS]
            self._plan = deque(item for item in self._plan if item[0] in _KINDS)
            self._add_known_outcomes()
            error += f"; {len(left)} cells were not run"
        self.outcomes.append(BackendNotRun(self._request.backend, error, output))
        self.is_done = True

    def _end(self) -> str:
        """Return how the process ended, as a predicate."""
        try:
            status = self._popen.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if status < 0:
            return f"was killed by signal {-status} ({signal.strsignal(-status)})"
        return f"ended with exit status {status}"

    def _last_lines(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _SHOWN_BYTES))
        return "\n".join(self._output.read().decode(errors="replace").splitlines()[-_SHOWN_LINES:])
