"""Forks and pools of processes: a child computes the same bits, and never hangs."""

import ctypes
import os
import sys

import numpy as np
import pytest
from thread_scripts import LIMIT, assert_success, needs_fork, run_script

from unidrop import Key, threads
from unidrop.adapters.numpy import dropout

pytest.importorskip("llvmlite", reason="only kernels use threads, and they need llvmlite")


@needs_fork
def test_computes_same_bits_in_fork_after_call(tmp_path):
    code = """
    def child():
        assert threading.active_count() == 1
        for _ in range(3):
            check_bits()
            check_bits(OTHER)
        assert run_in_fork(check_bits) == 0  # and its own child

    for _ in range(3):
        assert run_in_fork(child) == 0
        assert run_in_fork(lambda: (check_bits(), os._exit(5))) == 5
        check_bits()
    """
    assert_success(run_script(tmp_path, code, warm=True))


@pytest.mark.slow
@needs_fork
def test_computes_same_bits_in_fork_during_other_calls(tmp_path):
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
        status = run_in_fork(lambda: (check_bits(), set_num_threads(3), check_bits(OTHER)))
        assert status == 0, status
    stop.set()
    [thread.join() for thread in others]
    check_bits()
    """
    assert_success(run_script(tmp_path, code, warm=True))


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("delay", [0, 0.05, 0.1, 0.2, 0.4])
def test_computes_same_bits_in_fork_during_compilation(tmp_path, delay):
    code = f"""
    set_num_threads(3)
    with unidrop.force_path("portable"):
        EXPECTED = {{name: dropout(X.astype(name), 0.1, key=KEY) for name in ("f4", "f8")}}

    def call(name):
        if not same_bits(dropout(X.astype(name), 0.1, key=KEY), EXPECTED[name]):
            os._exit(99)

    compiler = threading.Thread(target=call, args=("f4",))
    compiler.start()
    time.sleep({delay})
    assert run_in_fork(lambda: call("f4")) == 0
    assert run_in_fork(lambda: call("f8")) == 0
    compiler.join()
    call("f4")
    """
    assert_success(run_script(tmp_path, code))


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("path", ["portable", "fused"])
def test_never_hangs_in_fork_during_first_call(tmp_path, path):
    forks = int(os.environ.get("UNIDROP_TEST_FORKS", 8))
    code = f"""
    import mmap

    def call(path):
        with unidrop.force_path(path):
            return dropout(X, 0.1, key=KEY)

    def check():
        if not same_bits(call("{path}"), EXPECTED):
            os._exit(99)

    def measure():
        begin = time.perf_counter()
        check()
        SECONDS[0] = time.perf_counter() - begin

    def first_call():
        '''Fork during another thread's call, the first call of this process.'''
        sys.setswitchinterval(1e-5)
        other = threading.Thread(target=check)
        moment = time.perf_counter() + delay
        other.start()
        while time.perf_counter() < moment:
            pass  # a sleep would last too long while other processes are busy
        status = run_in_fork(check, {LIMIT} / 3)
        other.join()
        sys.exit(status)

    set_num_threads(3)
    EXPECTED = np.frombuffer(mmap.mmap(-1, X.nbytes), X.dtype)  # shared with children
    SECONDS = np.frombuffer(mmap.mmap(-1, 8))
    assert run_in_fork(lambda: np.copyto(EXPECTED, call("portable"))) == 0
    assert run_in_fork(measure, {LIMIT} / 3) == 0
    for number in range({forks}):
        # Half of the forks fall into the first imports, the shortest part of the call.
        delay = random.uniform(0, random.choice([0.02, SECONDS[0]]))
        status = run_in_fork(first_call, {LIMIT} / 2)
        if status != 0:
            sys.exit(f"fork {{number}}, after {{delay:.4f}} of {{SECONDS[0]:.4f}} s: {{status}}")
    """
    assert_success(run_script(tmp_path, code, timeout=LIMIT + 20 * forks))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("cached", [True, False], ids=["compiled before", "compiled by each"])
def test_computes_same_bits_in_process_pools(tmp_path, method, cached):
    import multiprocessing

    pool = "context.Pool(2)" if cached else "ProcessPoolExecutor(2, mp_context=context)"
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
        with {pool} as pool:
            assert list(pool.map(work, range(4))) == expected
        assert [work(number) for number in range(4)] == expected
    """
    assert_success(run_script(tmp_path, code))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_computes_same_bits_in_data_loader_workers(tmp_path, method):
    import multiprocessing

    epochs = 2 if method == "fork" else 1  # workers that are spawned import PyTorch again
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
        for _ in range({epochs}):
            loader = DataLoader(
                data, batch_size=None, num_workers=2, multiprocessing_context="{method}"
            )
            for (y, z, mask), (y0, z0, mask0) in zip(loader, expected, strict=True):
                assert same_bits(y.numpy(), y0.numpy()) and same_bits(z.numpy(), z0.numpy())
                assert same_bits(np.asarray(mask), mask0)
        check_bits()
    """
    if sys.platform == "linux" and not os.access("/dev/shm", os.W_OK):
        pytest.skip("a data loader's workers need shared memory, and /dev/shm is not writable")
    assert_success(run_script(tmp_path, code))


def test_finishes_alone_in_child_of_handler_that_forks(monkeypatch):
    """A child that forks in the middle of a call waits for no worker, which it does not have."""

    def claim_and_fork(task, is_worker):
        counters = (ctypes.c_int64 * 2).from_address(task)
        counters[:] = [count + 1 for count in counters]  # as a worker that is not in the child
        reset()
        return False

    def run_in_child(kernel, task, work_items, keep_alive):
        if not forked:
            forked.append(1)
            return run(claim_and_fork, task, 1, keep_alive)
        return run(kernel, task, work_items, keep_alive)

    from unidrop.fused import task

    forked, run, reset = [], threads.run, threads._reset_after_fork
    for name in ("_pool", "_lock", "_forks"):
        monkeypatch.setattr(threads, name, getattr(threads, name))
    monkeypatch.setattr(task, "run", run_in_child)
    x = np.arange(1_200_000.0)
    y = dropout(x, 0.5, key=Key(42))
    assert forked
    np.testing.assert_array_equal(y, dropout(x, 0.5, key=Key(42)))
    forked.clear()
    with pytest.raises(RuntimeError, match="forked during dropout in place"):
        dropout(x, 0.5, key=Key(42), out=x)
