"""PyTorch on the CPU, eager and compiled, compared with a multiply and with its own dropout."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.config import LARGE, MIDDLE, SMALL, Config, Shape
from benchmarks.fixtures import SCALE, P, key, one_thread, uniform
from benchmarks.memory import OWN_ATTENTION
from benchmarks.rows import Row, timed
from benchmarks.thresholds import Target, at_most, not_slower
from benchmarks.timing import Candidate
from unidrop import Key
from unidrop.adapters.torch import Dropout, dropout, scaled_dot_product_attention

__all__ = ["rows"]

_OWN = "F.dropout"
_LAYER = "unidrop layer"
_UNSEEDED = "unidrop layer, no seed"
_OURS = ("unidrop", _LAYER, _UNSEEDED)

# Both outputs are new memory. Where huge pages help, the pages of a multiply take most of its time.
_FORWARD = tuple(at_most(0.6, ours, "multiply") for ours in _OURS)
_BACKWARD = tuple(at_most(1.3, ours, "multiply") for ours in _OURS)
_ONE_THREAD = tuple(at_most(2.2, ours, "multiply") for ours in _OURS)


def rows(config: Config) -> Iterator[Row]:
    """Yield the sweep over sizes, forward and backward, compiled, layouts, dtypes, in place."""
    for name, build, large in (
        ("forward", _forward, _FORWARD),
        ("forward + backward", _backward, _BACKWARD),
    ):
        for shape in config.shapes:
            goal = not_slower(_OWN, *_OURS) + (large if shape == LARGE else ())
            yield Row("torch", name, shape, timed(build, shape), own=_OWN, targets=goal)
        if MIDDLE in config.shapes:
            measure = timed(build, MIDDLE, within=_one_thread)
            name = f"{name}, 1 thread"
            yield Row("torch", name, MIDDLE, measure, own=_OWN, targets=_ONE_THREAD)
    for shape in (shape for shape in (SMALL, MIDDLE, LARGE) if shape in config.shapes):
        compiled_goal: tuple[Target, ...] = not_slower(_OWN, "unidrop", _LAYER)
        if shape == SMALL:
            compiled_goal = tuple(at_most(1.3, ours, _OWN) for ours in ("unidrop", _LAYER))
            measure = timed(_compiled, shape, False, within=_one_thread)
            name = "compiled forward, 1 thread"
            yield Row("torch", name, shape, measure, own=_OWN, targets=compiled_goal)
            measure = timed(_compiled, shape, False)
            name = "compiled forward"
            yield Row("torch", name, shape, measure, own=_OWN, targets=compiled_goal)
        measure = timed(_compiled, shape, True)
        name = "compiled forward + backward"
        yield Row("torch", name, shape, measure, own=_OWN, targets=compiled_goal)
    yield Row(
        "torch",
        "channels-last",
        config.images,
        timed(_channels_last, config.images),
        base="contiguous",
        targets=(at_most(3, "channels-last", "contiguous"),),
    )
    shape = (config.elements,)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        name = f"forward, {str(dtype).removeprefix('torch.')}"
        yield Row("torch", name, shape, timed(_dtype, shape, dtype))
    shape = LARGE if LARGE in config.shapes else shape
    goal = (at_most(1.3, "unidrop", "multiply"), *not_slower(_OWN, "unidrop"))
    yield Row("torch", "in place", shape, timed(_in_place, shape), own=_OWN, targets=goal)
    shape = config.attention
    for name, goes_back in (("attention forward", False), ("attention forward + backward", True)):
        yield Row(
            "torch",
            name,
            shape,
            timed(_attention, shape, goes_back),
            base=OWN_ATTENTION,
            targets=(at_most(1.3, "unidrop", OWN_ATTENTION),),
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch and unidrop use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with one_thread():
            yield
    finally:
        torch.set_num_threads(before)


def _candidates(
    x: Tensor, finish: Callable[[Tensor], object] = lambda y: None
) -> Sequence[Candidate]:
    """Return all candidates for a tensor. ``finish`` processes each output."""
    seeded, unseeded = Dropout(P, seed=42), Dropout(P)
    return (
        Candidate("unidrop", lambda step: finish(dropout(x, P, key=key(step)))),
        Candidate(_LAYER, lambda step: finish(seeded(x))),
        Candidate(_UNSEEDED, lambda step: finish(unseeded(x))),
        Candidate("multiply", lambda step: finish(x * SCALE)),
        Candidate(_OWN, lambda step: finish(functional.dropout(x, P))),
    )


def _forward(shape: Shape) -> Sequence[Candidate]:
    return _candidates(torch.from_numpy(uniform(shape)))


def _backward(shape: Shape) -> Sequence[Candidate]:
    x = torch.from_numpy(uniform(shape)).requires_grad_()
    gradient = torch.ones(shape)

    def backward(y: Tensor) -> None:
        x.grad = None
        y.backward(gradient)

    return _candidates(x, backward)


def _compiled(shape: Shape, goes_back: bool) -> Sequence[Candidate]:
    """Return the candidates under torch.compile. The step is an argument, or the call number.

    The threads of compiled code spin while they wait for each other. If other processes use the
    cores, this costs a multiply milliseconds, unless OMP_WAIT_POLICY=passive is set.
    """
    x = torch.from_numpy(uniform(shape)).requires_grad_(goes_back)
    gradient = torch.ones(shape)
    site = Key(42)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "unidrop": torch.compile(lambda x, step: dropout(x, P, key=site.fold_in(step))),
        "multiply": torch.compile(lambda x, step: x * SCALE),
        _OWN: torch.compile(lambda x, step: functional.dropout(x, P)),
    }
    layer = torch.compile(Dropout(P, seed=42))
    functions[_LAYER] = lambda x, step: layer(x)

    def candidate(name: str) -> Candidate:
        def run(step: int) -> None:
            y = functions[name](x, torch.tensor(step))
            if goes_back:
                x.grad = None
                y.backward(gradient)

        return Candidate(name, run)

    return [candidate(name) for name in functions]


def _channels_last(shape: Shape) -> Sequence[Candidate]:
    x = torch.from_numpy(uniform(shape))
    strided = x.to(memory_format=torch.channels_last)
    return (
        Candidate("contiguous", lambda step: dropout(x, P, key=key(step))),
        Candidate("channels-last", lambda step: dropout(strided, P, key=key(step))),
        Candidate(_OWN, lambda step: functional.dropout(strided, P)),
    )


def _dtype(shape: Shape, dtype: torch.dtype) -> Sequence[Candidate]:
    x = torch.from_numpy(uniform(shape)).to(dtype)
    return (
        Candidate("unidrop", lambda step: dropout(x, P, key=key(step))),
        Candidate("multiply", lambda step: x * SCALE),
        Candidate(_OWN, lambda step: functional.dropout(x, P)),
    )


def _in_place(shape: Shape) -> Sequence[Candidate]:
    x, multiplied, dropped = (torch.from_numpy(uniform(shape)) for _ in range(3))
    return (
        Candidate("unidrop", lambda step: dropout(x, P, inplace=True, key=key(step))),
        # By 1, because a larger number would soon reach infinity.
        Candidate("multiply", lambda step: multiplied.mul_(1.0)),
        Candidate(_OWN, lambda step: functional.dropout(dropped, P, inplace=True)),
    )


def _attention(shape: Shape, goes_back: bool) -> Sequence[Candidate]:
    inputs = [torch.randn(shape).requires_grad_(goes_back) for _ in range(3)]
    gradient = torch.ones(shape)

    def candidate(name: str, call: Callable[[int], Tensor]) -> Candidate:
        def run(step: int) -> None:
            y = call(step)
            if goes_back:
                torch.autograd.grad(y, inputs, gradient)

        return Candidate(name, run)

    own = functional.scaled_dot_product_attention
    return (
        candidate(
            "unidrop",
            lambda step: scaled_dot_product_attention(*inputs, dropout_p=P, dropout_key=key(step)),
        ),
        candidate(OWN_ATTENTION, lambda step: own(*inputs, dropout_p=P)),
    )
