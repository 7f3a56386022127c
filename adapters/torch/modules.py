"""The dropout modules of `torch.nn`, with a seed and a count of training calls."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import torch
from torch import Tensor

from unidrop.adapters.calls import run_counted
from unidrop.adapters.torch.arrays import LIBRARY, is_tracing
from unidrop.adapters.torch.checkpoint import current_log
from unidrop.adapters.torch.func import randomness
from unidrop.adapters.torch.functional import (
    TORCHSCRIPT_MESSAGE,
    apply_plan,
    apply_traced,
    axes1d,
    axes2d,
    axes3d,
    make_plan,
    run_with_drawn_key,
    traced_call_drops,
)
from unidrop.adapters.torch.operators import (
    key_tensor,
    next_call_number,
    rollback_call,
    trace_call_key,
    trace_draw_words,
)
from unidrop.arguments import checked_integer
from unidrop.dtypes import integer_bits
from unidrop.key import Key
from unidrop.rate import Rate, checked_probability

__all__ = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d"]


_HINTS = {
    "calls": (
        "a Dropout without a seed does not count calls, because it draws a key for each call from "
        "PyTorch's default generator: make it with seed=Key(42).fold_in('its place in the model')"
    ),
    "key": "Dropout.key was renamed: use Dropout.seed",
}


class Dropout(torch.nn.Module):
    """During training, zero elements of the input with probability p and scale the others.

    A replacement of `torch.nn.Dropout`: every forward call zeroes elements independently and
    multiplies the kept ones by ``1 / (1 - p)``; evaluation is the identity. Beyond that, one seed
    drops the same elements in every framework and on every device, and the backward pass
    recomputes the mask, so autograd saves no tensor.

    Parameters
    ----------
    p : int or float, default 0.5
        The probability of zeroing an element, in [0, 1].
    inplace : bool, default False
        If True, the output is written to the input.
    seed : int or unidrop.Key, optional
        Training call n = 0, 1, 2, ... uses the key ``Key(seed).fold_in(n)``. Two modules with one
        seed drop the same units, so fold in the site: ``seed=Key(42).fold_in("encoder/0")``. If
        None, every training call draws a key from PyTorch's default generator, as
        `torch.nn.Dropout` does, and the module has no state.

    Attributes
    ----------
    seed : unidrop.Key or None
        The key of the module. It can be set: a seed keeps the call number of a module that counts
        calls, and starts at 0 in one that does not; None removes the call number.
    calls : torch.Tensor
        The number of training calls so far, an int64 scalar. With a seed it is a buffer, which
        ``state_dict`` contains. It can be set: ``module.calls = step``. A checkpoint without it,
        such as one of `torch.nn.Dropout`, loads in strict mode and leaves the number as it is.

    Raises
    ------
    TypeError
        If p is not a Python number, inplace is not a bool, or seed is neither an integer nor a Key.
    ValueError
        If p is outside [0, 1], or seed is outside [0, 2^64).

    Notes
    -----
    Recomputation by `torch.utils.checkpoint` reuses the original masks and counts no call,
    whatever ``use_reentrant`` and ``preserve_rng_state`` are. Recomputation by any other
    checkpointer counts as a training call and has another mask: use the function `dropout` with a
    key there.

    A module runs under torch.compile, torch.export, torch.func and autocast with the masks of
    eager calls. It does not run in torch.jit, which PyTorch has retired: scripting, and tracing in
    training mode, raise RuntimeError.

    `torch.nn.parallel.DistributedDataParallel` keeps one call number in all processes. Fold the
    rank into the seed, or all processes drop the same units of their parts of a batch.

    The input may have any shape; the output has the same.

    N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    JMLR 15 (2014).

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import Dropout
    >>> m = Dropout(0.5, seed=Key(42).fold_in("encoder/0"))
    >>> m(torch.ones(6))
    tensor([2., 0., 0., 2., 2., 2.])
    >>> int(m.calls)
    1
    """

    __constants__ = ("p", "inplace")

    p: float
    inplace: bool
    _seed: Key | None
    _words: Tensor | None

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, seed: int | Key | None = None
    ) -> None:
        super().__init__()
        Rate.from_p(p)
        if inplace not in (True, False):
            raise TypeError(f"inplace must be a bool, got {inplace!r}; pass a seed as seed=...")
        self.p = p
        self.inplace = inplace
        self.seed = seed

    @property
    def seed(self) -> Key | None:
        """The key of the module, or None if it draws a key for each call."""
        return self._seed

    @seed.setter
    def seed(self, value: int | Key | None) -> None:
        seed = value if value is None or isinstance(value, Key) else Key(value)
        self._seed = seed
        # The seed is a tensor too, so that one compiled graph serves modules of any seed. It is
        # neither a parameter nor a buffer: it stays on the CPU, and DDP does not broadcast it.
        self._words = None if seed is None else key_tensor(seed)
        if seed is None:
            self._buffers.pop("calls", None)
        elif "calls" not in self._buffers:
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    if TYPE_CHECKING:

        @property
        def calls(self) -> Tensor:
            """The buffer; `__setattr__` also accepts other integers."""

        @calls.setter
        def calls(self, value: SupportsIndex | Tensor) -> None: ...

        def __call__(self, input: Tensor) -> Tensor:
            """Run `forward` and the hooks."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply dropout in training, and the identity in evaluation."""
        if is_tracing():
            return self._trace(input)
        plan = make_plan(input, self.p, self.training, self._get_axes(input))
        if plan is None:
            return input
        seed, inplace = self._seed, self.inplace
        if seed is None:
            return run_with_drawn_key(lambda key: apply_plan(input, plan, key, inplace), inplace)

        def call(number: Any) -> Tensor:
            key = seed.fold_in(number)
            if inplace:
                return apply_plan(input, plan, key, inplace)
            output: Tensor = LIBRARY.operator.dropout(input, key, plan)
            return output

        return run_counted(
            next_call_number, rollback_call, call, self._buffers["calls"], current_log()
        )

    def _trace(self, input: Tensor) -> Tensor:
        """Run `forward` by operators of a trace."""
        p = checked_probability(self.p)
        axes = self._get_axes(input)
        if not traced_call_drops(input, p, self.training):
            return input
        if self._words is None:
            words = trace_draw_words(input)
        else:
            randomness(input, self.calls)  # raises before anything is counted
            words = trace_call_key(self._words, self.calls)
        return apply_traced(input, p, axes, words, self.inplace)

    def _get_axes(self, input: Tensor) -> Sequence[int]:
        """Return the axes along which elements share one decision."""
        return ()

    def __prepare_scriptable__(self) -> Self:
        """Raise, because torch.jit cannot compile this module."""
        raise RuntimeError(TORCHSCRIPT_MESSAGE)

    def extra_repr(self) -> str:
        """Return the text of `torch.nn.Dropout`, and the seed if there is one."""
        text = f"p={self.p}, inplace={self.inplace}"
        return text if self.seed is None else f"{text}, seed={self.seed}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "key":
            raise AttributeError(_HINTS[name], name=name, obj=self)
        # DataParallel sets a buffer on each replica, a copy of this module's call number.
        if name != "calls" or self.__dict__.get("_is_replica"):
            super().__setattr__(name, value)
        elif "calls" in self._buffers:
            self._set_calls(value)
        else:
            raise AttributeError(_HINTS[name], name=name, obj=self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _HINTS:
                raise
            raise AttributeError(_HINTS[name], name=name, obj=self) from None

    def _set_calls(self, value: Any) -> None:
        """Write a number to the buffer, so that it shares no memory with the value."""
        if isinstance(value, Tensor):
            if value.dim() != 0 or integer_bits(value.dtype) is None:
                raise TypeError(f"calls must be an integer, got {value!r}")
            if value.is_meta or (value.device.type != "cpu" and not self.calls.is_meta):
                self.calls.copy_(value)
                return
        number = checked_integer(value, "calls", bits=63)
        if self.calls.is_meta:
            self._replace_calls(torch.tensor(number, device="cpu"))
        else:
            self.calls.fill_(number)

    def _replace_calls(self, calls: Tensor) -> None:
        super().__setattr__("calls", calls)

    def reset_parameters(self) -> None:
        """Set the call number to 0, as users do after `torch.nn.Module.to_empty`."""
        if self.seed is not None:
            self._replace_calls(torch.zeros_like(self.calls))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the call number with the module, but keep it an integer for every dtype."""
        calls = self._buffers.get("calls")
        super()._apply(fn, recurse)
        if calls is not None and self.calls.dtype != torch.int64:
            self._replace_calls(calls.to(self.calls.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a state, and accept one without a call number, such as one of nn.Dropout."""
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys.extend(name for name in missing if name != prefix + "calls")
        if missing and self.seed is not None and self.calls.is_meta:
            self._replace_calls(torch.zeros((), dtype=torch.int64, device="cpu"))


class Dropout1d(Dropout):
    """Zero whole channels of a (N, C, L) or (C, L) input, as `torch.nn.Dropout1d`.

    Parameters, attributes and errors are as in `Dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import Dropout1d
    >>> Dropout1d(0.5, seed=42)(torch.ones(1, 2, 3))
    tensor([[[2., 2., 2.],
             [2., 2., 2.]]])
    """

    def _get_axes(self, input: Tensor) -> Sequence[int]:
        return axes1d(input, self.training)


class Dropout2d(Dropout):
    """Zero whole channels of a (N, C, H, W) input, as `torch.nn.Dropout2d`.

    Parameters, attributes and errors are as in `Dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import Dropout2d
    >>> Dropout2d(0.5, seed=42)(torch.ones(1, 3, 8, 8)).sum(dim=(2, 3))
    tensor([[128., 128.,   0.]])
    """

    def _get_axes(self, input: Tensor) -> Sequence[int]:
        return axes2d(input, self.training)


class Dropout3d(Dropout):
    """Zero whole channels of a (N, C, D, H, W) or (C, D, H, W) input, as `torch.nn.Dropout3d`.

    Parameters, attributes and errors are as in `Dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import Dropout3d
    >>> Dropout3d(0.5, seed=42)(torch.ones(1, 3, 4, 4, 4)).sum(dim=(2, 3, 4))
    tensor([[128., 128.,   0.]])
    """

    def _get_axes(self, input: Tensor) -> Sequence[int]:
        return axes3d(input, self.training)
