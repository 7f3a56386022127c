"""The operator ``torch.ops.unidrop.attend``: attention over tiles, with dropout of its weights.

Requirements this design meets:

* The mask is dropout's mask of the attention weights, of shape (..., heads, queries, keys). Each
  tile gets its window of the mask, so the mask does not depend on the tiles.
* Neither the weights nor the mask are stored. Memory grows with the queries times one block of
  keys, and the backward pass recomputes each tile.
* Compilers see one operator in each direction, as they do for dropout.

`materialize` computes the same with all weights in memory. It serves what differentiates the
gradient, and `torch.func`.

M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867 (2018).
T. Dao, D. Fu, S. Ermon, A. Rudra and C. Ré, "FlashAttention: fast and memory-efficient exact
attention with IO-awareness", NeurIPS 35 (2022).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from unidrop.adapters.torch import flash
from unidrop.adapters.torch.arrays import window_arguments
from unidrop.adapters.torch.buffers import as_int64, is_tracing, must_stay, refuse_capture
from unidrop.adapters.torch.functional import dropout
from unidrop.adapters.torch.operators import (
    as_constant,
    as_key,
    cached_rate,
    key_tensor,
    read_start,
)
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.window import Window

__all__ = ["attend", "is_autocasting", "materialize"]

# The keys of a tile, and the weights of a tile if it has more than a few queries.
_KEYS, _WEIGHTS, _FEW = 512, 1 << 20, 32

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor words, float p, bool is_causal, "
    "float? scale, SymInt[]? global_shape, Tensor? start"
)
_library = torch.library.Library("unidrop", "FRAGMENT")
_library.define(f"attend({_ARGUMENTS}) -> (Tensor, Tensor)")
_library.define(
    "attend_backward(Tensor upstream, Tensor upstream_sizes, Tensor output, Tensor sizes, "
    f"bool needs_mask, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and weights for inputs of a dtype."""
    return dtype if dtype is torch.float64 else torch.float32


def is_autocasting(device: torch.device) -> bool:
    """Return whether autocast lowers the precision of operations on a device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that keeps autocast from lowering the precision of weights."""
    return torch.autocast(device.type, enabled=False) if is_autocasting(device) else nullcontext()


