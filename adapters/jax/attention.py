"""Attention for JAX with ordinary dropout of its probabilities, computed block by block.

The probability of batch element b, head n, query t and key s has its own element of the mask
``keep_mask((B, N, T, S), rate, key)``, however the attention is computed. So a model with
materialized attention, this function and attention on windows of a long sequence all drop the same
probabilities.

No array of all probabilities exists, in the forward or the backward pass: a scan visits blocks of
keys, and keeps the sums of a softmax so far. The derivative visits them again, and recomputes the
probabilities and the mask of each block.

T. Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", ICLR
(2024).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, overload

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from unidrop.adapters.jax.functional import as_array, as_key, check_lengths, dropout
from unidrop.adapters.jax.primitive import get_varying_axes
from unidrop.dispatch import is_forced
from unidrop.key import Key
from unidrop.rate import checked_probability
from unidrop.window import Window

__all__ = ["attend", "check_arrays", "dot_product_attention"]

# The number of keys in a block. A larger block takes more memory, and a smaller one more time.
_BLOCK = 256

_MASKED = -0.7 * float(np.finfo(np.float32).max)
"""The score of a pair that does not attend, as in `jax.nn.dot_product_attention`.

It is finite, so a query that attends to no key attends to all keys alike.
"""


class _Settings(NamedTuple):
    """The constants of a program."""

    rate: float
    is_batched: bool
    broadcast_dims: tuple[int, ...]
    global_shape: tuple[int, ...]
    start: tuple[int | None, ...]  # None for an array, which is an operand
    is_causal: bool
    local_window: tuple[int, ...] | None
    precision: Any
    block: int  # the number of keys in a block
    forced: tuple[bool, bool]  # by unidrop.force_path, because a program keeps its path


class _Others(NamedTuple):
    """The operands without a gradient."""

    dropout_key: Key
    starts: tuple[Any, ...]
    mask: Any
    query_lengths: Any
    key_lengths: Any


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    implementation: Literal["xla", "cudnn"] | None = ...,
    return_residual: Literal[False] = ...,
    dropout_rate: float = ...,
    dropout_key: Key | jax.Array | None = ...,
    broadcast_dims: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
) -> jax.Array: ...
@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    implementation: Literal["xla", "cudnn"] | None = ...,
    return_residual: Literal[True],
    dropout_rate: float = ...,
    dropout_key: Key | jax.Array | None = ...,
    broadcast_dims: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
) -> tuple[jax.Array, jax.Array]: ...
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: Key | jax.Array | None = None,
    broadcast_dims: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Return scaled dot-product attention with dropout of the probabilities.

    `jax.nn.dot_product_attention` with a rate and a key. The mask is
    ``keep_mask((B, N, T, S), dropout_rate, dropout_key)``, with the axes batch, head, query and
    key, although the arrays have the axes batch, position, head and feature.

    Parameters
    ----------
    query : jax.Array
        Of shape (B, T, N, H) or (T, N, H), and a floating-point dtype.
    key, value : jax.Array
        Of shape (B, S, K, H) or (S, K, H), and of the query's dtype. N is a multiple of K: each
        head of keys serves N / K successive heads of queries.
    bias : jax.Array, optional
        Added to the scores; broadcasts to (B, N, T, S).
    mask : jax.Array of bool, optional
        True for pairs that attend; broadcasts to (B, N, T, S). A query without any such pair
        attends to all keys alike, as in `jax.nn`.
    scale : float, optional
        Multiplies the scores; defaults to ``1 / sqrt(H)``.
    is_causal : bool, default False
        If True, a query attends to no later position.
    query_seq_lengths, key_value_seq_lengths : jax.Array of int32, optional
        The number of queries and keys of each batch element that are not padding.
    local_window_size : int or (int, int), optional
        How many positions before and after its own a query attends to.
    implementation : {"xla", "cudnn"}, optional
        For a call without dropout. With dropout, must not be "cudnn".
    return_residual : bool, default False
        If True, the logarithm of the sum of the exponentials of the scores is returned too.
    dropout_rate : int or float, default 0.0
        The probability of dropping a probability, in [0, 1]; a Python number, also under `jax.jit`.
        Kept ones are scaled by 1 / (1 - dropout_rate). At 0, a call without a window or a residual
        is `jax.nn.dot_product_attention` itself.
    dropout_key : unidrop.Key or jax.Array
        The name of the mask, as in `dropout`: use each key once. May be None if the rate is 0.
    broadcast_dims : sequence of int, default ()
        Axes of the mask along which probabilities share one decision: (0, 1) shares a mask among
        the batch and the heads.
    global_shape, start : sequence of int, optional
        The queries and keys are the block that begins at ``start`` of attention with a mask of
        shape ``global_shape``, (B, N, T, S) or without B. The block has that part of the mask, and
        positions count from the beginning of the whole sequence. Elements of start may be traced.

    Returns
    -------
    output : jax.Array
        Of the query's shape and dtype. Sums have at least the precision of float32, and of float64
        for float64.
    residual : jax.Array
        Only with ``return_residual``: of shape (B, T, N) or (T, N), in float32 or float64. Has a
        gradient, so that blocks of keys merge to the whole.

    Raises
    ------
    TypeError
        If an array is not of a floating-point dtype, the rate is not a Python number, or
        dropout_key is not a key.
    ValueError
        If shapes or dtypes do not match, as in `jax.nn`, the rate is outside [0, 1], or the window
        does not fit.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key, keep_mask
    >>> from unidrop.adapters.jax import dot_product_attention
    >>> q = k = jax.numpy.ones((1, 4, 2, 4))  # (batch, position, head, feature)
    >>> v = jax.numpy.broadcast_to(jax.numpy.eye(4)[:, None], q.shape)
    >>> y = dot_product_attention(q, k, v, dropout_rate=0.5, dropout_key=Key(42))
    >>> mask = keep_mask((1, 2, 4, 4), 0.5, Key(42), xp=jax.numpy)  # (batch, head, query, key)
    >>> bool(((y != 0) == mask.swapaxes(1, 2)).all())
    True
    """
    rate = checked_probability(dropout_rate, "dropout_rate")
    q, k, v = as_array(query, "query"), as_array(key, "key"), as_array(value, "value")
    bias = None if bias is None else as_array(bias, "bias")
    mask, query_lengths, key_lengths = (
        None if x is None else jnp.asarray(x)
        for x in (mask, query_seq_lengths, key_value_seq_lengths)
    )
    is_plain = rate == 0 and global_shape is start is None and not return_residual
    if is_plain or 0 in (q.size, k.size):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_lengths,
            local_window_size=local_window_size,
            implementation=implementation,
            return_residual=return_residual,
        )
    if implementation == "cudnn":
        raise ValueError("implementation must be None or 'xla' with dropout, got 'cudnn'")
    check_arrays(q, k, v)
    _check(*map(_as_struct, (q, k, v, bias, mask, query_lengths, key_lengths)), implementation)
    output, residual = attend(
        _as_4d(q),
        _as_4d(k),
        _as_4d(v),
        _as_4d(bias),
        _as_4d(mask),
        rate,
        dropout_key,
        scale=scale,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        is_causal=is_causal,
        local_window_size=local_window_size,
        broadcast_dims=broadcast_dims,
        global_shape=global_shape,
        start=start,
        is_batched=q.ndim > 3,
    )
    output = output.reshape(q.shape)
    return (output, residual.reshape(q.shape[:-1])) if return_residual else output


