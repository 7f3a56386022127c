"""The objects whose methods run now."""

from types import FrameType
from typing import Any

__all__ = ["list_callers"]


def list_callers(frame: FrameType | None) -> list[tuple[FrameType, Any]]:
    """Return a frame and its callers, each with the ``self`` of its method, or None.

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
    ...         return list_callers(sys._getframe())[0][1]
    >>> model = Model()
    >>> model.find() is model
    True
    """
    callers = []
    while frame is not None:
        code = frame.f_code
        is_method = code.co_varnames[:1] == ("self",) or "self" in code.co_freevars
        callers.append((frame, frame.f_locals.get("self") if is_method else None))
        frame = frame.f_back
    return callers
