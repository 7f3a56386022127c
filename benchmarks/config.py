"""The configuration of a run: the shapes, and the number of timings."""

from dataclasses import dataclass, replace

__all__ = ["DEFAULT", "LARGE", "MIDDLE", "QUICK", "SMALL", "Config", "Shape", "full"]

Shape = tuple[int, ...]

# The shapes that have targets.
SMALL: Shape = (32, 128)
MIDDLE: Shape = (512, 1024)
LARGE: Shape = (1 << 24,)


@dataclass(frozen=True)
class Config:
    """The configuration of a run.

    Attributes
    ----------
    shapes : tuple of tuple of int
        The sweep over sizes. It includes the named shapes.
    elements : int
        Number of elements of the arrays for dtypes and for memory.
    side : int
        Number of rows and columns of the square matrices for layouts.
    images : tuple of int
        Shape of the channels-last images, in PyTorch's order (N, C, H, W).
    attention : tuple of int
        Shape of queries, keys and values: batch, heads, length, features.
    rounds : int
        Number of timings of each candidate of a row.
    block : float
        Minimum time of a candidate in each round, in seconds.
    processes : int
        Maximum number of child processes for a startup figure.
    """

    shapes: tuple[Shape, ...]
    elements: int
    side: int
    images: Shape
    attention: Shape
    rounds: int
    block: float
    processes: int


DEFAULT = Config(
    shapes=((10**2,), (10**3,), SMALL, (10**4,), (10**5,), MIDDLE, (10**6,), LARGE),
    elements=1 << 22,
    side=4096,
    images=(32, 64, 56, 56),
    attention=(1, 4, 3072, 64),
    rounds=21,
    block=2e-3,
    processes=7,
)

QUICK = Config(
    shapes=((10**2,), SMALL),
    elements=1 << 18,
    side=256,
    images=(2, 16, 14, 14),
    attention=(1, 2, 64, 16),
    rounds=3,
    block=1e-4,
    processes=1,
)


def full(config: Config) -> Config:
    """Return the configuration with a last shape of 10^8 elements, which needs 3 GB of memory."""
    return replace(config, shapes=(*config.shapes, (10**8,)))
