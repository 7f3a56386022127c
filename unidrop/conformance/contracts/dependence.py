"""Order failed contracts by dependence, so that a reader knows which failure to fix first."""

from collections.abc import Collection, Iterator, Mapping

from unidrop.conformance.family import MEMBERS

__all__ = ["DEPENDENCIES", "roots"]

_MEMBER_CONTRACTS = tuple(f"family-{name.replace('_', '-')}" for name in MEMBERS)

#: Maps a contract to the contracts it depends on. If one of them fails, the contract may fail for
#: that reason only.
DEPENDENCIES: Mapping[str, tuple[str, ...]] = {
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
    **dict.fromkeys(_MEMBER_CONTRACTS, ("output",)),
    **dict.fromkeys(("family-drop-path", "family-locked-dropout"), ("output", "broadcast-axes")),
    "family-feature-alpha-dropout": ("family-alpha-dropout", "broadcast-axes"),
    "family-gradient": (*_MEMBER_CONTRACTS, "gradient"),
    "attention-mask": ("mask",),
    "attention-output": ("attention-mask",),
    "attention-gradient": ("attention-output",),
    "attention-windows": ("attention-output", "windows-tile"),
    "rate": ("mask",),
    "independence": ("mask",),
}


def roots(failed: Collection[str]) -> list[str]:
    """Return the failed contracts that depend on no other failed contract.

    Examples
    --------
    >>> roots(["bad-rate", "mask", "word-order", "output"])
    ['bad-rate', 'word-order']
    """
    return [name for name in failed if not any(other in failed for other in _dependencies(name))]


def _dependencies(name: str) -> Iterator[str]:
    """Yield the direct and indirect dependencies of a contract."""
    for other in DEPENDENCIES.get(name, ()):
        yield other
        yield from _dependencies(other)
