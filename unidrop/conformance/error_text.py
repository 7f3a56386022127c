"""Errors as text that every report can hold."""

__all__ = ["error_text", "writable"]


def error_text(error: BaseException) -> str:
    """Return an error's type and message as writable text, even if the message cannot be made.

    Examples
    --------
    >>> error_text(ValueError("p must be a number"))
    'ValueError: p must be a number'
    """
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = f"{type(error).__name__}: its message raises an error"
    return writable(text)


def writable(text: str) -> str:
    """Return text that UTF-8 can encode, with escapes for anything else."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
