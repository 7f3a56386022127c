"""Zoneout for JAX."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from unidrop.adapters.jax.functional import as_array, as_key, check_lengths
from unidrop.key import Key
from unidrop.rate import Rate
from unidrop.zoneout import run_zoneout

__all__ = ["zoneout"]


def zoneout(
    new: ArrayLike,
    old: ArrayLike,
    rate: float,
    key: Key | jax.Array | None = None,
    *,
    deterministic: bool = False,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Keep the old value of each unit of a recurrent state with probability rate.

    `unidrop.family.zoneout` describes new, old and the results. The other parameters and the errors
    are as in `dropout`; if deterministic, the expectation is returned.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import zoneout
    >>> zoneout(jax.numpy.ones(6), jax.numpy.zeros(6), 0.5, Key(42))
    Array([1., 0., 0., 0., 0., 1.], dtype=float32)
    """
    options: dict[str, Any] = {"global_shape": global_shape, "start": start}
    new, options["old"] = as_array(new, "new"), as_array(old, "old")
    check_lengths(new, "new")
    options["training"] = not deterministic
    one_rate = Rate.from_p(rate, "rate")
    is_random = not deterministic and one_rate.p > 0
    return run_zoneout(new, one_rate, as_key(key) if is_random else key, return_mask, **options)
