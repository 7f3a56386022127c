"""Attention of PyTorch, with a key for the dropout of its weights."""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import has_torch_function

from unidrop.adapters.torch import chunked
from unidrop.adapters.torch.arrays import LIBRARY
from unidrop.adapters.torch.buffers import PLAIN, is_tracing
from unidrop.adapters.torch.functional import (
    TORCHSCRIPT_MESSAGE,
    dropout,
    run_with_drawn_key,
)
from unidrop.adapters.torch.fx import override, record_module
from unidrop.adapters.torch.modules import Dropout
from unidrop.adapters.torch.onnx import is_exporting
from unidrop.adapters.torch.operators import trace_draw_words
from unidrop.key import Key, check_key
from unidrop.rate import checked_probability
from unidrop.window import Window

__all__ = ["MultiheadAttention", "scaled_dot_product_attention"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_Result = Tensor | tuple[Tensor, Tensor]


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    dropout_key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    dropout_key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    dropout_key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``dropout(softmax(query @ key.mT * scale)) @ value`` without storing the weights.

    A replacement of `torch.nn.functional.scaled_dot_product_attention`. The mask is the mask of
    `dropout` on the weights: ``keep_mask((*batch, heads, queries, keys), dropout_p, dropout_key)``.

    Parameters
    ----------
    query, key, value, attn_mask, is_causal, scale, enable_gqa
        As in PyTorch, with PyTorch's errors. With a window, ``is_causal`` compares the positions in
        the whole sequence.
    dropout_p : int or float, default 0.0
        The probability of zeroing a weight, in [0, 1]. If 0, PyTorch's own function runs.
    dropout_key : unidrop.Key, optional
        The name of the mask; ``key`` is the name of the keys that queries attend to. If None, the
        function draws a key from PyTorch's default CPU generator, as `dropout` does.
    global_shape, start : sequence of int, optional
        The weights are the block that begins at ``start`` of weights of shape ``global_shape``,
        ``(*batch, heads, queries, keys)``, and get exactly that block of the whole mask.
    return_lse : bool, default False
        If True, the logarithm of the sum of the exponentials of each query's scores is returned
        too, of shape ``(*batch, heads, queries)``. It is differentiable. Blocks of keys merge to
        the whole by ``softmax(lse)``, over blocks. Not so for a query whose mask adds a number such
        as -1e9 to all scores: its lse has no digits left for the number of keys.

    Returns
    -------
    output : torch.Tensor
        Of shape ``(*batch, heads, queries, features of value)``; 0 for queries without keys. The
        backward pass recomputes weights and mask. Differentiating the gradient, forward-mode
        differentiation and `torch.func` store all weights.
    lse : torch.Tensor
        Only with ``return_lse``: in float64 for float64, otherwise in float32.

    Raises
    ------
    TypeError
        If dropout_p is not a Python number, dropout_key is not a Key, or a tensor is sparse or
        nested.
    ValueError
        If the window does not fit, or dropout_key is a batch of keys.
    RuntimeError
        If dropout_p is outside [0, 1], or shapes or dtypes do not match.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key, keep_mask
    >>> from unidrop.adapters.torch import scaled_dot_product_attention
    >>> query, value = torch.zeros(2, 3, 4), torch.eye(3).expand(2, 3, 3)
    >>> weights = scaled_dot_product_attention(
    ...     query, query, value, dropout_p=0.5, dropout_key=Key(42)
    ... )
    >>> mask = keep_mask((2, 3, 3), 0.5, Key(42), xp=torch)
    >>> torch.equal(weights != 0, mask)
    True
    """
    arguments = query, key, value, attn_mask
    for x in arguments:
        if not isinstance(x, Tensor) and has_torch_function((x,)):
            result: _Result = override(
                scaled_dot_product_attention,
                x,
                *arguments,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                dropout_key=dropout_key,
                global_shape=global_shape,
                start=start,
                return_lse=return_lse,
            )
            return result
    p = _checked_probability(dropout_p)
    if dropout_key is not None:
        check_key(dropout_key)
    is_plain = global_shape is None and start is None and not return_lse
    if p == 0 and is_plain:
        return functional.scaled_dot_product_attention(
            *arguments, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    for name, x in zip(("query", "key", "value", "attn_mask"), arguments, strict=True):
        if isinstance(x, Tensor):
            _check_tensor(x, name)
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(TORCHSCRIPT_MESSAGE)
    if all(isinstance(x, Tensor) for x in (query, key, value)):
        query, key, value, attn_mask = _autocast(*arguments)
    if not _is_usual(query, key, value, attn_mask, is_causal, scale, enable_gqa):
        _raise_own(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if enable_gqa:
        heads = query.shape[-3]
        if heads and 0 in (key.shape[-3], value.shape[-3]):
            raise RuntimeError(
                "Number of heads in key and value must divide the number of heads in query, got 0"
            )
        key, value = (
            x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], -3)
            for x in (key, value)
        )
    batch, *others = (x.shape[:-2] for x in (query, key, value))
    is_materialized = is_exporting() or torch.autograd.forward_ad._current_level >= 0
    if any(other != batch for other in others):
        batch = torch.broadcast_shapes(batch, others[0])
        # If values alone have a batch, it shares the weights.
        is_materialized |= torch.broadcast_shapes(batch, others[1]) != batch
    shape = (*batch, query.shape[-2], key.shape[-2])
    window = Window.from_args(shape, (), global_shape, start)
    if is_materialized or torch._C._are_functorch_transforms_active():
        options = p, is_causal, scale, global_shape, start
        results = chunked.materialize(query, key, value, attn_mask, dropout_key, *options)
    else:
        query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))

        def call(drawn: Key) -> tuple[Tensor, Tensor]:
            options = p, is_causal, scale, window
            output, sizes = chunked.attend(query, key, value, attn_mask, drawn, *options)
            return output, sizes.sum(-1) if return_lse else sizes

        if p == 0:
            results = call(Key(0))  # which no dropout uses
        elif dropout_key is not None:
            results = call(dropout_key)
        elif is_tracing():
            results = call(Key._from_raw_words(trace_draw_words(query)))
        else:
            results = run_with_drawn_key(call, query, False)
    return results if return_lse else results[0]


def _checked_probability(p: Any) -> float:
    """Return a valid rate; raises RuntimeError for one outside [0, 1], as PyTorch does."""
    try:
        return checked_probability(p, "dropout_p")
    except ValueError:
        raise RuntimeError(
            rf"dropout probability has to be between 0 and 1, but got {p:g}"
        ) from None


def _check_tensor(x: Tensor, name: str) -> None:
    """Raise TypeError for tensors that are not dense, or are parts of others."""
    if type(x) not in PLAIN:
        LIBRARY.arrays.check_type(type(x), name)
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def _autocast(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tensors in the dtype of autocast, if it is enabled."""
    if not chunked.is_autocasting(query.device):
        return query, key, value, mask
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(x: Tensor) -> Tensor:
        is_cast = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if is_cast else x

    return cast(query), cast(key), cast(value), None if mask is None else cast(mask)


def _is_usual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> bool:
    """Return whether the arguments are valid, and the tensors have one batch."""
    if not all(isinstance(x, Tensor) for x in (query, key, value)):
        return False
    if not (isinstance(is_causal, bool) and isinstance(enable_gqa, bool)):
        return False
    rank = query.dim()
    if rank < 2 + bool(enable_gqa) or key.dim() != rank or value.dim() != rank:
        return False
    if query.dtype not in _DTYPES or any(
        x.dtype != query.dtype or x.device != query.device for x in (key, value)
    ):
        return False
    common = rank - 2 - bool(enable_gqa)
    batches = [x.shape[:common] for x in (query, key, value)]
    if batches[0] != batches[1] or batches[0] != batches[2]:
        return False
    if enable_gqa:
        heads = query.shape[-3]
        if any(x.shape[-3] == 0 or heads % x.shape[-3] for x in (key, value)):
            return False
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return False
    if not (scale is None or isinstance(scale, float | int)):
        return False
    if mask is None:
        return True
    if is_causal or not isinstance(mask, Tensor) or mask.dim() > rank:
        return False
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.device != query.device:
        return False
    lengths = (*query.shape[:-1], key.shape[-2])
    pairs = zip(reversed(mask.shape), reversed(lengths), strict=False)
    return all(length == 1 or length == full for length, full in pairs)


@torch.no_grad()
def _raise_own(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    """Raise PyTorch's error if it refuses the arguments; it accepts more than the usual ones."""

    def run(query: Tensor, mask: Tensor | None) -> None:
        functional.scaled_dot_product_attention(
            query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    # PyTorch runs this backend if it drops weights, and others accept more without dropout.
    with sdpa_kernel(SDPBackend.MATH):
        try:
            # All arguments are valid if they are for one query, which needs no array of scores.
            first = mask
            if isinstance(mask, Tensor) and mask.dim() > 1 and mask.shape[-2] == query.shape[-2]:
                first = mask[..., :1, :]
            run(query[..., :1, :], first)
        except Exception:  # PyTorch raises many types
            is_refused = True
        else:
            is_refused = isinstance(first, Tensor) and first.dim() > 1 and first.shape[-2] > 1
        if is_refused:
            run(query, mask)  # whose message has the lengths of the arguments


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention as `torch.nn.MultiheadAttention`, with a seed for its dropout.

    Arguments, parameters, results and errors are as in PyTorch, and evaluation is PyTorch's own.
    Training call n drops the attention weights of the elements that `Dropout` with the same seed
    drops in its call n, in a tensor of shape (batch, heads, queries, keys). This holds with and
    without ``need_weights``; only with it are the weights stored.

    Parameters
    ----------
    embed_dim, num_heads, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        As in `torch.nn.MultiheadAttention`.
    dropout : int or float, default 0.0
        The probability of zeroing an attention weight, in [0, 1].
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Attributes
    ----------
    seed : unidrop.Key or None
        As in `Dropout`.
    calls : torch.Tensor
        As in `Dropout`. ``state_dict`` contains it as the extra state of a child. A checkpoint of
        `torch.nn.MultiheadAttention` loads in strict mode and leaves the number as it is.

    Raises
    ------
    TypeError
        If dropout is not a Python number, or seed is neither an integer nor a Key.
    ValueError
        If dropout is outside [0, 1], or seed is outside [0, 2^64).

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import MultiheadAttention
    >>> layer = MultiheadAttention(8, num_heads=2, dropout=0.5, seed=Key(42).fold_in("encoder/0"))
    >>> x = torch.ones(3, 4, 8)
    >>> output, weights = layer(x, x, x)
    >>> int(layer.calls)
    1
    """

    # The dropout layer has the qualified name of this one in `assign_seeds`.
    _unnamed_child = "_attention_dropout"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        seed: int | Key | None = None,
    ) -> None:
        options = add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        super().__init__(embed_dim, num_heads, dropout, bias, *options)
        self.seed = seed

    @property
    def dropout(self) -> float:
        """The probability of zeroing an attention weight."""
        return self._attention_dropout.p

    @dropout.setter
    def dropout(self, p: float) -> None:
        if "_attention_dropout" not in self._modules:  # PyTorch sets the rate first
            self._attention_dropout = Dropout(p)
        self._attention_dropout.p = checked_probability(p)

    @property
    def seed(self) -> Key | None:
        """The key of the module, or None if it draws a key for each call."""
        return self._attention_dropout.seed

    @seed.setter
    def seed(self, value: int | Key | None) -> None:
        self._attention_dropout.seed = value

    @property
    def calls(self) -> Any:
        """The number of training calls so far; only with a seed."""
        return self._attention_dropout.calls

    @calls.setter
    def calls(self, value: Any) -> None:
        self._attention_dropout.calls = value

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run attention, with dropout of the weights in training; as the layer of PyTorch."""
        options: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if not isinstance(query, Tensor):
            proxy: tuple[Tensor, Tensor | None] = record_module(self, query, key, value, **options)
            return proxy
        if self.training and query.is_nested:
            raise TypeError("query must be a dense tensor, got a nested tensor")
        if not self.training or self.dropout == 0:
            return super().forward(query, key, value, **options)
        if not self._is_usual(query, key, value, key_padding_mask, attn_mask, is_causal):
            self._raise_own(query, key, value, **options)

        q, k, v = self._project(query, key, value)
        is_batched = query.dim() == 3
        if not is_batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        # With other masks or for weights, PyTorch takes the mask instead of the hint.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None
        if not is_causal:
            mask = self._merge(key_padding_mask, attn_mask, len(q), query.dtype)
        q, k, v = (self._split_heads(x) for x in (q, *self._add_keys(k, v)))

        def attend(dropout_key: Key | None) -> tuple[Tensor, Tensor | None]:
            """Return the output and the weights, dropped by a key if there is one."""
            p, weights = (0.0 if dropout_key is None else self.dropout), None
            if need_weights:
                scores = q * math.sqrt(1.0 / self.head_dim) @ k.transpose(-1, -2)
                weights = (scores if mask is None else scores + mask).softmax(-1)
                weights = weights if p == 0 else dropout(weights, p, key=dropout_key)
                output = weights @ v
                weights = weights.mean(1) if average_attn_weights else weights
            else:
                output = scaled_dot_product_attention(
                    q, k, v, mask, p, is_causal, dropout_key=dropout_key
                )
            output = output.transpose(1, 2).flatten(2)
            return functional.linear(output, self.out_proj.weight, self.out_proj.bias), weights

        if self._attention_dropout.training:
            output, weights = self._attention_dropout.run_with_key(q, attend)
        else:  # a user has turned this dropout off
            output, weights = attend(None)
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return the queries, keys and values of all heads; equal inputs share one projection."""
        bias, inputs = self.in_proj_bias, (query, key, value)
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None, None, None) if bias is None else bias.chunk(3)
            return tuple(map(functional.linear, inputs, weights, biases))
        if query is key is value:
            return functional.linear(query, self.in_proj_weight, bias).chunk(3, -1)
        counts = (1, 2) if key is value else (1, 1, 1)
        sizes = [count * self.embed_dim for count in counts]
        weights = self.in_proj_weight.split(sizes)
        biases = (None,) * len(sizes) if bias is None else bias.split(sizes)
        parts = map(functional.linear, inputs, weights, biases)
        return tuple(
            x for part, count in zip(parts, counts, strict=True) for x in part.chunk(count, -1)
        )

    def _add_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and the values, with those that options add."""
        count = len(k)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(count, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(count, 1, -1)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(count, 1, self.embed_dim)], 1) for x in (k, v))
        return k, v

    def _split_heads(self, x: Tensor) -> Tensor:
        """Return a view with an axis of heads, before the axis of the sequence."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _merge(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batch: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Return the numbers that both masks add to scores; added keys have 0."""
        extra = (self.bias_k is not None) + self.add_zero_attn
        other = None if attn_mask is None else attn_mask.dtype
        padding = functional._canonical_mask(
            key_padding_mask, "key_padding_mask", other, "attn_mask", dtype
        )
        mask = functional._canonical_mask(
            attn_mask, "attn_mask", None, "", dtype, check_other=False
        )
        if padding is not None:
            padding = padding[:, None, None]
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (batch, self.num_heads))
        merged: Tensor | None = padding if mask is None else mask
        if mask is not None and padding is not None:
            merged = mask + padding
        return merged if merged is None or not extra else functional.pad(merged, (0, extra))

    def _is_usual(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Return whether PyTorch accepts the arguments."""
        tensors = query, key, value
        if not all(isinstance(x, Tensor) and x.dim() == query.dim() for x in tensors):
            return False
        if query.dim() not in (2, 3) or any(x.is_nested for x in tensors):
            return False
        dtype = self.out_proj.weight.dtype
        if any(x.dtype != dtype for x in tensors) and not chunked.is_autocasting(query.device):
            return False
        features = [x.shape[-1] for x in tensors]
        if features != [self.embed_dim, self.kdim, self.vdim] or key.shape[:-1] != value.shape[:-1]:
            return False
        axis = 0 if self.batch_first or query.dim() == 2 else 1
        queries, keys = (x.shape[-2] if axis == 0 else x.shape[0] for x in (query, key))
        batch = query.shape[axis : axis + 1] if query.dim() == 3 else ()
        if query.dim() == 3 and key.shape[axis] != query.shape[axis]:
            return False
        if is_causal and attn_mask is None:
            return False
        heads = math.prod(batch) * self.num_heads
        for mask, shapes in (
            (key_padding_mask, ((*batch, keys),)),
            (attn_mask, ((queries, keys), (heads, queries, keys))),
        ):
            if mask is None:
                continue
            if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, query.dtype):
                return False
            if tuple(mask.shape) not in shapes:
                return False
        return True

    def _raise_own(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
        """Raise PyTorch's error if it refuses the arguments."""
        if self.batch_first and query.dim() == 3:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        with torch.no_grad():
            functional.multi_head_attention_forward(
                query,
                key,
                value,
                self.embed_dim,
                self.num_heads,
                self.in_proj_weight,
                self.in_proj_bias,
                self.bias_k,
                self.bias_v,
                self.add_zero_attn,
                0.0,
                self.out_proj.weight,
                self.out_proj.bias,
                training=False,
                use_separate_proj_weight=self.in_proj_weight is None,
                q_proj_weight=self.q_proj_weight,
                k_proj_weight=self.k_proj_weight,
                v_proj_weight=self.v_proj_weight,
                **options,
            )
