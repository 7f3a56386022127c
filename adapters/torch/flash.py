"""Attention of PyTorch by the kernels of a GPU: which calls they serve, and their launches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unidrop.adapters.torch.arrays import LIBRARY
from unidrop.adapters.torch.buffers import BUFFERS, as_int64
from unidrop.adapters.torch.operators import cached_rate
from unidrop.device import get_base, get_words
from unidrop.dispatch import get_device_kernels
from unidrop.dtypes import dtype_name
from unidrop.key import Key
from unidrop.protocols import DeviceBuffer
from unidrop.window import Window

__all__ = ["attend", "differentiate"]

_AXES = 4  # of the arrays that kernels receive


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor] | None:
    """Return attention and the sizes of queries, or None if the kernels cannot run."""
    kernels = _find_kernels(query, key, value, mask)
    if kernels is None:
        return None
    with BUFFERS.use_device(query):
        problem, bias, *numbers = _prepare(kernels, query, key, value, mask, *rest)
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sizes = query.new_empty((*query.shape[:-1], 2), dtype=torch.float32)
        inputs = map(_as_buffer, (query, key, value))
        kernels.attend(*inputs, bias, _as_buffer(output), sizes, problem, *numbers)
    return output, sizes


def differentiate(
    upstream: Tensor,
    upstream_sizes: Tensor,
    output: Tensor,
    sizes: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients of query, key and value, or None if the kernels cannot run."""
    kernels = _find_kernels(query, key, value, mask, upstream, upstream_sizes, output, sizes)
    if kernels is None:
        return None
    with BUFFERS.use_device(query):
        problem, bias, *numbers = _prepare(kernels, query, key, value, mask, *rest)
        of_query, of_key, of_value = (x.new_empty(x.shape) for x in (query, key, value))
        kernels.differentiate(
            _as_buffer(upstream),
            upstream_sizes[..., 0].contiguous(),
            *map(_as_buffer, (query, key, value)),
            bias,
            _as_buffer(output),
            sizes.contiguous(),
            sizes.new_empty(query.shape[:-1]),
            *map(_as_buffer, (of_query, of_key, of_value)),
            problem,
            *numbers,
        )
    return of_query, of_key, of_value


def _find_kernels(query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None) -> Any | None:
    """Return the package of kernels, or None if they cannot serve the tensors."""
    kernels = get_device_kernels(BUFFERS, query)
    if kernels is None or query.dim() > _AXES or 0 in (*query.shape, *value.shape):
        return None
    features = max(query.shape[-1], value.shape[-1])
    if features > kernels.MAX_FEATURES.get(dtype_name(query.dtype), 0):
        return None
    tensors = [x for x in (key, value, *others) if x is not None]
    return kernels if all(map(BUFFERS.locate_on_device, tensors)) else None


def _prepare(
    kernels: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_key: Key,
    p: float,
    is_causal: bool,
    scale: float,
    global_shape: Sequence[int] | None,
    start: Sequence[Any] | None,
) -> tuple[Any, ...]:
    """Return the arguments of kernels: the problem, the mask of pairs, the key and the place."""
    shape = (*query.shape[:-1], key.shape[-2])
    window = Window.from_args(shape, (), global_shape, start)
    rate = cached_rate(p)
    # As for dropout, a rate that needs no mask reads no key.
    has_mask = p > 0 and not rate.keeps_nothing
    words = get_words(LIBRARY, query, dropout_key) if has_mask else (0, 0)
    base = get_base(LIBRARY, query, window)
    diagonal = 0 if start is None else start[-2] - start[-1]
    place: Tensor | None = None
    if isinstance(base, Tensor):
        place = torch.stack([base, as_int64(diagonal, query.device)])
        base = diagonal = 0
    batch, heads, queries, keys = (1,) * (_AXES - len(shape)) + shape
    problem = kernels.Attention(
        kind=dtype_name(query.dtype),
        batch=batch,
        heads=heads,
        key_heads=heads,
        queries=queries,
        keys=keys,
        features=query.shape[-1],
        value_features=value.shape[-1],
        is_causal=is_causal,
        diagonal=int(diagonal),
        scale=scale,
        rate=rate,
        mask_strides=(0, 0, 0, *window.strides)[-4:-1],
        base=base,
    )
    bias = None if mask is None else _as_buffer(mask, shape)
    return problem, bias, words, place


def _as_buffer(x: Tensor, shape: tuple[int, ...] | None = None) -> DeviceBuffer:
    """Return the elements of a tensor, expanded to a shape; kernels accept no other last stride."""
    x = (x if x.dim() and x.stride(-1) == 1 else x.contiguous()).detach()
    x = x if shape is None else x.expand(shape)
    return DeviceBuffer(x, (0,) * (_AXES - x.dim()) + x.stride())