def attend(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    rate: float,
    dropout_key: Any,
    *,
    scale: Any = None,
    query_lengths: Any = None,
    key_lengths: Any = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    broadcast_dims: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    is_batched: bool = True,
    precision: Any = None,
) -> tuple[Any, Any]:
    """Return the output and the residual of `dot_product_attention`.

    Arrays have four axes and valid shapes, and the features of values may differ from the others.
    ``is_batched`` states whether the mask has an axis for the batch.
    """
    shape = (*query.shape[:1], query.shape[2], query.shape[1], key.shape[1])
    shape = shape[not is_batched :]
    # Dropout ignores the start along broadcast dims, and positions don't.
    window = Window.from_args(shape, (), global_shape, start)
    shared = Window.from_args(shape, broadcast_dims).broadcast_axes
    whole, starts = window.global_shape or shape, window.start or (0,) * len(shape)
    if max(whole[-2:]) >= 1 << 31:
        raise ValueError(f"global_shape must have fewer than 2**31 queries and keys, got {whole}")
    size = local_window_size
    settings = _Settings(
        rate,
        is_batched,
        shared,
        whole,
        tuple(s if isinstance(s, int) else None for s in starts),
        bool(is_causal),
        (size, size) if isinstance(size, int) else size and tuple(size),
        precision,
        min(_BLOCK, key.shape[1]),
        (is_forced("portable"), is_forced("fused")),
    )
    arrays = tuple(s for s in starts if not isinstance(s, int))
    # At rate 0, a window has no key.
    one_key = as_key(dropout_key, "dropout_key") if rate > 0 else Key(0)
    others = _Others(one_key, arrays, mask, query_lengths, key_lengths)
    scale = 1 / np.sqrt(query.shape[3]) if scale is None else scale
    # A user's transfer guard is for arrays, and the scale and the key are numbers.
    with jax.transfer_guard_host_to_device("allow"):
        output, residual = _run((query, key, value, bias, scale), others, settings)
    return output, residual


