"""Tests of the threads that help with large arrays: results, forks, interrupts and ends.

What may crash or hang takes place in a process of its own, which has a time limit: a script begins
with `PRELUDE`. Many of them fork: a fork costs milliseconds, and begins with all kernels compiled.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pytest
import torch

import unidrop
import unidrop.adapters.numpy as for_numpy
import unidrop.adapters.torch as for_torch
from unidrop import Key, get_num_threads, keep_mask, set_num_threads, threads

pytest.importorskip("numba", reason="only kernels use threads, and they need Numba")

KEY = Key(42).fold_in("encoder/0").fold_in(7)
LARGE = (20 << 16) + 5  # elements, of 21 units
SQUARE = (1300, 1100)  # whose transpose is of more tiles than are worth calling helpers for
# Seconds before a script is said to hang. What hangs does so forever, and what works may share its
# processors with other tests, while it imports PyTorch three times or compiles a kernel.
LIMIT = 300

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no os.fork")
needs_signals = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="this platform sends no SIGINT to one process"
)


@pytest.fixture(autouse=True)
def number():
    """Leave the number of threads as it was."""
    before = get_num_threads()
    yield before
    set_num_threads(before)


def portable(function, *args, **kwargs):
    """Return what a function gives without kernels, and so without threads."""
    with unidrop.force_path("portable"):
        return function(*args, **kwargs)


def same_bits(actual, expected):
    """Tell whether two arrays have the same dtype, shape and bits, whatever their strides."""
    if isinstance(expected, torch.Tensor):
        actual, expected = (t.detach().contiguous().view(torch.uint8) for t in (actual, expected))
        return torch.equal(actual, expected)
    return (actual.dtype, actual.shape) == (expected.dtype, expected.shape) and np.array_equal(
        *(np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (actual, expected))
    )


def numbers(*shape, dtype="float32"):
    """Return the same ordinary numbers at every call."""
    return np.random.default_rng(0).standard_normal(shape, dtype="float32").astype(dtype)


# --- Scripts -----------------------------------------------------------------------------------

PRELUDE = """
import atexit, os, random, signal, sys, threading, time, weakref
import numpy as np
import unidrop
from unidrop import Key, get_num_threads, keep_mask, set_num_threads
from unidrop.adapters.numpy import dropout

KEY, OTHER = Key(42), Key(43)
SIZE = (20 << 16) + 5
X = np.random.default_rng(0).standard_normal(SIZE, dtype="float32")


def same(actual, expected):
    return np.array_equal(actual.view(np.uint8), expected.view(np.uint8))


def expect_right(key=KEY, x=X, **arguments):
    y = dropout(x, 0.1, key=key, **arguments)
    with unidrop.force_path("portable"):
        expected = dropout(X, 0.1, key=key)
    if not same(y, expected):
        os.write(2, b"WRONG BITS")
        os._exit(99)


def forked(act, seconds=60, meanwhile=lambda pid: None):
    '''Return the status of a child that acts and then comes to an ordinary end.'''
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        act()
        sys.exit(0)  # past the callers of this function
    meanwhile(pid)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGABRT)  # upon which faulthandler shows where it hangs
    os.waitpid(pid, 0)
    return "hung"


class At:
    '''Acts at the n-th point of what this module's function `run` does, or counts the points.

    A point is where Python may run a signal's handler, a finaliser or another thread: where a
    function is entered, or one of C returns; and each line of unidrop.threads.
    '''

    def __init__(self, n=None, act=None):
        self.n, self.act, self.count, self.begun = n, act, 0, False

    def __enter__(self):
        sys.settrace(self.trace)
        sys.setprofile(self.profile)

    def __exit__(self, *_):
        sys.setprofile(None)
        sys.settrace(None)

    def ours(self, frame):
        return frame.f_globals.get("__name__") == "unidrop.threads"

    def profile(self, frame, event, argument):
        self.begun = self.begun or self.ours(frame)
        if event in ("call", "c_return"):
            self.point()

    def trace(self, frame, event, argument):
        if event == "line":
            self.point()
        return self.trace if self.ours(frame) else None

    def point(self):
        if self.begun:
            self.count += 1
            if self.count == self.n:
                self.act()


