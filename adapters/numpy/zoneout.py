"""Zoneout for NumPy, and its backward pass."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike, NDArray

from unidrop.adapters.numpy.family import _run
from unidrop.adapters.numpy.functional import Rng, as_array, check_out, check_source, copy_to
from unidrop.key import Key, check_key
from unidrop.rate import Rate
from unidrop.zoneout import get_zoneout_gradients, plan_zoneout, run_zoneout

__all__ = ["zoneout", "zoneout_backward"]


def zoneout(
    new: ArrayLike,
    old: ArrayLike,
    p: float = 0.5,
    *,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Keep the old value of each unit of a recurrent state with probability p.

    `unidrop.family.zoneout` describes new, old and the results. The other parameters and the errors
    are as in `dropout`; in evaluation, the expectation is returned.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import zoneout
    >>> zoneout(np.ones(6), np.zeros(6), 0.5, key=Key(42))
    array([1., 0., 0., 0., 0., 1.])
    """
    new = as_array(new, "new")
    options: dict[str, Any] = {"old": as_array(old, "old"), "training": training}
    options |= {"global_shape": global_shape, "start": start}
    if training:
        return _run(plan_zoneout, new, p, key, rng, return_mask, out, **options)
    check_source(key, rng)
    check_out(out, new)
    output, mask = run_zoneout(new, Rate.from_p(p), None, True, **options)
    output = copy_to(out, output)
    return (output, mask) if return_mask else output


def zoneout_backward(
    grad: ArrayLike,
    p: float = 0.5,
    *,
    key: Key | None = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the gradients of `zoneout`: of the new state, and of the old one.

    Arguments and errors are as in `dropout_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import zoneout_backward
    >>> zoneout_backward(np.ones(3), 0.5, key=Key(42))
    (array([1., 0., 0.]), array([0., 1., 1.]))
    """
    grad = as_array(grad, "grad")
    options: dict[str, Any] = {"training": training, "global_shape": global_shape, "start": start}
    plan = plan_zoneout(grad, Rate.from_p(p), old=grad, name="grad", **options)
    if key is not None:
        check_key(key)
    elif plan.drops:
        raise ValueError("pass the forward call's key, got key=None")
    is_random = plan.drops and key is not None
    return get_zoneout_gradients(plan, grad, key if is_random else None)
