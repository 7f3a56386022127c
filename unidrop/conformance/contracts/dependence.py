"""Which contracts can't hold where others do not, so that a reader of many failures can begin."""

from collections.abc import Collection, Iterator, Mapping

__all__ = ["RESTS_ON", "roots"]

#: For a contract, those that it takes for granted: where one of them does not hold, this may fail
#: for no reason of its own.
RESTS_ON: Mapping[str, tuple[str, ...]] = {
    "keys": ("generator",),
    "traced-key": ("keys",),
    "word-order": ("generator", "traced-key", "steps"),
    "odd-elements": ("word-order",),
    "mask": ("odd-elements",),
    "broadcast-axes": ("mask",),
    "windows": ("broadcast-axes",),
    "threshold": ("mask",),
    "threshold-ends": ("threshold", "windows"),
    "windows-tile": ("windows",),
    "large-mask": ("mask",),
    "returned-mask": ("mask", "nothing-to-drop"),
    "layout": ("output",),
    "step-keys": ("mask",),
    "threads": ("mask",),
    "scale": ("mask", "shape-dtype-device"),
    "output": ("mask", "scale", "dropped-is-zero", "nothing-to-drop"),
    "gradient-mask": ("shape-dtype-device",),
    "gradient": ("output", "gradient-mask"),
    "dropped-is-zero": ("mask", "shape-dtype-device"),
    "nothing-to-drop": ("shape-dtype-device",),
    "layer-calls": ("output",),
    "layer-evaluation": ("layer-calls", "nothing-to-drop"),
    "layer-error": ("layer-calls", "bad-dtype"),
    "layer-resumes": ("layer-calls",),
    "layer-traces": ("layer-calls", "traces"),
    "layer-gradient": ("layer-calls", "gradient"),
    "rate": ("mask",),
    "independence": ("mask",),
}


def roots(failed: Collection[str]) -> list[str]:
    """Return those of the contracts that failed which rest on none of the others.

    Examples
    --------
    >>> roots(["bad-rate", "mask", "word-order", "output"])
    ['bad-rate', 'word-order']
    """
    return [name for name in failed if not any(other in failed for other in _below(name))]


def _below(name: str) -> Iterator[str]:
    for other in RESTS_ON.get(name, ()):
        yield other
        yield from _below(other)
