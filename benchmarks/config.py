"""How much is measured: the shapes, and how often each is timed."""

from dataclasses import dataclass, replace

__all__ = ["DEFAULT", "LARGE", "MIDDLE", "QUICK", "SMALL", "Effort", "Shape", "full"]

Shape = tuple[int, ...]

# The shapes for which the design's table of costs gives figures.
SMALL: Shape = (32, 128)
MIDDLE: Shape = (512, 1024)
LARGE: Shape = (1 << 24,)


@dataclass(frozen=True)
class Effort:
    """What a run measures.

    Attributes
    ----------
    shapes : tuple of tuple of int
        The sweep over sizes, in which the named shapes stand.
    elements : int
        Of the arrays for dtypes and for memory, which have one size.
    side : int
        Of the square matrices for layouts.
    images : tuple of int
        The shape for channels-last, in torch's order (N, C, H, W).
    rounds : int
        How often each candidate of a row is timed.
    block : float
        For how many seconds at least a candidate is called in each round.
    processes : int
        How many fresh processes a figure about starting up takes at most.
    """

    shapes: tuple[Shape, ...]
    elements: int
    side: int
    images: Shape
    rounds: int
    block: float
    processes: int


DEFAULT = Effort(
    shapes=((10**3,), SMALL, (10**4,), (10**5,), MIDDLE, (10**6,), LARGE),
    elements=1 << 22,
    side=4096,
    images=(32, 64, 56, 56),
    rounds=21,
    block=2e-3,
    processes=7,
)

QUICK = Effort(
    shapes=((10**3,), SMALL, MIDDLE),
    elements=1 << 18,
    side=256,
    images=(2, 16, 14, 14),
    rounds=3,
    block=1e-4,
    processes=1,
)


def full(effort: Effort) -> Effort:
    """Return an effort with 10^8 elements at the end of its sweep, which take 3 GB of memory."""
    return replace(effort, shapes=(*effort.shapes, (10**8,)))
