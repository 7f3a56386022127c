"""Threads that help with large arrays: their number, the results, and the memory they hold."""

import os
import re
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from thread_scripts import LIMIT, assert_success, run_script

import unidrop
import unidrop.adapters.numpy as for_numpy
import unidrop.adapters.torch as for_torch
from unidrop import Key, get_num_threads, keep_mask, set_num_threads, threads

pytest.importorskip("llvmlite", reason="only kernels use threads, and they need llvmlite")

KEY = Key(42).fold_in("encoder/0").fold_in(7)
LARGE = (20 << 16) + 5  # elements, in 21 work items
SQUARE = (1300, 1100)  # its transpose has more tiles than a call needs to use workers


@pytest.fixture(autouse=True)
def number():
    """Restore the number of threads."""
    before = get_num_threads()
    yield before
    set_num_threads(before)


def portable(function, *args, **kwargs):
    """Return the result of a function without kernels, and so without threads."""
    with unidrop.force_path("portable"):
        return function(*args, **kwargs)


def same_bits(actual, expected):
    """Return whether two arrays have the same dtype, shape and bits, at any strides."""
    if isinstance(expected, torch.Tensor):
        actual, expected = (t.detach().contiguous().view(torch.uint8) for t in (actual, expected))
        return torch.equal(actual, expected)
    return (actual.dtype, actual.shape) == (expected.dtype, expected.shape) and np.array_equal(
        *(np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (actual, expected))
    )


def numbers(*shape, dtype="float32"):
    """Return the same ordinary numbers at every call."""
    return np.random.default_rng(0).standard_normal(shape, dtype="float32").astype(dtype)


# --- The number of threads ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 33, 1024, np.int64(3), np.uint8(4)], ids=repr)
def test_returns_number_that_was_set(number):
    set_num_threads(number)
    assert get_num_threads() == number
    assert type(get_num_threads()) is int


@pytest.mark.parametrize("number", [0, -1, np.int64(0), 1025, 10**30], ids=repr)
def test_rejects_number_beyond_limits(number):
    before = get_num_threads()
    with pytest.raises(ValueError, match=rf"number must be from 1 to 1024, got {number}"):
        set_num_threads(number)
    assert get_num_threads() == before


@pytest.mark.parametrize("number", [True, False, 2.0, "2", b"2", None, [2], np.True_], ids=repr)
def test_rejects_non_integer_number(number):
    before = get_num_threads()
    expected = f"number must be an integer, got {number!r}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        set_num_threads(number)
    assert get_num_threads() == before


def test_defaults_to_number_of_available_cpus(tmp_path):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this platform can't restrict the CPUs of a process")
    code = """
    assert get_num_threads() == len(os.sched_getaffinity(0))

    def on_one():
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        import unidrop.threads
        import importlib
        importlib.reload(unidrop.threads)
        assert unidrop.threads.get_num_threads() == 1

    assert run_in_fork(on_one) == 0
    """
    assert_success(run_script(tmp_path, code))


@pytest.fixture
def unset(monkeypatch):
    """Forget the number of threads, and the variables that set its default."""
    for variable in ("UNIDROP_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(threads, "_num_threads", None)
    monkeypatch.setattr(threads, "cpu_count", lambda: 7)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"UNIDROP_NUM_THREADS": "3"}, 3),
        ({"UNIDROP_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"UNIDROP_NUM_THREADS": "", "OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "99999"}, 1024),
        ({"OMP_NUM_THREADS": " 6 "}, 6),
        ({"OMP_NUM_THREADS": "0"}, 7),
        ({"OMP_NUM_THREADS": "-2"}, 7),
        ({"OMP_NUM_THREADS": "rubbish"}, 7),
        ({"OMP_NUM_THREADS": ","}, 7),
        ({"OMP_NUM_THREADS": ""}, 7),
        ({}, 7),
    ],
    ids=str,
)
def test_reads_default_from_environment(unset, monkeypatch, environment, expected):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert get_num_threads() == expected


def test_limits_default_to_1024(unset, monkeypatch):
    monkeypatch.setattr(threads, "cpu_count", lambda: 2000)
    assert get_num_threads() == 1024


@pytest.mark.parametrize("value", ["0", "-1", "many", "2.5", "4,2", "99999"])
def test_names_environment_variable_with_bad_number(unset, monkeypatch, value):
    monkeypatch.setenv("UNIDROP_NUM_THREADS", value)
    for_numpy.dropout(X[:100], 0.5, key=KEY)
    message = f"UNIDROP_NUM_THREADS must be .*{value}"
    for call in (get_num_threads, lambda: for_numpy.dropout(X, 0.5, key=KEY)):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    set_num_threads(2)
    assert same_bits(RESULTS["rows"](), portable(RESULTS["rows"]))


