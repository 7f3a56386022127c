"""Embedding dropout, as in fastai."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from unidrop.adapters.torch.buffers import is_tracing
from unidrop.adapters.torch.functional import TORCHSCRIPT_MESSAGE, run_with_drawn_key
from unidrop.adapters.torch.fx import override, record_module
from unidrop.adapters.torch.modules import SeededModule
from unidrop.adapters.torch.onnx import TensorRate, is_exporting
from unidrop.adapters.torch.operators import as_constant, trace_draw_words
from unidrop.embedding import drop_rows, number_rows, plan_embedding_dropout
from unidrop.key import Key, check_key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["EmbeddingDropout", "embedding_dropout"]


def embedding_dropout(
    weight: Tensor,
    indices: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    key: Key | None = None,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Look up embeddings of words, and drop words everywhere with probability p.

    Parameters
    ----------
    weight : torch.Tensor
        The matrix of shape (V, D).
    indices : torch.Tensor
        The words to look up, of any shape.
    p : int or float, default 0.5
        The probability of dropping a word, in [0, 1].
    training : bool, default True
        If False, nothing is dropped.
    padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        As in `torch.nn.functional.embedding`. With max_norm, the rows of the weight are
        renormalized before the dropout, which scales them.
    key, global_shape, start
        As in `dropout`.
    return_mask : bool, default False
        If True, the mask of the matrix is returned too.

    Returns
    -------
    output : torch.Tensor
        Of shape ``(*, D)``. It equals the look-up in the matrix after `dropout` with
        ``broadcast_axes=(1,)``, and so does the gradient. But only the rows that are looked up are
        multiplied.
    mask : torch.Tensor of bool
        Only with ``return_mask``: True for kept words, of shape (V, 1).

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if weight is not a matrix.
    IndexError, RuntimeError
        As `torch.nn.functional.embedding`, such as for an index out of range.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import embedding_dropout
    >>> embedding_dropout(torch.ones(6, 1), torch.tensor([0, 1, 1, 5, 0]), 0.5, key=Key(42))[:, 0]
    tensor([2., 0., 0., 2., 2.])
    """
    options: dict[str, Any] = {"global_shape": global_shape, "start": start}
    embedding: dict[str, Any] = {"padding_idx": padding_idx, "max_norm": max_norm}
    embedding |= {"norm_type": norm_type, "sparse": sparse}
    embedding["scale_grad_by_freq"] = scale_grad_by_freq
    if not isinstance(weight, Tensor) or not isinstance(indices, Tensor):
        name, by = ("indices", indices) if isinstance(weight, Tensor) else ("weight", weight)
        if not has_torch_function_unary(by):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(by).__name__}")
        options |= {"key": key, "return_mask": return_mask, **embedding}
        return override(embedding_dropout, by, weight, indices, p, training, **options)
    if key is not None:
        check_key(key)
    plan = plan_embedding_dropout(weight, _get_rate(p), training=training, **options)
    if not plan.drops:
        output = torch.nn.functional.embedding(indices, weight, **embedding)
        return (output, plan.ones(weight)) if return_mask else output

    def call(key: Key) -> Any:
        output, mask = _look_up(plan, weight, indices, key, embedding)
        return (output, mask) if return_mask else output

    if key is not None:
        return call(key)
    if is_tracing():
        return call(Key._from_raw_words(trace_draw_words(weight)))
    return run_with_drawn_key(call, weight, False)


def _get_rate(p: float, name: str = "p") -> Rate:
    """Return the rate of a call, with a scale that compilers and exporters leave as it is."""
    rate = Rate.from_p(p, name)
    if is_exporting():
        return TensorRate(*rate)
    return Rate.from_p(as_constant(rate.p)) if is_tracing() else rate


def _look_up(
    plan: DropoutPlan, weight: Tensor, indices: Tensor, key: Key, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the rows of a matrix after its dropout, and the mask."""
    if not is_tracing() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(TORCHSCRIPT_MESSAGE)
    flat = indices.reshape(-1)
    scales = options["scale_grad_by_freq"]
    options = {**options, "scale_grad_by_freq": False}
    rows = torch.nn.functional.embedding(flat, weight, **options)
    mask = plan.mask(weight, key)
    rows = drop_rows(plan, rows, mask, flat)
    if is_exporting():  # an ONNX graph has no gradient
        return rows.reshape(*indices.shape, weight.shape[1]), mask
    # The gradient is divided by counts before it is scaled, as in the look-up of dropped words.
    numbers = number_rows(plan, flat, weight.shape[0]).reshape(indices.shape)
    output = torch.nn.functional.embedding(numbers, rows, scale_grad_by_freq=scales)
    return output, mask


class EmbeddingDropout(SeededModule):
    """Drop words of an embedding in training, as fastai's ``EmbeddingDropout``.

    Parameters
    ----------
    emb : torch.nn.Embedding
        The embedding. Its padding_idx, max_norm, norm_type, scale_grad_by_freq and sparse apply.
    embed_p : int or float, default 0.5
        The probability of dropping a word, in [0, 1].
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Attributes
    ----------
    emb : torch.nn.Embedding
        The embedding, whose weight other modules may share.
    embed_p : float
        The rate, which a schedule may set.
    seed, calls
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; TypeError if emb is not an embedding.

    Notes
    -----
    `unidrop.family.embedding_dropout` has the details. With max_norm, the rows of the weight are
    renormalized before the dropout, and fastai renormalizes after it.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import EmbeddingDropout
    >>> emb = torch.nn.Embedding.from_pretrained(torch.ones(4, 1))
    >>> EmbeddingDropout(emb, 0.5, seed=42)(torch.tensor([[0, 1, 2, 3, 0]]))[0, :, 0]
    tensor([2., 2., 0., 0., 2.])
    """

    def __init__(
        self, emb: torch.nn.Embedding, embed_p: float = 0.5, *, seed: int | Key | None = None
    ) -> None:
        if not isinstance(emb, torch.nn.Embedding):
            raise TypeError(f"emb must be a torch.nn.Embedding, got {type(emb).__name__}")
        Rate.from_p(embed_p, "embed_p")
        super().__init__(embed_p, seed=seed)
        self.emb = emb

    @property
    def embed_p(self) -> float:
        """The probability of dropping a word."""
        return self.p

    @embed_p.setter
    def embed_p(self, value: float) -> None:
        self.p = Rate.from_p(value, "embed_p").p

    def forward(self, words: Tensor) -> Tensor:
        """Look up words, and drop some in training."""
        if not isinstance(words, Tensor):
            proxy: Tensor = record_module(self, words)
            return proxy
        emb = self.emb
        rate = _get_rate(self.p, "embed_p")
        plan = plan_embedding_dropout(emb.weight, rate, training=self.training, name="emb.weight")
        if not plan.drops:
            output: Tensor = emb(words)
            return output
        options = {
            "padding_idx": emb.padding_idx,
            "max_norm": emb.max_norm,
            "norm_type": emb.norm_type,
            "scale_grad_by_freq": emb.scale_grad_by_freq,
            "sparse": emb.sparse,
        }
        return self.run_with_key(
            words, lambda key: _look_up(plan, emb.weight, words, key, options)[0]
        )

    def extra_repr(self) -> str:
        """Return the rate, and the seed if there is one."""
        text = f"embed_p={self.p}"
        return text if self.seed is None else f"{text}, seed={self.seed}"
