"""PyTorch on the CPU, eager and compiled, compared with a multiply and with its own dropout."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

import unidrop
from benchmarks.config import LARGE, MIDDLE, SMALL, Config, Shape
from benchmarks.fixtures import SCALE, P, key, uniform
from benchmarks.rows import Row, timed
from benchmarks.thresholds import Target, at_most, faster
from benchmarks.timing import Candidate
from unidrop import Key
from unidrop.adapters.torch import Dropout, dropout

__all__ = ["rows"]

_OWN = "F.dropout"
_OURS = ("unidrop", "unidrop module")

_FORWARD_TARGETS: dict[Shape, tuple[Target, ...]] = {
    SMALL: tuple(at_most(1, ours, _OWN) for ours in _OURS)
}
_BACKWARD_TARGETS: dict[Shape, tuple[Target, ...]] = {
    SMALL: tuple(at_most(1.1, ours, _OWN) for ours in _OURS),
    MIDDLE: tuple(
        target
        for ours in _OURS
        for target in (at_most(1.3, ours, "multiply"), faster(8, ours, _OWN))
    ),
    LARGE: tuple(
        target
        for ours in _OURS
        for target in (at_most(1.3, ours, "multiply"), faster(3, ours, _OWN))
    ),
}


def rows(config: Config) -> Iterator[Row]:
    """Yield the sweep over sizes, forward and backward, channels-last, dtypes, and in place."""
    for shape in config.shapes:
        targets = _FORWARD_TARGETS.get(shape, ())
        yield Row("torch", "forward", shape, timed(_forward, shape), own=_OWN, targets=targets)
    for shape in config.shapes:
        if shape in _BACKWARD_TARGETS:
            yield Row(
                "torch",
                "forward + backward",
                shape,
                timed(_backward, shape),
                targets=_BACKWARD_TARGETS[shape],
            )
    for shape in config.shapes:
        if shape in _BACKWARD_TARGETS:
            name = "compiled forward + backward"
            # For the smallest shape, even a compiled multiply takes over half of F.dropout's time.
            targets = () if shape == SMALL else (faster(2, "unidrop", _OWN),)
            yield Row("torch", name, shape, timed(_compiled, shape), targets=targets)
    yield Row(
        "torch",
        "channels-last",
        config.images,
        timed(_channels_last, config.images),
        base="contiguous",
        targets=(at_most(4, "channels-last", "contiguous"),),
    )
    shape = (config.elements,)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield Row("torch", name, shape, timed(_dtype, shape, dtype))
    yield Row("torch", "in place", shape, timed(_in_place, shape))


def _candidates(
    x: Tensor, finish: Callable[[Tensor], object] = lambda y: None
) -> Sequence[Candidate]:
    """Return all candidates for a tensor. ``finish`` processes each output."""
    module = Dropout(P, seed=42)

    def drop(step: int) -> None:
        finish(dropout(x, P, key=key(step)))

    return (
        Candidate("unidrop", drop),
        Candidate("unidrop module", lambda step: finish(module(x))),
        Candidate("portable", drop, lambda: unidrop.force_path("portable")),
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


def _compiled(shape: Shape) -> Sequence[Candidate]:
    """Return the candidates under torch.compile. The step is an argument, or the call number.

    The threads of compiled code spin while they wait for each other. If other processes use the
    cores, this costs a multiply milliseconds, unless OMP_WAIT_POLICY=passive is set.
    """
    x = torch.from_numpy(uniform(shape)).requires_grad_()
    gradient = torch.ones(shape)
    site = Key(42)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "unidrop": torch.compile(lambda x, step: dropout(x, P, key=site.fold_in(step))),
        "multiply": torch.compile(lambda x, step: x * SCALE),
        _OWN: torch.compile(lambda x, step: functional.dropout(x, P)),
    }
    module = torch.compile(Dropout(P, seed=42))
    functions["unidrop module"] = lambda x, step: module(x)

    def candidate(name: str) -> Candidate:
        def run(step: int) -> None:
            x.grad = None
            functions[name](x, torch.tensor(step)).backward(gradient)

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
