"""Scripts that run in a new process with a time limit.

A test of threads, forks or signals may crash or hang, so it is a script. Many scripts fork: a fork
takes milliseconds, and inherits all compiled kernels.
"""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

__all__ = ["LIMIT", "assert_success", "needs_fork", "needs_signals", "run_script"]

# Seconds before a script counts as hanging. A correct script may share its CPUs with other tests
# while it imports PyTorch three times or compiles a kernel.
LIMIT = 300

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no os.fork")
needs_signals = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="this platform sends no SIGINT to one process"
)

PRELUDE = """
import atexit, gc, os, random, signal, sys, threading, time, weakref
import numpy as np
import unidrop
from unidrop import Key, get_num_threads, keep_mask, set_num_threads
from unidrop.adapters.numpy import dropout

KEY, OTHER = Key(42), Key(43)
SIZE = (20 << 16) + 5
X = np.random.default_rng(0).standard_normal(SIZE, dtype="float32")


def same_bits(actual, expected):
    return np.array_equal(actual.view(np.uint8), expected.view(np.uint8))


PORTABLE = {}  # outputs by key, which forks inherit


def check_bits(key=KEY, x=X, **arguments):
    y = dropout(x, 0.1, key=key, **arguments)
    if key not in PORTABLE:
        with unidrop.force_path("portable"):
            PORTABLE[key] = dropout(X, 0.1, key=key)
    if not same_bits(y, PORTABLE[key]):
        os.write(2, b"WRONG BITS")
        os._exit(99)


def run_in_fork(function, seconds=60, meanwhile=lambda pid: None):
    '''Call a function in a child that then exits normally; return its exit status.'''
    sys.stdout.flush(), sys.stderr.flush()
    gc.freeze()  # else the child copies each page of memory when it exits
    pid = os.fork()
    if pid == 0:
        function()
        sys.exit(0)  # do not return to the callers of this function
    meanwhile(pid)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGABRT)  # faulthandler then prints the stack
    os.waitpid(pid, 0)
    return "hung"
"""

# Compiles the kernels and starts threads.
WARM = """
set_num_threads(4)
check_bits()
check_bits(OTHER)
"""


def run_script(tmp_path, code, *, warm=False, timeout=LIMIT, **environment):
    """Run a script, and return the finished process.

    The script begins with `PRELUDE`, and with `WARM` if warm is True.
    """
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + (WARM if warm else "") + textwrap.dedent(code))
    # Python 3.12 warns about forks of processes with threads. These scripts test such forks.
    flags = ["-X", "faulthandler", "-W", "ignore:.*fork:DeprecationWarning"]
    inherited = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    command = [sys.executable, *flags, str(script)]
    with open(tmp_path / "stdout", "w+") as out, open(tmp_path / "stderr", "w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=inherited | environment)
        try:
            process.wait(timeout)
            hangs = ""
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler then prints the stack
            process.wait()
            hangs = "a script hangs\n"
        for file in (out, err):
            file.seek(0)
        run = subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())
    assert not hangs, hangs + run.stderr
    return run


def assert_success(run):
    """Check that a process exited with status 0 and printed no error."""
    assert (run.returncode, run.stderr) == (0, "")
