"""The drop rate p: its validation, its integer threshold and its scale."""

import struct
from typing import Any, NamedTuple

__all__ = ["KEEP_NOTHING", "Rate", "checked_probability"]

#: The threshold that no number reaches.
KEEP_NOTHING = 1 << 32

_ARRAY_HINT = ": pass a Python float"


def checked_probability(p: Any, name: str = "p") -> float:
    """Return a valid drop rate as a float; raises as `Rate.from_p`."""
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise TypeError(
            f"dropout probability {name} must be a Python int or float between 0 and 1 "
            f"(0.1 in float32 is another number, with another mask), "
            f"got {p!r} of type {type(p).__name__}{_ARRAY_HINT if hasattr(p, 'shape') else ''}"
        )
    if not 0 <= p <= 1:
        # The message of the frameworks.
        raise ValueError(rf"dropout probability {name} has to be between 0 and 1, but got {p}")
    return float(p)


class Rate(NamedTuple):
    """A validated drop rate.

    Attributes
    ----------
    p : float
        The probability of dropping an element, in [0, 1], in double precision.
    threshold : int
        ``round_half_even(p * 2**32)``: an element is kept where its word is at least this.
    scale : float
        ``1 / (1 - p)`` in double precision; 0.0 if p is 1 and nothing is kept. Some members of the
        family have another scale.
    """

    p: float
    threshold: int
    scale: float

    @classmethod
    def from_p(cls, p: Any, name: str = "p") -> "Rate":
        """Validate a drop rate.

        Parameters
        ----------
        p : int or float
            In [0, 1]. ``numpy.float64`` is a float. A narrower float is another number: its masks
            would differ in one of 10^8 elements or so. `unidrop.schedule` accepts arrays too.
        name : str, default "p"
            The name of the argument in error messages.

        Raises
        ------
        TypeError
            If p is not a Python int or float, or is a bool.
        ValueError
            If p is NaN or outside [0, 1].

        Examples
        --------
        >>> Rate.from_p(0.25)
        Rate(p=0.25, threshold=1073741824, scale=1.3333333333333333)
        """
        p = checked_probability(p, name)
        # Scaling by a power of two is exact, and round() rounds half to even.
        return cls(p, round(p * 2.0**32), 1.0 / (1.0 - p) if p < 1 else 0.0)

    @classmethod
    def from_keep_prob(cls, keep_prob: Any) -> "Rate":
        """Validate ``keep_prob`` and return the rate ``p = 1 - keep_prob`` (double precision).

        Raises
        ------
        TypeError, ValueError
            As `from_p`, naming ``keep_prob``.

        Examples
        --------
        >>> Rate.from_keep_prob(0.75).p
        0.25
        """
        return cls.from_p(1.0 - cls.from_p(keep_prob, "keep_prob").p)

    def with_scale(self, scale: float) -> "Rate":
        """Return the rate of the same decisions with another scale.

        Examples
        --------
        >>> Rate.from_p(0.25).with_scale(1.0)
        Rate(p=0.25, threshold=1073741824, scale=1.0)
        """
        return self._replace(scale=scale)

    @property
    def is_scheduled(self) -> bool:
        """Whether the rate is an array whose value this process does not know."""
        return False

    @property
    def keeps_nothing(self) -> bool:
        """Whether every element is dropped, whatever its word."""
        return self.threshold == KEEP_NOTHING

    def scale_in(self, dtype: str) -> float:
        """Return the scale rounded to a compute dtype: "float64", or "float32" (ties to even)."""
        return self.scale if dtype == "float64" else _to_float32(self.scale)


def _to_float32(value: float) -> float:
    """Round a double to the nearest float32, as C and IEEE 754 do."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