def test_keeps_number_set_during_lookup_of_default(unset, monkeypatch):
    def look_up():
        setter.start()
        setter.join(0.2)  # it waits for the lookup
        return 3

    setter = threading.Thread(target=set_num_threads, args=(7,))
    monkeypatch.setattr(threads, "_get_default", look_up)
    get_num_threads()
    setter.join(LIMIT)
    assert get_num_threads() == 7


def test_starts_workers_for_large_array():
    set_num_threads(3)
    before = set(threading.enumerate())
    for_numpy.dropout(numbers(LARGE), key=KEY)
    assert len(set(threading.enumerate()) - before) > 0


def test_starts_no_worker_with_one_thread():
    set_num_threads(1)
    before = set(threading.enumerate())
    for_numpy.dropout(numbers(LARGE), key=KEY)
    assert set(threading.enumerate()) <= before


def test_ends_workers_after_change_of_number():
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
    "broadcast": lambda: for_numpy.dropout(
        X[: 1300 * 1000].reshape(1300, 1000), 0.1, key=KEY, broadcast_axes=(1,)
    ),
    "mask": lambda: keep_mask((LARGE,), 0.1, KEY),
    "window": lambda: keep_mask(SQUARE, 0.1, KEY, global_shape=(3000, 3000), start=(7, 5)),
}


@pytest.fixture(scope="module", params=RESULTS)
def result(request):
    """Return a function, and its result without threads."""
    return RESULTS[request.param], portable(RESULTS[request.param])


@pytest.mark.parametrize("number", [1, 2, 3, 8, 33])
def test_computes_same_bits_with_any_number_of_threads(result, number):
    function, expected = result
    set_num_threads(number)
    for _ in range(3):
        assert same_bits(function(), expected)


@pytest.mark.slow
def test_computes_same_bits_while_number_changes():
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


def test_computes_same_bits_if_no_thread_starts(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    expected = portable(RESULTS["rows"])
    set_num_threads(5)
    monkeypatch.setattr(threading.Thread, "start", start)
    for _ in range(3):
        assert same_bits(RESULTS["rows"](), expected)


@pytest.mark.slow
def test_computes_same_bits_in_ten_thousand_concurrent_calls(tmp_path):
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
            if size == "large":  # two functions for each case, all functions in total
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
    run = run_script(tmp_path, code)
    assert_success(run)
    assert run.stdout.strip() == "10000"


# --- Memory ------------------------------------------------------------------------------------


def assert_released(*references):
    """Wait until arrays are freed."""
    deadline = time.monotonic() + LIMIT
    while any(reference() is not None for reference in references):
        assert time.monotonic() < deadline, "an array is never freed"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [1, 2, 33])
def test_releases_arrays_after_call(number):
    set_num_threads(number)
    for _ in range(5):
        x, out = numbers(LARGE), np.empty(LARGE, "float32")
        y = for_numpy.dropout(x, key=KEY)
        for_numpy.dropout(x, key=KEY, out=out)
        tensor = torch.ones(LARGE, requires_grad=True)
        z = for_torch.dropout(tensor, key=KEY)
        references = [weakref.ref(a) for a in (x, y, out, tensor, z)]
        del x, y, out, tensor, z
        assert_released(*references)


def test_releases_arrays_after_change_of_number():
    x = numbers(LARGE)
    references = []
    for number in (2, 9, 3, 1, 33, 2):
        set_num_threads(number)
        y = for_numpy.dropout(x, key=KEY)
        references.append(weakref.ref(y))
    del y
    assert_released(*references)


def test_releases_arrays_if_no_thread_starts(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    set_num_threads(5)
    monkeypatch.setattr(threading.Thread, "start", start)
    x = numbers(LARGE)
    y = for_numpy.dropout(x, key=KEY)
    references = [weakref.ref(x), weakref.ref(y)]
    del x, y
    assert [reference() for reference in references] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("callers", [1, 8])
def test_bounds_memory_of_a_thousand_large_calls(tmp_path, callers):
    pytest.importorskip("resource", reason="this platform does not report the peak of memory")
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
    assert_success(run_script(tmp_path, code))


def test_starts_one_thread_fewer_than_the_number(tmp_path):
    code = """
    assert threading.active_count() == 1
    set_num_threads(3)
    check_bits()
    assert threading.active_count() == 3, threading.enumerate()
    """
    assert_success(run_script(tmp_path, code))


@pytest.mark.parametrize(("size", "keeps_lock"), [(1 << 14, True), (1 << 15, False)])
def test_keeps_lock_of_python_for_small_arrays_alone(size, keeps_lock):
    from unidrop.fused import prepare

    prepared = prepare(np.dtype("float32"), (size,), None, (1,))
    kernel = prepared.kernel
    assert prepared.run_alone is (kernel.run_alone if keeps_lock else kernel.run_unlocked)
    # ctypes keeps the lock in functions with this flag.
    assert bool(kernel.run_alone._flags_ & 4) > bool(kernel.run_unlocked._flags_ & 4)
