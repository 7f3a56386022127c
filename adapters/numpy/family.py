"""Members of the family of dropout for NumPy, and their backward passes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unidrop.adapters.numpy.functional import (
    Rng,
    as_array,
    check_out,
    check_source,
    copy_to,
    draw_key,
)
from unidrop.drop_block import plan_drop_block
from unidrop.drop_head import plan_drop_head
from unidrop.family import (
    Mode,
    plan_alpha_dropout,
    plan_drop_key,
    plan_drop_path,
    plan_feature_alpha_dropout,
    plan_locked_dropout,
)
from unidrop.gaussian import NOISE_RATE, plan_gaussian_dropout, plan_gaussian_noise
from unidrop.key import Key, check_key
from unidrop.permutation import check_patch_rate, plan_patch_dropout
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import make_rate

__all__ = [
    "alpha_dropout",
    "alpha_dropout_backward",
    "drop_block",
    "drop_block_backward",
    "drop_key",
    "drop_key_backward",
    "drop_path",
    "drop_path_backward",
    "feature_alpha_dropout",
    "feature_alpha_dropout_backward",
    "gaussian_dropout",
    "gaussian_dropout_backward",
    "gaussian_noise",
    "locked_dropout",
    "locked_dropout_backward",
    "patch_dropout",
    "patch_dropout_backward",
]


def alpha_dropout(
    x: ArrayLike,
    p: float = 0.5,
    *,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Set elements to the negative limit of SELU with probability p; keep mean 0 and variance 1.

    `unidrop.family.alpha_dropout` has the formula. Parameters, returns and errors are as in
    `dropout`; a complex x raises TypeError.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import alpha_dropout
    >>> alpha_dropout(np.zeros(3), 0.5, key=Key(42)).round(4)
    array([ 0.7792, -0.7792, -0.7792])
    """
    options: dict[str, Any] = {"training": training, "broadcast_axes": broadcast_axes}
    options |= {"global_shape": global_shape, "start": start}
    return _run(plan_alpha_dropout, x, p, key, rng, return_mask, out, **options)


