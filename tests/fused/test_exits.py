"""Exits of a process while threads process large arrays, and calls during the exit."""

import pytest
from thread_scripts import assert_success, needs_fork, run_script

pytest.importorskip("llvmlite", reason="only kernels use threads, and they need llvmlite")

CHILDREN = 6  # which a script forks, one after another

EXITS = {
    "returns": ("pass", 0),
    "exits": ("sys.exit(3)", 3),
    "raises": ("raise KeyError('uncaught')", 1),
    "exits at once": ("os._exit(4)", 4),
}


def assert_clean_exit(run, end):
    """Check that a script and its children exited, and printed only expected errors."""
    assert "Fatal Python error" not in run.stderr
    assert "Segmentation fault" not in run.stderr
    assert "WRONG" not in run.stderr
    if end == "raises":
        assert run.stderr.count("KeyError: 'uncaught'") == run.stderr.count("Traceback") == CHILDREN
    else:
        assert run.stderr == ""
    assert run.returncode == 0


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("end", EXITS)
@pytest.mark.parametrize("kind", ["daemons", "others"])
def test_exits_during_large_calls_of_other_threads(tmp_path, kind, end):
    statement, status = EXITS[end]
    repeat = "while True" if kind == "daemons" else "for _ in range(20)"
    code = f"""
    with unidrop.force_path("portable"):
        EXPECTED = dropout(X, 0.1, key=KEY)

    def call():
        out = np.empty_like(X)
        {repeat}:
            if not same_bits(dropout(X, 0.1, key=KEY, out=out), EXPECTED):
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
    for _ in range({CHILDREN}):
        random.seed(_)
        status = run_in_fork(scene)
        if status != {status}:
            sys.exit(f"ended with status {{status}}")
    os._exit(0)
    """
    assert_clean_exit(run_script(tmp_path, code, warm=True), end)


@pytest.mark.slow
@pytest.mark.parametrize("end", EXITS)
def test_exits_without_fork(tmp_path, end):
    statement, status = EXITS[end]
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
    run = run_script(tmp_path, code, warm=True)
    assert run.returncode == status
    assert "Fatal Python error" not in run.stderr
    assert run.stderr.count("Traceback") == (end == "raises")


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("end", ["returns", "exits", "raises"])
def test_computes_same_bits_in_atexit_calls(tmp_path, end):
    statement, status = EXITS[end]
    code = f"""
    def scene():
        atexit.register(lambda: print("last", file=sys.stdout, flush=True))
        atexit.register(check_bits)
        atexit.register(lambda: (set_num_threads(6), check_bits(OTHER)))
        check_bits()
        {statement}

    for _ in range({CHILDREN}):
        status = run_in_fork(scene)
        assert status == {status}, status
    os._exit(0)
    """
    run = run_script(tmp_path, code, warm=True)
    assert_clean_exit(run, end)
    assert run.stdout.split() == ["last"] * CHILDREN


def test_computes_same_bits_in_first_call_at_exit(tmp_path):
    code = """
    set_num_threads(4)
    atexit.register(lambda: (check_bits(), print("right", flush=True)))
    """
    run = run_script(tmp_path, code)
    assert_success(run)
    assert run.stdout.split() == ["right"]


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("cyclic", [False, True], ids=["global", "cyclic"])
def test_computes_same_bits_in_finalizers_at_exit(tmp_path, cyclic):
    code = f"""
    class Last:
        def __init__(self):
            self.itself = self if {cyclic} else None

        def __del__(self, check_bits=check_bits, os=os):
            check_bits()
            os.write(1, b"right ")

    def scene():
        global last
        gc.unfreeze()  # the interpreter does not finalize what is frozen
        last = Last()
        check_bits()

    for _ in range({CHILDREN}):
        assert run_in_fork(scene) == 0
    os._exit(0)
    """
    run = run_script(tmp_path, code, warm=True)
    assert_success(run)
    assert run.stdout.split() == ["right"] * CHILDREN