def at_each_point(act, scene):
    '''Act once at each point of a scene, each time in a child, which is to end well.'''
    counter = At()

    def count():
        scene(counter)
        os._exit(0 if counter.count < 5 else min(250, counter.count))

    points = forked(count)
    assert points != "hung" and 5 <= points < 250, points
    for n in range(1, points + 1):
        status = forked(lambda: scene(At(n, act)))
        if status != 0:
            sys.exit(f"at point {n} of {points}: status {status}")
"""

WARM = """
set_num_threads(4)
expect_right()
"""


def python(tmp_path, code, *, timeout=LIMIT, **environment):
    """Run a script after `PRELUDE`, and return the finished process."""
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + textwrap.dedent(code))
    # Since Python 3.12 a fork warns of threads; here it is the fork that is tested.
    flags = ["-X", "faulthandler", "-W", "ignore:.*fork:DeprecationWarning"]
    inherited = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    command = [sys.executable, *flags, str(script)]
    with open(tmp_path / "stdout", "w+") as out, open(tmp_path / "stderr", "w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=inherited | environment)
        try:
            process.wait(timeout)
            hangs = ""
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # upon which faulthandler shows where it hangs
            process.wait()
            hangs = "a script hangs\n"
        for file in (out, err):
            file.seek(0)
        run = subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())
    assert not hangs, hangs + run.stderr
    return run


def expect_success(run):
    """Ask of a process that it ended well and complained of nothing."""
    assert (run.returncode, run.stderr) == (0, "")


# --- The number of threads ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 33, 1024, np.int64(3), np.uint8(4)], ids=repr)
def test_the_number_that_was_set_is_the_number(number):
    set_num_threads(number)
    assert get_num_threads() == number
    assert type(get_num_threads()) is int


@pytest.mark.parametrize("number", [0, -1, np.int64(0), 1025, 10**30], ids=repr)
def test_rejects_a_number_beyond_the_limits(number):
    before = get_num_threads()
    with pytest.raises(ValueError, match=rf"number must be from 1 to 1024, got {number}"):
        set_num_threads(number)
    assert get_num_threads() == before


@pytest.mark.parametrize("number", [True, False, 2.0, "2", b"2", None, [2], np.True_], ids=repr)
def test_what_is_no_integer_is_an_error_that_says_so(number):
    before = get_num_threads()
    expected = f"number must be an integer, got {number!r}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        set_num_threads(number)
    assert get_num_threads() == before


def test_the_default_is_the_number_of_processors_that_the_process_may_use(tmp_path):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this platform can't tell a process which processors to use")
    code = """
    assert get_num_threads() == len(os.sched_getaffinity(0))

    def on_one():
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        import unidrop.threads
        import importlib
        importlib.reload(unidrop.threads)
        assert unidrop.threads.get_num_threads() == 1

    assert forked(on_one) == 0
    """
    expect_success(python(tmp_path, code))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"UNIDROP_NUM_THREADS": "3"}, "3"),
        ({"UNIDROP_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3"),
        ({"UNIDROP_NUM_THREADS": "", "OMP_NUM_THREADS": "5"}, "5"),
        ({"OMP_NUM_THREADS": "5"}, "5"),
        ({"OMP_NUM_THREADS": "4,2"}, "4"),
        ({"OMP_NUM_THREADS": "99999"}, "1024"),
        ({"OMP_NUM_THREADS": " 6 "}, "6"),
        ({"OMP_NUM_THREADS": "0"}, "default"),
        ({"OMP_NUM_THREADS": "-2"}, "default"),
        ({"OMP_NUM_THREADS": "rubbish"}, "default"),
        ({"OMP_NUM_THREADS": ","}, "default"),
        ({"OMP_NUM_THREADS": ""}, "default"),
    ],
    ids=str,
)
def test_the_environment_sets_the_default(tmp_path, environment, expected):
    code = """
    found, processors = get_num_threads(), os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    print("default" if sys.argv[0] and found == processors and found not in (3, 5, 4, 6) else found)
    """
    run = python(tmp_path, code, **environment)
    expect_success(run)
    default = {"default", str(os.cpu_count())}
    assert run.stdout.strip() in ({expected} if expected != "default" else default)


@pytest.mark.parametrize("value", ["0", "-1", "many", "2.5", "4,2", "99999"])
def test_a_bad_number_in_the_environment_is_an_error_that_names_the_variable(tmp_path, value):
    code = """
    dropout(X[:100], 0.5, key=KEY)
    for call in (get_num_threads, lambda: dropout(X, 0.5, key=KEY)):
        try:
            call()
        except (TypeError, ValueError) as error:
            print(error)
    set_num_threads(2)
    expect_right()
    """
    run = python(tmp_path, code, UNIDROP_NUM_THREADS=value)
    expect_success(run)
    lines = run.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("UNIDROP_NUM_THREADS must be ")
        assert value in line


@needs_fork
def test_a_number_that_is_set_while_the_default_is_looked_up_stays_set(tmp_path):
    code = """
    from unidrop import threads

    def change():
        thread = threading.Thread(target=set_num_threads, args=(7,), daemon=True)
        thread.start()
        thread.join(0.2)
        changing.append(thread)

    def scene(at):
        with at:
            get_num_threads()
        for thread in changing:
            thread.join()
            assert get_num_threads() == 7

    changing = []
    at_each_point(change, scene)
    """
    expect_success(python(tmp_path, code))


def test_a_large_array_is_shared_with_helpers():
    set_num_threads(3)
    before = set(threading.enumerate())
    for_numpy.dropout(numbers(LARGE), key=KEY)
    assert len(set(threading.enumerate()) - before) > 0


def test_the_default_stays_within_the_limit(monkeypatch):
    for variable in ("UNIDROP_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(threads, "cpu_count", lambda: 2000)
    monkeypatch.setattr(threads, "_num_threads", None)
    assert get_num_threads() == 1024


def test_one_thread_means_that_none_is_started():
    set_num_threads(1)
    before = set(threading.enumerate())
    for_numpy.dropout(numbers(LARGE), key=KEY)
    assert set(threading.enumerate()) <= before


def test_threads_that_are_no_longer_wanted_end():
    x = numbers(LARGE)
    set_num_threads(1)
    before = threading.active_count()
    for number in range(2, 40):
        set_num_threads(number)
        for_numpy.dropout(x, key=KEY)
    set_num_threads(1)
    deadline = time.monotonic() + LIMIT
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- Results -----------------------------------------------------------------------------------

X = numbers(LARGE)
RESULTS = {
    "rows": lambda: for_numpy.dropout(X, 0.1, key=KEY),
    "out": lambda: for_numpy.dropout(X, 0.1, key=KEY, out=np.empty_like(X)),
    "in place": lambda: (lambda y: for_numpy.dropout(y, 0.1, key=KEY, out=y))(X.copy()),
    "float16": lambda: for_numpy.dropout(X.astype("float16"), 0.1, key=KEY),
    "float64": lambda: for_numpy.dropout(X.astype("float64"), 0.1, key=KEY),
    "complex128": lambda: for_numpy.dropout(X.astype("complex128"), 0.1, key=KEY),
    "bfloat16": lambda: for_torch.dropout(torch.from_numpy(X).bfloat16(), 0.1, key=KEY),
    "tiles": lambda: for_numpy.dropout(X[: 1300 * 1000].reshape(1300, 1000).T, 0.1, key=KEY),
    "permuted": lambda: for_numpy.dropout(
        X[: 50 * 130 * 200].reshape(50, 130, 200).transpose(2, 0, 1), 0.1, key=KEY
    ),
    "shared": lambda: for_numpy.dropout(
        X[: 1300 * 1000].reshape(1300, 1000), 0.1, key=KEY, broadcast_axes=(1,)
    ),
    "mask": lambda: keep_mask((LARGE,), 0.1, KEY),
    "window": lambda: keep_mask(SQUARE, 0.1, KEY, global_shape=(3000, 3000), start=(7, 5)),
}


@pytest.fixture(scope="module", params=RESULTS)
def result(request):
    """Return a function that calls, and what it returns without threads."""
    return RESULTS[request.param], portable(RESULTS[request.param])


@pytest.mark.parametrize("number", [1, 2, 3, 8, 33])
def test_results_do_not_depend_on_the_number_of_threads(result, number):
    function, expected = result
    set_num_threads(number)
    for _ in range(3):
        assert same_bits(function(), expected)


def test_results_do_not_depend_on_the_number_being_changed_meanwhile():
    expected = {name: portable(function) for name, function in RESULTS.items()}
    stop, failures = threading.Event(), []

    def call(names):
        try:
            while not stop.is_set():
                for name in names:
                    if not same_bits(RESULTS[name](), expected[name]):
                        failures.append(name)
        except BaseException as error:
            failures.append(error)

    names = list(RESULTS)
    callers = [threading.Thread(target=call, args=(names[i::4],)) for i in range(4)]
    for caller in callers:
        caller.start()
    deadline = time.monotonic() + 2
    number = 0
    while time.monotonic() < deadline:
        number = number % 9 + 1
        set_num_threads(number)
        assert get_num_threads() == number
    stop.set()
    for caller in callers:
        caller.join(LIMIT)
        assert not caller.is_alive()
    assert failures == []


def test_a_caller_finishes_alone_where_no_thread_can_be_started(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    expected = portable(RESULTS["rows"])
    set_num_threads(5)
    monkeypatch.setattr(threading.Thread, "start", start)
    for _ in range(3):
        assert same_bits(RESULTS["rows"](), expected)


def test_sixteen_threads_get_the_same_bits_in_ten_thousand_calls(tmp_path):
    code = """
    import itertools
    import torch
    from concurrent.futures import ThreadPoolExecutor
    from unidrop.adapters.torch import dropout as torch_dropout

    torch.set_num_threads(1)
    set_num_threads(3)
    sys.setswitchinterval(1e-4)
    CALLERS, CALLS = 16, 10_000
    NAMES = ["float16", "bfloat16", "float32", "float64", "complex64"]
    SHAPES = {
        "small": [(7,), (37, 19), (1000,)],
        "middle": [(3, 5, 401), (20_000,), (300, 70)],
        "large": [(16 << 16,), (1031, 1033), (17 << 16,)],
    }

    def bits(tensor):
        if isinstance(tensor, np.ndarray):
            return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        tensor = tensor.detach().contiguous()
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return tensor.reshape(-1).view(torch.uint8).numpy()

    def make_tensor(name, shape):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        return x.to(getattr(torch, name))

    def forward_and_backward(x, p, key):
        x = x.detach().requires_grad_()
        y = torch_dropout(x, p, key=key)
        y.backward(x.detach())
        return np.concatenate([bits(y), bits(x.grad)])

    def in_place(x, p, key):
        return bits(torch_dropout(x.clone(), p, inplace=True, key=key))

    def plain(x, p, key):
        return bits(dropout(x, p, key=key))

    def out(x, p, key):
        y = np.empty_like(x)
        assert dropout(x, p, key=key, out=y) is y
        return bits(y)

    def over_itself(x, p, key):
        y = x.copy(order="K")
        return bits(dropout(y, p, key=key, out=y))

    def transposed(x, p, key):
        return bits(dropout(x.T, p, key=key))

    def mask(x, p, key):
        return bits(keep_mask(x.shape, p, key))

    OF_TORCH, OF_NUMPY = [forward_and_backward, in_place], [plain, out, over_itself, transposed]

    def cases(size):
        for number, (name, shape) in enumerate(itertools.product(NAMES, SHAPES[size])):
            tensor = make_tensor(name, shape)
            functions = OF_TORCH if name == "bfloat16" else [*OF_TORCH, *OF_NUMPY, mask]
            if size == "large":  # a few, which are of all kinds together
                functions = functions[number % len(functions) :][:2]
            for function in functions:
                x = tensor.numpy() if function in (*OF_NUMPY, mask) else tensor
                arguments = x, (0.1, 0.5)[number % 2], KEY.fold_in(number)
                with unidrop.force_path("portable"):
                    yield function, arguments, function(*arguments)

    table = {size: list(cases(size)) for size in SHAPES}
    counter = itertools.count()

    def call(caller):
        chance = random.Random(caller)
        calls = 0
        while next(counter) < CALLS:
            size = chance.choices(list(SHAPES), [70, 22, 8])[0]
            function, arguments, expected = chance.choice(table[size])
            actual = function(*arguments)
            if not np.array_equal(actual, expected):
                raise AssertionError((function.__name__, arguments[0].dtype, arguments[0].shape))
            calls += 1
        return calls

    with ThreadPoolExecutor(CALLERS) as callers:
        print(sum(callers.map(call, range(CALLERS))))
    """
    run = python(tmp_path, code)
    expect_success(run)
    assert run.stdout.strip() == "10000"


# --- Memory ------------------------------------------------------------------------------------


def expect_released(*references):
    """Wait until arrays are gone."""
    deadline = time.monotonic() + LIMIT
    while any(reference() is not None for reference in references):
        assert time.monotonic() < deadline, "an array is held for good"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [1, 2, 33])
def test_arrays_are_released_after_the_call(number):
    set_num_threads(number)
    for _ in range(5):
        x, out = numbers(LARGE), np.empty(LARGE, "float32")
        y = for_numpy.dropout(x, key=KEY)
        for_numpy.dropout(x, key=KEY, out=out)
        tensor = torch.ones(LARGE, requires_grad=True)
        z = for_torch.dropout(tensor, key=KEY)
        references = [weakref.ref(a) for a in (x, y, out, tensor, z)]
        del x, y, out, tensor, z
        expect_released(*references)


def test_arrays_are_released_when_the_number_of_threads_changes():
    x = numbers(LARGE)
    references = []
    for number in (2, 9, 3, 1, 33, 2):
        set_num_threads(number)
        y = for_numpy.dropout(x, key=KEY)
        references.append(weakref.ref(y))
    del y
    expect_released(*references)


def test_arrays_are_released_where_no_thread_can_be_started(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    set_num_threads(5)
    monkeypatch.setattr(threading.Thread, "start", start)
    x = numbers(LARGE)
    y = for_numpy.dropout(x, key=KEY)
    references = [weakref.ref(x), weakref.ref(y)]
    del x, y
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("callers", [1, 8])
def test_a_thousand_large_calls_take_the_memory_of_a_few(tmp_path, callers):
    pytest.importorskip("resource", reason="this platform does not tell how much memory was used")
    code = f"""
    import resource

    set_num_threads(4)

    def calls(count):
        for _ in range(count):
            dropout(X, 0.1, key=KEY)

    def peak(count):
        share = count // {callers}
        each = [threading.Thread(target=calls, args=(share,)) for _ in range({callers})]
        [thread.start() for thread in each]
        [thread.join() for thread in each]
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    before = peak(200)
    grown = (peak(1000) - before) / X.nbytes
    assert grown < 100, grown
    """
    expect_success(python(tmp_path, code))


# --- Forks -------------------------------------------------------------------------------------


@needs_fork
def test_a_fork_after_a_call_computes_the_same_bits(tmp_path):
    code = """
    def child():
        assert threading.active_count() == 1
        for _ in range(3):
            expect_right()
            expect_right(OTHER)
        assert forked(expect_right) == 0  # and its own child

    for _ in range(10):
        assert forked(child) == 0
        assert forked(lambda: (expect_right(), os._exit(5))) == 5
        expect_right()
    """
    expect_success(python(tmp_path, WARM + textwrap.dedent(code)))


@needs_fork
def test_a_fork_in_the_middle_of_other_threads_calls_computes_the_same_bits(tmp_path):
    code = """
    def call():
        out = np.empty_like(X)
        while not stop.is_set():
            dropout(X, 0.1, key=KEY, out=out)

    def change():
        while not stop.is_set():
            for number in (2, 5, 3):
                set_num_threads(number)
                time.sleep(0.001)

    stop = threading.Event()
    others = [threading.Thread(target=f, daemon=True) for f in (call, call, call, change)]
    [thread.start() for thread in others]
    for _ in range(25):
        status = forked(lambda: (expect_right(), set_num_threads(3), expect_right(OTHER)))
        assert status == 0, status
    stop.set()
    [thread.join() for thread in others]
    expect_right()
    """
    expect_success(python(tmp_path, WARM + textwrap.dedent(code)))


@needs_fork
@pytest.mark.parametrize("delay", [0, 0.1, 0.2, 0.4, 1])
def test_a_fork_while_another_thread_compiles_computes_the_same_bits(tmp_path, delay):
    code = f"""
    set_num_threads(3)
    with unidrop.force_path("portable"):
        EXPECTED = {{name: dropout(X.astype(name), 0.1, key=KEY) for name in ("f4", "f8")}}

    def call(name):
        if not same(dropout(X.astype(name), 0.1, key=KEY), EXPECTED[name]):
            os._exit(99)

    compiler = threading.Thread(target=call, args=("f4",))
    compiler.start()
    time.sleep({delay})
    assert forked(lambda: call("f4")) == 0
    assert forked(lambda: call("f8")) == 0
    compiler.join()
    call("f4")
    """
    expect_success(python(tmp_path, code, NUMBA_CACHE_DIR=str(tmp_path / "cache")))


@needs_fork
@pytest.mark.parametrize(
    ("path", "cached", "forks"),
    [("portable", True, 10), ("fused", True, 20), ("fused", False, 2)],
    ids=["portable", "fused, read from disk", "fused, compiled"],
)
def test_forks_during_a_first_call_never_hang(tmp_path, path, cached, forks):
    forks = int(os.environ.get("UNIDROP_TEST_FORKS", forks))
    code = f"""
    import mmap

    def call(path):
        with unidrop.force_path(path):
            return dropout(X, 0.1, key=KEY)

    def check():
        if not same(call("{path}"), EXPECTED):
            os._exit(99)

    def measure():
        begin = time.perf_counter()
        check()
        SECONDS[0] = time.perf_counter() - begin

    def first_call():
        '''Fork at a moment of another thread's call, which is this process's first.'''
        sys.setswitchinterval(1e-5)
        other = threading.Thread(target=check)
        moment = time.perf_counter() + delay
        other.start()
        while time.perf_counter() < moment:
            pass  # a sleep would last longer while other processes are busy
        status = forked(check, {LIMIT} / 3)
        other.join()
        sys.exit(status)

    set_num_threads(3)
    EXPECTED = np.frombuffer(mmap.mmap(-1, X.nbytes), X.dtype)  # shared with children
    SECONDS = np.frombuffer(mmap.mmap(-1, 8))
    assert forked(lambda: np.copyto(EXPECTED, call("portable"))) == 0
    assert forked(measure, {LIMIT} / 3) == 0
    for number in range({forks}):
        if not {cached}:
            os.environ["NUMBA_CACHE_DIR"] += "0"
        # Half of the forks are among the first imports, which are the shortest part.
        delay = random.uniform(0, random.choice([0.02, SECONDS[0]]))
        status = forked(first_call, {LIMIT} / 2)
        if status != 0:
            sys.exit(f"fork {{number}}, after {{delay:.4f}} of {{SECONDS[0]:.4f}} s: {{status}}")
    """
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    expect_success(python(tmp_path, code, timeout=LIMIT + 20 * forks, **environment))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("cached", [True, False], ids=["compiled before", "compiled by each"])
def test_pools_of_processes_compute_the_same_bits(tmp_path, method, cached):
    import multiprocessing

    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform does not start processes by {method}")
    code = f"""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    def work(number):
        set_num_threads(3)
        return dropout(X, 0.1, key=KEY.fold_in(number)).tobytes()

    if __name__ == "__main__":
        context = multiprocessing.get_context("{method}")
        with unidrop.force_path("portable"):
            expected = [work(number) for number in range(4)]
        if {cached}:
            assert [work(number) for number in range(4)] == expected
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            assert list(pool.map(work, range(4))) == expected
        with context.Pool(2) as pool:
            assert pool.map(work, range(4)) == expected
        assert [work(number) for number in range(4)] == expected
    """
    environment = {} if cached else {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    expect_success(python(tmp_path, code, **environment))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_compute_the_same_bits(tmp_path, method):
    import multiprocessing

    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform does not start processes by {method}")
    code = f"""
    import torch
    from torch.utils.data import DataLoader, Dataset
    from unidrop.adapters.torch import dropout as torch_dropout

    class Dropped(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, number):
            key = KEY.fold_in(number)
            y = dropout(X, 0.1, key=key)
            z = torch_dropout(torch.from_numpy(X), 0.1, key=key)
            return torch.from_numpy(y), z, keep_mask((SIZE,), 0.1, key)

    if __name__ == "__main__":
        set_num_threads(3)
        data = Dropped()
        with unidrop.force_path("portable"):
            expected = [data[i] for i in range(6)]
        [data[i] for i in range(6)]
        for _ in range(2):
            loader = DataLoader(
                data, batch_size=None, num_workers=2, multiprocessing_context="{method}"
            )
            for (y, z, mask), (y0, z0, mask0) in zip(loader, expected, strict=True):
                assert same(y.numpy(), y0.numpy()) and same(z.numpy(), z0.numpy())
                assert same(np.asarray(mask), mask0)
        expect_right()
    """
    # A sandbox without shared memory is no place for a loader's workers.
    if sys.platform == "linux" and not os.access("/dev/shm", os.W_OK):
        pytest.skip("a data loader's workers need shared memory, and /dev/shm can't be written")
    expect_success(python(tmp_path, code))


# --- The end of the process --------------------------------------------------------------------

ENDS = {
    "returns": ("pass", 0),
    "exits": ("sys.exit(3)", 3),
    "raises": ("raise KeyError('uncaught')", 1),
    "leaves at once": ("os._exit(4)", 4),
}


def expect_clean_end(run, end):
    """Ask that processes ended as they were told, and that each complained of that at most."""
    assert "Fatal Python error" not in run.stderr
    assert "Segmentation fault" not in run.stderr
    assert "WRONG" not in run.stderr
    if end == "raises":
        assert run.stderr.count("KeyError: 'uncaught'") == run.stderr.count("Traceback") == 10
    else:
        assert run.stderr == ""
    assert run.returncode == 0


@needs_fork
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", ["daemons", "others"])
def test_a_process_ends_as_it_should_while_threads_are_in_large_calls(tmp_path, kind, end):
    statement, status = ENDS[end]
    repeat = "while True" if kind == "daemons" else "for _ in range(20)"
    code = f"""
    with unidrop.force_path("portable"):
        EXPECTED = dropout(X, 0.1, key=KEY)

    def call():
        out = np.empty_like(X)
        {repeat}:
            if not same(dropout(X, 0.1, key=KEY, out=out), EXPECTED):
                print("WRONG BITS", file=sys.stderr, flush=True)
            dropout(X, 0.1, key=KEY)
            begun.set()

    def scene():
        for _ in range(3):
            threading.Thread(target=call, daemon={kind == "daemons"}).start()
        begun.wait()
        time.sleep(random.uniform(0, 0.01))
        {statement}

    begun = threading.Event()
    for _ in range(10):
        random.seed(_)
        status = forked(scene)
        if status != {status}:
            sys.exit(f"ended with status {{status}}")
    os._exit(0)
    """
    expect_clean_end(python(tmp_path, WARM + textwrap.dedent(code)), end)


@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_did_not_fork_ends_as_it_should(tmp_path, end):
    statement, status = ENDS[end]
    code = f"""
    def call(count):
        while count:
            dropout(X, 0.1, key=KEY)
            count -= 1

    threading.Thread(target=call, args=(-1,), daemon=True).start()
    threading.Thread(target=call, args=(50,)).start()
    call(3)
    {statement}
    """
    run = python(tmp_path, WARM + textwrap.dedent(code))
    assert run.returncode == status
    assert "Fatal Python error" not in run.stderr
    assert run.stderr.count("Traceback") == (end == "raises")


@needs_fork
@pytest.mark.parametrize("end", ["returns", "exits", "raises"])
def test_calls_from_atexit_are_right(tmp_path, end):
    statement, status = ENDS[end]
    code = f"""
    def scene():
        atexit.register(lambda: print("last", file=sys.stdout, flush=True))
        atexit.register(expect_right)
        atexit.register(lambda: (set_num_threads(6), expect_right(OTHER)))
        expect_right()
        {statement}

    for _ in range(10):
        status = forked(scene)
        assert status == {status}, status
    os._exit(0)
    """
    run = python(tmp_path, WARM + textwrap.dedent(code))
    expect_clean_end(run, end)
    assert run.stdout.split() == ["last"] * 10


@needs_fork
def test_first_calls_from_atexit_are_right(tmp_path):
    code = """
    set_num_threads(4)
    atexit.register(lambda: (expect_right(), print("right", flush=True)))
    """
    run = python(tmp_path, code)
    expect_success(run)
    assert run.stdout.split() == ["right"]


@needs_fork
@pytest.mark.parametrize("cyclic", [False, True], ids=["global", "cyclic"])
def test_calls_from_finalisers_at_the_end_are_right(tmp_path, cyclic):
    code = f"""
    class Last:
        def __init__(self):
            self.itself = self if {cyclic} else None

        def __del__(self, expect_right=expect_right, os=os):
            expect_right()
            os.write(1, b"right ")

    def scene():
        global last
        last = Last()
        expect_right()

    for _ in range(10):
        assert forked(scene) == 0
    os._exit(0)
    """
    run = python(tmp_path, WARM + textwrap.dedent(code))
    expect_success(run)
    assert run.stdout.split() == ["right"] * 10


# --- Interrupts --------------------------------------------------------------------------------


@needs_signals
def test_an_interrupt_in_the_middle_of_large_calls_ends_the_process(tmp_path):
    code = """
    def scene():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = np.empty_like(X)
        os.write(ready, b".")
        while True:
            dropout(X, 0.1, key=KEY, out=out)

    def interrupt(pid):
        os.read(begun, 1)
        time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGINT)

    begun, ready = os.pipe()
    for number in range(20):
        random.seed(number)
        status = forked(scene, meanwhile=interrupt)
        assert status == -signal.SIGINT, status
    os._exit(0)
    """
    run = python(tmp_path, WARM + textwrap.dedent(code))
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("KeyboardInterrupt\n") == 20
    assert "Fatal Python error" not in run.stderr


@needs_signals
def test_calls_after_hundreds_of_interrupts_are_right(tmp_path):
    code = """
    with unidrop.force_path("portable"):
        EXPECTED = dropout(X, 0.1, key=OTHER)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    random.seed(0)
    out = np.empty_like(X)
    for number in range(500):
        if number % 10 == 0:
            set_num_threads(3 + number % 3)
        try:
            # Again and again: an interrupt in a callback from C is printed, and not raised.
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.004), 0.05)
            while True:
                dropout(X, 0.1, key=KEY, out=out)
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not same(dropout(X, 0.1, key=OTHER, out=out), EXPECTED):
            sys.exit(f"wrong bits after interrupt {number}")
    """
    assert_calm(python(tmp_path, WARM + textwrap.dedent(code)))


def assert_calm(run):
    """Ask that a process ended well, whatever was printed of interrupts."""
    assert run.returncode == 0, run.stderr
    assert "Fatal Python error" not in run.stderr
