"""Check a GPU in less than eight minutes: bits, CUDA graphs, and time.

    python tools/gpu_check.py                 # on a machine with an NVIDIA GPU
    python tools/gpu_check.py --device cpu    # a trial of the script itself, without the matrix

It needs PyTorch for CUDA and `pip install ".[cli]"`. It runs four parts, each in every case:

1. The conformance matrix of PyTorch on the GPU. The mode "cuda-graph" replays graphs.
2. The matrix of JAX on the GPU, if JAX finds one.
3. Twenty replays of one CUDA graph of a seeded layer, compared with twenty calls on the CPU.
4. The time of one call: ours, `torch.nn.Dropout` and a multiply take turns in each round, and the
   medians count. The task "both" is a forward and a backward pass. "x multiply" and "x own" are
   the time as a multiple of the multiply's and of `torch.nn.Dropout`'s. "of copy" is the time of a
   copy of the array, or of two copies for "both", as a part of the time: 1 is the speed of memory.

The last lines state for each part whether it passed, failed, timed out or was not checked, and why.
The exit status is 0 if no part failed or timed out, 1 if one did, and 2 if a need is missing or an
argument is bad.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

if find_spec("torch") is None:
    print("PyTorch is not installed; this script needs PyTorch for CUDA", file=sys.stderr)
    sys.exit(2)

import torch
from torch import Tensor

import unidrop
from unidrop import Key
from unidrop.adapters.torch import Dropout, dropout

P, SEED, REPLAYS = 0.1, 42, 20
SIZES = tuple(1 << power for power in (12, 18, 22, 26))
# Seconds of each matrix, at most. They leave more than a minute for the other parts.
MATRIX = {"torch-cuda": 240, "jax-cuda": 120}
LOAD_SECONDS = 30
CLI = ("click", "jinja2", "ml_dtypes", "PIL", "rich")  # the modules of the extra cli

# Loads a backend in its own process, because JAX reserves most of the GPU's memory.
_LOAD = """
import sys
from unidrop.conformance import load_backends
(backend,) = load_backends(sys.argv[1:])
print(getattr(backend, "error", "") if getattr(backend, "is_missing", False) else "")
"""


def find_missing(device: str) -> list[str]:
    """Return a line for each need that is missing."""
    missing = []
    if device == "cuda":
        if not torch.cuda.is_available():
            missing.append(f"PyTorch {torch.__version__} finds no CUDA device")
        absent = [name for name in CLI if find_spec(name) is None]
        if absent:
            missing.append(f'pip install ".[cli]" installs {", ".join(absent)} for the matrix')
    return missing


def find_obstacle(backend: str) -> str:
    """Return why a backend does not run on this machine, or an empty string."""
    load = [sys.executable, "-c", _LOAD, backend]
    try:
        found = subprocess.run(
            load, timeout=LOAD_SECONDS, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"timed out after {LOAD_SECONDS} s, while it loaded"
    reason = ["", *found.stdout.splitlines()][-1]
    return reason and f"not checked: {reason}"


def check_matrix(backend: str, seconds: float) -> str:
    """Run the matrix of a backend, and return how it ended."""
    command = [sys.executable, "-m", "unidrop.cli", "conformance", "--backend", backend]
    with subprocess.Popen(command) as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _interrupt(process)
            return f"timed out after {seconds} s; bits may agree or differ"
    if status == 0:
        return "passed"
    return "failed: the report above has the reasons" if status == 1 else f"failed: status {status}"


def _interrupt(process: "subprocess.Popen[bytes]") -> None:
    """End a matrix by Ctrl-C, so that it ends the processes of its backends."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def check_replays(device: str) -> str:
    """Replay the CUDA graph of a layer, and return whether the CPU has the same masks."""
    layer, expected = Dropout(P, seed=SEED).to(device), Dropout(P, seed=SEED)
    x = torch.ones(1000, 37, device=device)
    layer(x)  # compiles the kernels
    layer.calls = 0
    replay: Callable[[], Tensor] = lambda: layer(x)  # noqa: E731 # replaced below
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x)
        layer.calls = 0

        def replay() -> Tensor:
            graph.replay()
            return output

    same = sum(torch.equal(replay().cpu(), expected(x.cpu())) for _ in range(REPLAYS))
    what = "replays" if device == "cuda" else "calls"
    print(f"{same} of {REPLAYS} {what} drop the elements of the CPU's calls")
    return "passed" if same == REPLAYS else f"failed: bits differ in {REPLAYS - same} {what}"


