"""The objects whose methods run now."""

from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["iterate_callers"]


def iterate_callers(frame: FrameType | None) -> Iterator[tuple[FrameType, Any]]:
    """Yield a frame and its callers, each with the ``self`` of its method, or None.

    Before Python 3.13, ``f_locals`` keeps the values of all variables alive until the frame
    returns. So this reads it only in methods, and in functions inside them that use ``self``.

    Parameters
    ----------
    frame : frame
        The innermost frame.

    Examples
    --------
    >>> import sys
    >>> class Model:
    ...     def find(self):
    ...         return next(iterate_callers(sys._getframe()))[1]
    >>> model = Model()
    >>> model.find() is model
    True
    """
    while frame is not None:
        code = frame.f_code
        is_method = code.co_varnames[:1] == ("self",) or "self" in code.co_freevars
        yield frame, frame.f_locals.get("self") if is_method else None
        frame = frame.f_back