def check_arrays(query: Any, key: Any, value: Any) -> None:
    """Raise TypeError if an array is not of a floating-point dtype, or has symbolic lengths."""
    for array, name in ((query, "query"), (key, "key"), (value, "value")):
        check_lengths(array, name)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be of a floating-point dtype, got {array.dtype}")


@lru_cache(maxsize=1024)
def _check(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    query_lengths: Any,
    key_lengths: Any,
    implementation: Any,
) -> None:
    """Raise what `jax.nn.dot_product_attention` raises for such operands."""
    jax.eval_shape(
        partial(jax.nn.dot_product_attention, implementation=implementation),
        query,
        key,
        value,
        bias,
        mask,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
    )


def _as_struct(x: Any) -> Any:
    return None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)


def _as_4d(x: Any) -> Any:
    return None if x is None else x.reshape((1,) * (4 - x.ndim) + x.shape)


@partial(jax.jit, static_argnames="settings")
def _run(inputs: tuple[Any, ...], others: _Others, settings: _Settings) -> tuple[Any, Any]:
    """Compute attention of arrays whose axes are batch, position, head and feature."""
    query, key, value, bias, scale = inputs
    batch, length, heads, features = query.shape
    groups = key.shape[2]
    dtype = jnp.promote_types(query.dtype, np.float32)
    query = jnp.moveaxis(query.reshape(batch, length, groups, heads // groups, features), 1, 3)
    if bias is not None:
        bias = _split_heads(bias, groups)
        bias = bias if jnp.issubdtype(bias.dtype, jnp.floating) else bias.astype(dtype)
    if others.mask is not None:
        others = others._replace(mask=_split_heads(others.mask, groups))
    inputs = (query, key, value, bias, jnp.asarray(scale, dtype))
    output, top, residual = _attend(*_vary_alike((inputs, others)), settings)
    output = jnp.moveaxis(output, 3, 1).reshape(batch, length, heads, value.shape[3])
    residual = jnp.moveaxis(top + residual, 3, 1).reshape(batch, length, heads)
    if others.query_lengths is not None:
        positions = _get_starts(others, settings)[-2] + jnp.arange(length)
        is_query = positions < others.query_lengths[:, None]
        output = output * is_query[:, :, None, None]
    return output.astype(query.dtype), residual


def _split_heads(x: Any, groups: int) -> Any:
    """Split the axis of heads of a bias or a mask: heads of a group share a head of keys."""
    batch, heads, *rest = x.shape
    return x.reshape(batch, groups if heads > 1 else 1, -1, *rest)


def _vary_alike(operands: Any) -> Any:
    """Let all operands vary along the same axes of `jax.shard_map`, as the sums of a scan must."""
    axes = frozenset[Any]().union(*map(get_varying_axes, jax.tree.leaves(operands)))

    def vary(x: Any) -> Any:
        missing = axes - get_varying_axes(x)
        return lax.pcast(x, tuple(sorted(missing, key=str)), to="varying") if missing else x

    return jax.tree.map(vary, operands)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _attend(inputs: tuple[Any, ...], others: _Others, settings: _Settings) -> tuple[Any, ...]:
    """Compute attention, each query's highest score, and the residual beyond that score.

    Axes are batch, head of keys, head in its group, query, and feature. The sum of the last two is
    the residual. If a query attends to no key, rounding would lose the second in their sum.
    """

    def add_block(sums: Any, first: Any) -> tuple[Any, None]:
        output, total, top = sums
        scores = _get_scores(inputs, others, settings, first)
        new_top = jnp.maximum(top, scores.max(-1))
        shift = jnp.where(jnp.isneginf(new_top), 0, new_top)  # all scores so far may be -inf
        weights, decay = jnp.exp(scores - shift[..., None]), jnp.exp(top - shift)
        mixed = _mix_values(weights, inputs, others, settings, first)
        total = total * decay + weights.sum(-1)
        return (output * decay[..., None] + mixed, total, new_top), None

    output, total = _make_zeros(inputs)
    (output, total, top), _ = lax.scan(
        add_block, (output, total, total - np.inf), _cut(inputs, settings)
    )
    return output / total[..., None], jnp.where(jnp.isneginf(top), 0, top), jnp.log(total)


def _differentiate(
    settings: _Settings, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return attention and its tangent, a sum over blocks.

    A probability is ``exp(score - top - residual)``, whatever the top, which so needs no tangent.
    The tangent of the residual is the sum of all probabilities, each times the tangent of its
    score.
    """
    inputs, others = primals
    output, top, residual = _attend(inputs, others, settings)
    leaves, structure = jax.tree.flatten(inputs)
    changes = dict(enumerate(structure.flatten_up_to(tangents[0])))
    changes = {i: t for i, t in changes.items() if not isinstance(t, SymbolicZero)}

    # The transpose of this scan needs no sums, so it keeps nothing of a block.
    @partial(jax.checkpoint, prevent_cse=False)
    def add_block(sums: Any, first: Any) -> tuple[Any, None]:
        def get_terms(changed: dict[int, Any]) -> tuple[Any, Any]:
            new = structure.unflatten(changed.get(i, x) for i, x in enumerate(leaves))
            scores = _get_scores(new, others, settings, first)
            weights = jnp.exp(scores - top[..., None] - residual[..., None])
            return _mix_values(weights, new, others, settings, first), weights.sum(-1)

        _, terms = jax.jvp(get_terms, ({i: leaves[i] for i in changes},), (changes,))
        return jax.tree.map(jnp.add, sums, terms), None

    (mixed, slope), _ = lax.scan(add_block, _make_zeros(inputs), _cut(inputs, settings))
    slopes = mixed - output * slope[..., None], _make_zeros(inputs)[1], slope
    return (output, top, residual), slopes


_attend.defjvp(_differentiate, symbolic_zeros=True)


def _make_zeros(inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return zeros of the shapes of the output and of the residual."""
    query, _, value, _, scale = inputs
    shape = query.shape[:-1]
    zeros = jnp.zeros((*shape, value.shape[3]), scale.dtype), jnp.zeros(shape, scale.dtype)
    output, residual, _ = _vary_alike((*zeros, scale))
    return output, residual


def _cut(inputs: tuple[Any, ...], settings: _Settings) -> Any:
    """Return the index of the first key of each block."""
    return jnp.arange(0, inputs[1].shape[1], settings.block)


def _get_block(x: Any, axis: int, first: Any, settings: _Settings) -> Any:
    """Return a block of keys. The last block is as long as the others, and so may begin before."""
    if x.shape[axis] == 1:
        return x
    return lax.dynamic_slice_in_dim(x, first, settings.block, axis)


def _get_scores(inputs: tuple[Any, ...], others: _Others, settings: _Settings, first: Any) -> Any:
    """Return the scores of a block, -inf for keys that the block before has too."""
    query, key, _, bias, scale = inputs
    options = {"precision": settings.precision, "preferred_element_type": scale.dtype}
    block = _get_block(key, 1, first, settings)
    scores = jnp.einsum("bkgth,bskh->bkgts", query, block, **options) * scale
    if bias is not None:
        scores = scores + _get_block(bias, 4, first, settings).astype(scores.dtype)
    indices = jnp.minimum(first, key.shape[1] - settings.block) + jnp.arange(settings.block)
    if others.mask is not None:
        scores = jnp.where(_get_block(others.mask, 4, first, settings), scores, _MASKED)
    for attends in _compare_positions(others, settings, jnp.arange(query.shape[3]), indices):
        scores = jnp.where(attends, scores, _MASKED)
    if key.shape[1] % settings.block:
        scores = jnp.where(indices >= first, scores, -np.inf)
    return scores


def _compare_positions(
    others: _Others, settings: _Settings, queries: Any, keys: Any
) -> Iterator[Any]:
    """Yield the masks that positions define, True for pairs that attend."""
    *_, query_start, key_start = _get_starts(others, settings)
    queries, keys = (query_start + queries)[:, None], key_start + keys
    if settings.is_causal:
        yield queries >= keys
    if settings.local_window is not None:
        before, after = settings.local_window
        yield (queries <= keys + before) & (queries >= keys - after)
    if others.query_lengths is not None:
        yield queries < others.query_lengths[:, None, None, None, None]
    if others.key_lengths is not None:
        yield keys < others.key_lengths[:, None, None, None, None]


def _mix_values(
    weights: Any, inputs: tuple[Any, ...], others: _Others, settings: _Settings, first: Any
) -> Any:
    """Drop weights of a block of keys, and return the sums of values by the others."""
    value = inputs[2]
    batch, groups, heads, length, count = weights.shape
    if settings.rate > 0:
        *starts, start = _get_starts(others, settings)
        first_of_block = jnp.minimum(first, value.shape[1] - settings.block)
        dropped = dropout(
            weights.reshape(*(batch,) * settings.is_batched, groups * heads, length, count),
            settings.rate,
            others.dropout_key,
            broadcast_dims=settings.broadcast_dims,
            global_shape=settings.global_shape,
            start=(*starts, start + first_of_block),
        )
        weights = dropped.reshape(weights.shape)
    options = {"precision": settings.precision, "preferred_element_type": weights.dtype}
    block = _get_block(value, 1, first, settings)
    return jnp.einsum("bkgts,bskh->bkgth", weights.astype(value.dtype), block, **options)


def _get_starts(others: _Others, settings: _Settings) -> list[Any]:
    """Return where in the mask of the whole attention this one begins."""
    arrays = iter(others.starts)
    starts = [next(arrays) if start is None else start for start in settings.start]
    # Indices are ``int32``, and other integers would make them longer.
    return starts[:-2] + [s if isinstance(s, int) else s.astype(np.int32) for s in starts[-2:]]