def measure(device: str, rounds: int) -> str:
    """Print a table of times; none fails."""
    print(f"{'dtype':9} {'elements':>10} {'task':9} {'candidate':12} {'us':>9} {'x multiply':>10} "
          f"{'x own':>7} {'of copy':>8}")  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        for size in SIZES:
            x = torch.randn(size, device=device).to(dtype)
            for task, calls in (("forward", _forward(x)), ("both", _both(x))):
                times = time_calls(calls, device, rounds)
                for name, seconds in times.items():
                    ratios = (seconds / times["multiply"], seconds / times["nn.Dropout"])
                    of_copy = times["copy"] * (2 if task == "both" else 1) / seconds
                    print(f"{str(dtype)[6:]:9} {size:10} {task:9} {name:12} {seconds * 1e6:9.1f} "
                          f"{ratios[0]:10.2f} {ratios[1]:7.2f} {of_copy:8.2f}")  # fmt: skip
    return "passed"


def _forward(x: Tensor) -> Mapping[str, Callable[[], Any]]:
    layer, own, out = Dropout(P, seed=SEED).to(x.device), torch.nn.Dropout(P), torch.empty_like(x)
    return {
        "layer": lambda: layer(x),
        "function": lambda: dropout(x, P, key=Key(SEED)),
        "nn.Dropout": lambda: own(x),
        "multiply": lambda: x * 1.1,
        "copy": lambda: out.copy_(x),
    }


def _both(x: Tensor) -> Mapping[str, Callable[[], Any]]:
    leaf, upstream = x.clone().requires_grad_(), torch.ones_like(x)
    candidates = dict(_forward(leaf))
    copy = candidates.pop("copy")
    both = {name: _add_backward(call, leaf, upstream) for name, call in candidates.items()}
    return {**both, "copy": torch.no_grad()(copy)}


def _add_backward(call: Callable[[], Tensor], leaf: Tensor, upstream: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(call(), leaf, upstream)


def time_calls(
    calls: Mapping[str, Callable[[], Any]], device: str, rounds: int
) -> dict[str, float]:
    """Return the median seconds of each call; in each round, every call runs in turn."""
    repeats = {name: _count_repeats(call, device) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken[name].append(_time(calls[name], repeats[name], device))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _count_repeats(call: Callable[[], Any], device: str) -> int:
    """Return how many calls take a millisecond, at least; the first call compiles."""
    _time(call, 1, device)
    return max(1, round(1e-3 / _time(call, 1, device)))


def _time(call: Callable[[], Any], repeats: int, device: str) -> float:
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (time.perf_counter() - begin) / repeats


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run_part(title: str, check: Callable[[], str]) -> str:
    """Run a part, and return how it ended; an error does not end the script."""
    print(f"\n--- {title}", flush=True)
    try:
        outcome = check()
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        outcome = f"failed: {type(error).__name__}, see the traceback above"
    print(outcome, flush=True)
    return outcome


def main() -> int:
    """Run the parts, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=21, help="timings (%(default)s)")
    arguments = parser.parse_args()
    device, rounds = arguments.device, arguments.rounds
    missing = find_missing(device)
    if missing:
        print(*missing, sep="\n", file=sys.stderr)
        return 2
    place = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{place}, PyTorch {torch.__version__}, unidrop {unidrop.__version__}")
    print(unidrop.explain_path(torch.ones(1, device=device)))
    parts: dict[str, Callable[[], str]] = {}
    for backend, seconds in MATRIX.items():
        obstacle = "not checked: the matrix is not run on the CPU"
        if device == "cuda":
            obstacle = find_obstacle(backend)
            print(f"{backend}: {obstacle or 'found'}", flush=True)
        parts[f"matrix of {backend}"] = (
            partial(str, obstacle) if obstacle else partial(check_matrix, backend, seconds)
        )
    parts["CUDA graph" if device == "cuda" else "calls"] = partial(check_replays, device)
    parts["times"] = partial(measure, device, rounds)
    outcomes = {title: run_part(title, part) for title, part in parts.items()}
    print("\n--- summary")
    for title, outcome in outcomes.items():
        print(f"{title:20} {outcome}")
    return int(any(outcome.startswith(("failed", "timed out")) for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