class _Tiles:
    """The tiles of attention, on tensors of shape (batch and heads, length, features)."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_key: Tensor | Key,
        p: float,
        is_causal: bool,
        scale: float | None,
        global_shape: Sequence[int] | None,
        start: Tensor | Sequence[Any] | None,
    ) -> None:
        self.batch = query.shape[:-2]
        self.query, self.key, self.value = (self.flatten(x) for x in (query, key, value))
        self.count, self.queries, features = self.query.shape
        self.keys = self.key.shape[1]
        self.scale = _default_scale(features) if scale is None else scale
        shape = (*self.batch, self.queries, self.keys)
        self.mask = None if mask is None else mask.expand(shape)
        self.is_causal = is_causal
        self.rate = cached_rate(p)
        self.dropout_key, first = _read(dropout_key, start, query.device)
        self.global_shape = shape if global_shape is None else tuple(global_shape)
        self.start = (0,) * len(shape) if first is None else tuple(first)
        self.ignored = self.query.new_empty(())

    def flatten(self, x: Tensor) -> Tensor:
        """Return a tensor with one axis for batch and heads, in the dtype of sums."""
        return x.to(_compute_type(x.dtype)).reshape(math.prod(self.batch), *x.shape[-2:])

    def blocks_of_queries(self) -> Iterator[slice]:
        """Yield the queries of each row of tiles."""
        weights = max(1, self.count * min(self.keys, _KEYS))
        yield from _blocks(self.queries, max(_FEW, _WEIGHTS // weights))

    def blocks_of_keys(self, rows: slice) -> Iterator[slice]:
        """Yield the keys of each tile of a row, without tiles that no query attends to."""
        last = self._diagonal(rows.stop - 1, 0) if self.is_causal else None
        for columns in _blocks(self.keys, _KEYS):
            if isinstance(last, int) and columns.start > last:
                return
            yield columns

    def scores(self, rows: slice, columns: slice) -> Tensor:
        """Return the scores of a tile, which are -inf for pairs that do not attend."""
        transposed = self.key[:, columns].transpose(1, 2)
        scores = torch.baddbmm(
            self.ignored, self.query[:, rows], transposed, beta=0, alpha=self.scale
        )
        if self.mask is not None:
            tile, mask = self.unflatten(scores), self.mask[..., rows, columns]
            if mask.dtype is torch.bool:
                tile.masked_fill_(~mask, -math.inf)
            else:
                tile.add_(mask)
        if self.is_causal:
            diagonal = self._diagonal(rows.start, columns.start)
            if not (isinstance(diagonal, int) and columns.stop - columns.start <= diagonal + 1):
                scores.masked_fill_(_after(scores, diagonal), -math.inf)
        return scores

    def _diagonal(self, row: int, column: int) -> Any:
        """Return the last key that a query attends to, counted from a column."""
        difference: Any = self.start[-2] - self.start[-1]
        return difference + (row - column)

    def drop(self, weights: Tensor, rows: slice, columns: slice, *, inplace: bool) -> Tensor:
        """Return the weights of a tile after dropout."""
        if self.rate.p == 0:
            return weights if inplace else weights.clone()
        tile = self.unflatten(weights)
        *first, row, column = self.start
        plan = DropoutPlan.from_args(
            tile,
            self.rate,
            global_shape=self.global_shape,
            start=(*first, row + rows.start, column + columns.start),
        )
        dropped: Tensor = plan.run(tile, self.dropout_key, out=tile if inplace else None)
        return dropped.view(weights.shape)

    def unflatten(self, tile: Tensor) -> Tensor:
        """Return a view of a tile with the axes of the batch."""
        return tile.view(*self.batch, *tile.shape[1:])


def _read(
    dropout_key: Tensor | Key, start: Tensor | Sequence[Any] | None, device: torch.device
) -> tuple[Key, Sequence[Any] | None]:
    """Return the key and the start of a window, which the operator receives as tensors."""
    if isinstance(dropout_key, Key):
        assert not isinstance(start, Tensor)
        return dropout_key, _widen(start)
    assert start is None or isinstance(start, Tensor)
    if not (must_stay(dropout_key) and (start is None or must_stay(start))):
        refuse_capture(device)
    return as_key(dropout_key), read_start(start)


def _widen(start: Sequence[Any] | None) -> tuple[Any, ...] | None:
    """Return a start as integers and tensors of int64: sums of shorter ones may wrap around."""
    if start is None:
        return None
    return tuple(as_int64(x, x.device) if isinstance(x, Tensor) else x for x in start)


def _run_kernels(
    run: Callable[..., Any],
    arrays: tuple[Tensor, ...],
    mask: Tensor | None,
    dropout_key: Tensor | Key,
    p: float,
    is_causal: bool,
    scale: float | None,
    global_shape: Sequence[int] | None,
    start: Tensor | Sequence[Any] | None,
) -> Any | None:
    """Return the results of a function of `flash`, or None if it does not serve the call.

    The query is among the arrays, before key and value.
    """
    query = arrays[-3]
    scale = _default_scale(query.shape[-1]) if scale is None else scale
    first_key, first = _read(dropout_key, start, query.device)
    return run(*arrays, mask, first_key, p, is_causal, scale, global_shape, first)


def _blocks(length: int, block: int) -> Iterator[slice]:
    for first in range(0, length, block):
        yield slice(first, min(first + block, length))


def _default_scale(features: int) -> float:
    return 1 / math.sqrt(features) if features else 1.0


def _after(scores: Tensor, diagonal: Any) -> Tensor:
    """Return which keys come after each query, for a diagonal as of `_Tiles._diagonal`."""
    rows, columns = (torch.arange(n, device=scores.device) for n in scores.shape[-2:])
    after: Tensor = columns - rows.unsqueeze(1) > diagonal
    return after


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if must_stay(query):  # on a GPU
        arrays = query, key, value
        results: tuple[Tensor, Tensor] | None = _run_kernels(flash.attend, arrays, *rest)
        if results is not None:
            return results
    with _without_autocast(query.device):
        tiles = _Tiles(query, key, value, *rest)
        # No views: a user may write to the output in place, and autograd refuses writes to a
        # view that a function of two outputs returns.
        output = tiles.query.new_empty(*query.shape[:-1], value.shape[-1])
        flat_output = output.view(tiles.count, tiles.queries, value.shape[-1])
        # The highest score, and the logarithm of the total of all differences to it. Their sum
        # would lose the second where scores are large, for example by a mask that adds -1e9.
        sizes = tiles.query.new_empty(*query.shape[:-1], 2)
        flat_sizes = sizes.view(tiles.count, tiles.queries, 2)
        for rows in tiles.blocks_of_queries():
            sums = torch.zeros_like(flat_output[:, rows])
            total = torch.zeros_like(flat_sizes[:, rows, :1])
            # Unlike -inf, the lowest number has a difference to scores of -inf.
            top = torch.full_like(total, torch.finfo(total.dtype).min)
            for columns in tiles.blocks_of_keys(rows):
                weights = tiles.scores(rows, columns)
                before, top = top, torch.maximum(top, weights.amax(-1, keepdim=True))
                weights.sub_(top).exp_()
                shrink = before.sub_(top).exp_()
                total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
                weights = tiles.drop(weights, rows, columns, inplace=True)
                sums.mul_(shrink).baddbmm_(weights, tiles.value[:, columns])
            # The total of a query without keys is 0, and all others are at least 1.
            torch.div(sums, total.clamp_min(0.5), out=flat_output[:, rows])
            flat_sizes[:, rows] = torch.cat([top, total.log_()], -1)
        return output.to(query.dtype), sizes


def _attention_backward(
    upstream: Tensor,
    upstream_sizes: Tensor,
    output: Tensor,
    sizes: Tensor,
    needs_mask: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if must_stay(query) and not needs_mask:
        arrays = upstream, upstream_sizes, output, sizes, query, key, value
        gradients = _run_kernels(flash.differentiate, arrays, mask, *rest)
        if gradients is not None:
            return *gradients, query.new_empty(0)
    with _without_autocast(query.device):
        tiles = _Tiles(query, key, value, mask, *rest)
        upstream, output = tiles.flatten(upstream), tiles.flatten(output)
        # The gradient of a score is its weight times the gradient of the weight, minus their sum.
        center = (upstream * output).sum(-1, keepdim=True) - upstream_sizes[..., 0].reshape(
            tiles.count, tiles.queries, 1
        )
        top, rest_of_lse = sizes.reshape(tiles.count, tiles.queries, 2).split(1, -1)
        # So that all weights of a query without keys are 0.
        rest_of_lse = rest_of_lse.masked_fill(rest_of_lse == -math.inf, math.inf)
        of_query, of_key, of_value = (
            torch.zeros_like(x, memory_format=torch.contiguous_format)
            for x in (tiles.query, tiles.key, tiles.value)
        )
        of_mask = None
        if needs_mask and mask is not None:
            of_mask = torch.zeros(mask.shape, dtype=center.dtype, device=mask.device)
        for rows in tiles.blocks_of_queries():
            for columns in tiles.blocks_of_keys(rows):
                weights = tiles.scores(rows, columns).sub_(top[:, rows])
                weights.sub_(rest_of_lse[:, rows]).exp_()
                gradient = tiles.drop(weights, rows, columns, inplace=False)
                of_value[:, columns].baddbmm_(gradient.transpose(1, 2), upstream[:, rows])
                transposed = tiles.value[:, columns].transpose(1, 2)
                gradient.mul_(torch.bmm(upstream[:, rows], transposed))
                gradient.sub_(weights.mul_(center[:, rows]))
                if of_mask is not None:
                    _add_summed(of_mask, tiles.unflatten(gradient), rows, columns)
                of_query[:, rows].baddbmm_(gradient, tiles.key[:, columns], alpha=tiles.scale)
                of_key[:, columns].baddbmm_(
                    gradient.transpose(1, 2), tiles.query[:, rows], alpha=tiles.scale
                )
        if mask is None or of_mask is None:
            of_mask, mask = query.new_empty(0), query
        return (
            of_query.to(query.dtype).view(query.shape),
            of_key.to(key.dtype).view(key.shape),
            of_value.to(value.dtype).view(value.shape),
            of_mask.to(mask.dtype),
        )


def _add_summed(total: Tensor, tile: Tensor, rows: slice, columns: slice) -> None:
    """Add a tile to its block of a tensor that is broadcast to the shape of all weights."""
    if total.dim() > 1 and total.shape[-2] > 1:
        total = total[..., rows, :]
    if total.dim() > 0 and total.shape[-1] > 1:
        total = total[..., columns]
    total.add_(tile.sum_to_size(total.shape))


def materialize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_key: Key | None,
    p: float,
    is_causal: bool,
    scale: float | None,
    global_shape: Sequence[int] | None,
    start: Sequence[Any] | None,
) -> tuple[Tensor, Tensor]:
    """Return attention and the logarithm of its totals, by differentiable operations of PyTorch."""
    dtype = query.dtype
    with _without_autocast(query.device):
        query, key, value = (x.to(_compute_type(dtype)) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2)
        scores = scores * (_default_scale(query.shape[-1]) if scale is None else scale)
        if mask is not None:
            is_bool = mask.dtype is torch.bool
            scores = scores.masked_fill(~mask, -math.inf) if is_bool else scores + mask
        if is_causal:
            first = _widen(start)
            diagonal = 0 if first is None else first[-2] - first[-1]
            after = _after(scores, diagonal)
            scores = scores.masked_fill(after, -math.inf)
        is_alone = (scores == -math.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(is_alone, 0.0)  # a gradient of -inf alone would be NaN
        weights = scores.softmax(-1).masked_fill(is_alone, 0.0)
        weights = dropout(weights, p, key=dropout_key, global_shape=global_shape, start=start)
        # The gradient of `logsumexp` would subtract a rounded sum: see `_attention`.
        top = scores.detach().amax(-1, keepdim=True)
        lse = (scores - top).exp().sum(-1).log() + top.squeeze(-1)
        lse = lse.masked_fill(is_alone.squeeze(-1), -math.inf)
        return (weights @ value).to(dtype), lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, dropout_key, p, is_causal, scale, global_shape, start = inputs
    ctx.is_operator = isinstance(dropout_key, Tensor)
    saved, sizes = output
    if any(ctx.needs_input_grad) and not must_stay(query):
        # A user may write to the output, as to the one of PyTorch on a CPU. On a GPU, both raise.
        saved = saved.clone()
    tensors = query, key, value, mask, saved, sizes
    ctx.constants = p, is_causal, scale, global_shape
    if ctx.is_operator:
        ctx.save_for_backward(*tensors, dropout_key, start)
    else:
        ctx.save_for_backward(*tensors)
        ctx.mask = dropout_key, start


def _differentiate(ctx: Any, upstream: Tensor, upstream_sizes: Tensor) -> tuple[Any, ...]:
    """Return the gradients of the operator, by tiles unless they are differentiated too."""
    query, key, value, mask, output, sizes, *rest = ctx.saved_tensors
    dropout_key, start = rest if ctx.is_operator else ctx.mask
    p, is_causal, scale, global_shape = ctx.constants
    needs_mask = mask is not None and ctx.needs_input_grad[3]
    is_differentiated = torch.is_grad_enabled()
    # Tiles write to tensors, and a batch of gradients of an older kind cannot be written.
    if is_differentiated or torch._C._functorch.is_legacy_batchedtensor(upstream):
        first_key, first = _read(dropout_key, start, query.device)
        constants = p, is_causal, scale, global_shape, first
        with torch.enable_grad():
            # Views, because the history of one tensor may contain another.
            inputs = [x.view_as(x) for x in (query, key, value)]
            inputs += [mask.view_as(mask)] if mask is not None and needs_mask else []
            own_mask = inputs[3] if needs_mask else mask
            outputs = materialize(inputs[0], inputs[1], inputs[2], own_mask, first_key, *constants)
        wanted = [x for x in inputs if x.requires_grad]
        count = 2 if outputs[1].requires_grad else 1  # values do not change the totals
        upstreams = (upstream, upstream_sizes[..., 0])[:count]
        found = iter(
            torch.autograd.grad(outputs[:count], wanted, upstreams, create_graph=is_differentiated)
        )
        gradients = [next(found) if x.requires_grad else None for x in inputs]
        gradients += [] if needs_mask else [None]
    else:
        is_traced = ctx.is_operator and is_tracing()
        run = torch.ops.unidrop.attend_backward if is_traced else _attention_backward
        gradients = list(
            run(
                upstream,
                upstream_sizes,
                output,
                sizes,
                needs_mask,
                query,
                key,
                value,
                mask,
                dropout_key,
                p,
                is_causal,
                scale,
                global_shape,
                start,
            )
        )
        gradients[3] = gradients[3] if needs_mask else None
    return *gradients, *(None,) * 6


class _Attention(torch.autograd.Function):
    """The operator outside of traces; a first call of the operator itself imports Dynamo."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        results = _attention(*inputs)
        _save(ctx, inputs, results)
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        return _differentiate(ctx, *upstream)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_key: Key,
    p: float,
    is_causal: bool,
    scale: float | None,
    window: Window,
) -> tuple[Tensor, Tensor]:
    """Return attention and the sizes of queries, whose sum is the logarithm of the total.

    The tensors have one batch.
    """
    inputs, constants = (query, key, value, mask), (is_causal, scale)
    run: Callable[..., Any]
    results: tuple[Tensor, Tensor]
    if is_tracing():
        words = key_tensor(dropout_key, query.device)
        _, whole, start = (*window_arguments(window, query.device), None, None)[:3]
        run = torch.ops.unidrop.attend
        results = run(*inputs, words, as_constant(p), *constants, whole, start)
    else:
        run = _Attention.apply
        results = run(*inputs, dropout_key, p, *constants, window.global_shape, window.start)
    return results


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    sizes = query.new_empty((*query.shape[:-1], 2), dtype=_compute_type(query.dtype))
    return query.new_empty((*query.shape[:-1], value.shape[-1])), sizes


def _fake_attention_backward(
    upstream: Tensor,
    upstream_sizes: Tensor,
    output: Tensor,
    sizes: Tensor,
    needs_mask: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    of_mask = mask.new_empty(mask.shape) if needs_mask and mask is not None else query.new_empty(0)
    return *(x.new_empty(x.shape) for x in (query, key, value)), of_mask


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attend": (_attention, _fake_attention),
    "attend_backward": (_attention_backward, _fake_attention_backward),
}
for _name, (_function, _fake) in _OPERATORS.items():
    _library.impl(_name, _disable_dynamo(_function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"unidrop::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "unidrop::attend", _differentiate, setup_context=_save, lib=_library
)