def alpha_dropout_backward(
    grad: ArrayLike,
    p: float = 0.5,
    *,
    key: Key | None = None,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `alpha_dropout`; arguments and errors as in `dropout_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import alpha_dropout_backward
    >>> alpha_dropout_backward(np.ones(3), 0.5, key=Key(42)).round(4)
    array([0.8864, 0.    , 0.    ])
    """
    options: dict[str, Any] = {"training": training, "broadcast_axes": broadcast_axes}
    options |= {"global_shape": global_shape, "start": start}
    return _run_backward(plan_alpha_dropout, grad, p, key, out, **options)


def feature_alpha_dropout(
    x: ArrayLike,
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
    """Apply `alpha_dropout` to whole channels, the second axis of an array.

    Parameters, returns and errors are as there; ValueError if x has fewer than two axes.
    """
    options: dict[str, Any] = {"training": training, "global_shape": global_shape, "start": start}
    return _run(plan_feature_alpha_dropout, x, p, key, rng, return_mask, out, **options)


def feature_alpha_dropout_backward(
    grad: ArrayLike,
    p: float = 0.5,
    *,
    key: Key | None = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `feature_alpha_dropout`; arguments as in `dropout_backward`."""
    options: dict[str, Any] = {"training": training, "global_shape": global_shape, "start": start}
    return _run_backward(plan_feature_alpha_dropout, grad, p, key, out, **options)


def drop_block(
    x: ArrayLike,
    p: float = 0.5,
    *,
    block_size: int,
    axes: Sequence[int],
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    return_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Drop blocks of neighboring elements, such that a share of about p is dropped.

    Parameters
    ----------
    block_size : int
        The length of a block along each of the axes.
    axes : sequence of int
        The axes of a block, such as ``(2, 3)`` for images of shape ``(N, C, H, W)``.
    x, p, key, rng, training, return_mask, out
        As in `dropout`.

    Returns
    -------
    output, mask
        As in `unidrop.family.drop_block`.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if a block does not fit, or an axis does not exist.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import drop_block
    >>> drop_block(np.ones((1, 6)), 0.5, block_size=2, axes=(1,), key=Key(42)).round(4)
    array([[3., 0., 0., 3., 0., 0.]])
    """
    options: dict[str, Any] = {"block_size": block_size, "axes": axes, "training": training}
    return _run(plan_drop_block, x, p, key, rng, return_mask, out, **options)


def drop_block_backward(
    grad: ArrayLike,
    p: float = 0.5,
    *,
    block_size: int,
    axes: Sequence[int],
    key: Key | None = None,
    training: bool = True,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `drop_block`; arguments as there and in `dropout_backward`."""
    options: dict[str, Any] = {"block_size": block_size, "axes": axes, "training": training}
    return _run_backward(plan_drop_block, grad, p, key, out, **options)


def gaussian_dropout(
    x: ArrayLike,
    p: float = 0.5,
    *,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> Any:
    """Multiply each element by a normal number of mean 1 and variance p / (1 - p).

    `unidrop.family.gaussian_dropout` has the formula. Parameters and errors are as in `dropout`; a
    complex x raises TypeError, and a p of 1 raises ValueError.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import gaussian_dropout
    >>> gaussian_dropout(np.ones(3), 0.5, key=Key(42)).round(4)
    array([1.3708, 1.0438, 0.4998])
    """
    options: dict[str, Any] = {"training": training, "global_shape": global_shape, "start": start}
    return _run(plan_gaussian_dropout, x, p, key, rng, False, out, **options)


def gaussian_dropout_backward(
    grad: ArrayLike,
    p: float = 0.5,
    *,
    key: Key | None = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `gaussian_dropout`; arguments as in `dropout_backward`."""
    options: dict[str, Any] = {"training": training, "global_shape": global_shape, "start": start}
    return _run_backward(plan_gaussian_dropout, grad, p, key, out, **options)


def gaussian_noise(
    x: ArrayLike,
    stddev: float,
    *,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> Any:
    """Add a normal number of mean 0 and standard deviation stddev to each element.

    The other parameters and the errors are as in `gaussian_dropout`. The gradient is the upstream
    gradient itself.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import gaussian_noise
    >>> gaussian_noise(np.zeros(3), 0.1, key=Key(42)).round(4)
    array([ 0.0371,  0.0044, -0.05  ])
    """
    options: dict[str, Any] = {"training": training, "global_shape": global_shape, "start": start}
    options["stddev"] = stddev
    return _run(plan_gaussian_noise, x, NOISE_RATE, key, rng, False, out, **options)


def patch_dropout(
    x: ArrayLike,
    p: float = 0.5,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_indices: bool = False,
) -> Any:
    """Remove a share p of the tokens of each example, the second axis of an array.

    `unidrop.family.patch_dropout` describes the parameters and the results; key and rng are as in
    `dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import patch_dropout
    >>> patch_dropout(np.arange(9.0)[None], 0.5, key=Key(42), ordered=True)
    array([[0., 1., 3., 5., 7.]])
    """
    check_patch_rate(p)
    options: dict[str, Any] = {"num_prefix_tokens": num_prefix_tokens, "ordered": ordered}
    options |= {"training": training, "global_shape": global_shape, "start": start}
    return _run(plan_patch_dropout, x, p, key, rng, return_indices, None, **options)


def patch_dropout_backward(
    grad: ArrayLike,
    p: float = 0.5,
    *,
    length: int,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `patch_dropout` in training.

    Parameters
    ----------
    grad : array_like
        The upstream gradient, of the output's shape.
    length : int
        The number of tokens of x.
    p, num_prefix_tokens, ordered, key, global_shape, start
        As in the forward call.

    Returns
    -------
    numpy.ndarray
        Of x's shape; +0 for the removed tokens.
    """
    grad = as_array(grad, "grad")
    check_key(key)
    x = np.zeros((*grad.shape[:1], length, *grad.shape[2:]), grad.dtype)
    options: dict[str, Any] = {"num_prefix_tokens": num_prefix_tokens, "ordered": ordered}
    options |= {"global_shape": global_shape, "start": start, "return_indices": True}
    y, indices = patch_dropout(x, p, key=key, **options)
    if y.shape != grad.shape:
        raise ValueError(f"grad must be of the output's shape {y.shape}, got {grad.shape}")
    if indices is None:
        return grad
    x[:, :num_prefix_tokens] = grad[:, :num_prefix_tokens]
    x[np.arange(len(x))[:, None], num_prefix_tokens + indices] = grad[:, num_prefix_tokens:]
    return x


def drop_path(
    x: ArrayLike,
    p: float | NDArray[Any] = 0.5,
    *,
    mode: Mode = "row",
    scale_by_keep: bool = True,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Drop whole examples of a residual branch with probability p: stochastic depth.

    Parameters
    ----------
    mode : {"row", "batch"}, default "row"
        "row" decides for each element of the first axis, and "batch" once for all.
    scale_by_keep : bool, default True
        If False, kept examples are unchanged; otherwise they are scaled by 1 / (1 - p).
    x, p, key, rng, training, global_shape, start, return_mask, out
        As in `dropout`.

    Returns
    -------
    output, mask
        As in `dropout`.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if mode is another one, or x has no axis of rows.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import drop_path
    >>> drop_path(np.ones((4, 2)), 0.5, key=Key(42))
    array([[2., 2.],
           [0., 0.],
           [0., 0.],
           [0., 0.]])
    """
    options: dict[str, Any] = {"mode": mode, "scale_by_keep": scale_by_keep, "training": training}
    options |= {"global_shape": global_shape, "start": start}
    return _run(plan_drop_path, x, p, key, rng, return_mask, out, **options)


def drop_path_backward(
    grad: ArrayLike,
    p: float | NDArray[Any] = 0.5,
    *,
    mode: Mode = "row",
    scale_by_keep: bool = True,
    key: Key | None = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `drop_path`; arguments as there and in `dropout_backward`."""
    options: dict[str, Any] = {"mode": mode, "scale_by_keep": scale_by_keep, "training": training}
    options |= {"global_shape": global_shape, "start": start}
    return _run_backward(plan_drop_path, grad, p, key, out, **options)


def drop_key(
    x: ArrayLike,
    p: float = 0.5,
    *,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Set scores of attention to minus infinity with probability p, before the softmax.

    `unidrop.family.drop_key` has the details. Parameters, returns and errors are as in `dropout`; a
    complex x raises TypeError.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import drop_key
    >>> drop_key(np.ones(6), 0.5, key=Key(42))
    array([  1., -inf, -inf, -inf, -inf,   1.])
    """
    options: dict[str, Any] = {"training": training, "broadcast_axes": broadcast_axes}
    options |= {"global_shape": global_shape, "start": start}
    return _run(plan_drop_key, x, p, key, rng, return_mask, out, **options)


def drop_key_backward(
    grad: ArrayLike,
    p: float = 0.5,
    *,
    key: Key | None = None,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `drop_key`; arguments and errors as in `dropout_backward`."""
    options: dict[str, Any] = {"training": training, "broadcast_axes": broadcast_axes}
    options |= {"global_shape": global_shape, "start": start}
    return _run_backward(plan_drop_key, grad, p, key, out, **options)


def locked_dropout(
    x: ArrayLike,
    p: float | NDArray[Any] = 0.5,
    *,
    axis: int,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Apply dropout with one mask for all timesteps, which are the elements along an axis.

    `unidrop.family.locked_dropout` has the details. The other parameters, returns and errors are as
    in `dropout`; ValueError if x has no such axis.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import locked_dropout
    >>> locked_dropout(np.ones((2, 1, 6)), 0.5, axis=0, key=Key(42))[:, 0]
    array([[2., 0., 0., 0., 0., 2.],
           [2., 0., 0., 0., 0., 2.]])
    """
    options: dict[str, Any] = {"axis": axis, "training": training}
    options |= {"global_shape": global_shape, "start": start}
    return _run(plan_locked_dropout, x, p, key, rng, return_mask, out, **options)


def locked_dropout_backward(
    grad: ArrayLike,
    p: float | NDArray[Any] = 0.5,
    *,
    axis: int,
    key: Key | None = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `locked_dropout`; arguments as there and in `dropout_backward`."""
    options: dict[str, Any] = {"axis": axis, "training": training}
    options |= {"global_shape": global_shape, "start": start}
    return _run_backward(plan_locked_dropout, grad, p, key, out, **options)


def _run(
    make_plan: Callable[..., DropoutPlan],
    x: ArrayLike,
    p: Any,
    key: Key | None,
    rng: Rng,
    return_mask: bool,
    out: NDArray[Any] | None,
    **options: Any,
) -> Any:
    """Run a member; draws a key if there is none."""
    x = as_array(x, "x")
    plan, generator = make_plan(x, _get_rate(make_plan, p, x), **options), check_source(key, rng)
    check_out(out, x)
    if not plan.drops:
        output = copy_to(out, x)
        return (output, plan.ones(x)) if return_mask else output
    key = draw_key(generator) if key is None else key
    mask = plan.mask(x, key) if return_mask else None
    output = plan.run(x, key, mask, out)
    return (output, mask) if return_mask else output


def _run_backward(
    make_plan: Callable[..., DropoutPlan],
    grad: ArrayLike,
    p: Any,
    key: Key | None,
    out: NDArray[Any] | None,
    **options: Any,
) -> NDArray[Any]:
    """Return the gradient of a member."""
    grad = as_array(grad, "grad")
    plan = make_plan(grad, _get_rate(make_plan, p, grad), name="grad", **options)
    if key is not None:
        check_key(key)
    elif plan.drops:
        raise ValueError("pass the forward call's key, got key=None")
    check_out(out, grad)
    if not plan.drops or key is None:
        return copy_to(out, grad)
    gradient: NDArray[Any] = plan.gradient.run(grad, key, None, out)
    return gradient


def _get_rate(make_plan: Callable[..., DropoutPlan], p: Any, x: NDArray[Any]) -> Rate:
    """Return the rate, which is an array only for members with the formula of `dropout`."""
    is_scheduled = make_plan in (plan_drop_path, plan_locked_dropout, plan_drop_head)
    return make_rate(p, x) if is_scheduled else Rate.from_p(p)
