"""Signals during large calls: the process ends, or continues with the same bits."""

import pytest
from thread_scripts import needs_signals, run_script

pytest.importorskip("llvmlite", reason="only kernels use threads, and they need llvmlite")


@pytest.mark.slow
@needs_signals
def test_ends_process_by_interrupt_of_large_calls(tmp_path):
    code = """
    def call():
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
        status = run_in_fork(call, meanwhile=interrupt)
        assert status == -signal.SIGINT, status
    os._exit(0)
    """
    run = run_script(tmp_path, code, warm=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("KeyboardInterrupt\n") == 20
    assert "Fatal Python error" not in run.stderr


@pytest.mark.slow
@needs_signals
def test_computes_same_bits_after_hundreds_of_interrupts(tmp_path):
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
            # Repeat: Python prints an interrupt in a callback from C instead of raising it.
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.004), 0.05)
            while True:
                dropout(X, 0.1, key=KEY, out=out)
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not same_bits(dropout(X, 0.1, key=OTHER, out=out), EXPECTED):
            sys.exit(f"wrong bits after interrupt {number}")
    """
    run = run_script(tmp_path, code, warm=True)
    assert run.returncode == 0, run.stderr
    assert "Fatal Python error" not in run.stderr
