"""The dropout modules of `torch.nn`, under keys."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from unidrop.adapters.calls import run_counted
from unidrop.adapters.torch.arrays import LIBRARY, is_tracing
from unidrop.adapters.torch.checkpoint import current_log
from unidrop.adapters.torch.func import randomness
from unidrop.adapters.torch.functional import (
    TORCHSCRIPT_MESSAGE,
    AxesOf,
    axes1d,
    axes2d,
    axes3d,
    axes_to_record,
    draw_to_record,
    drop,
    drop_drawn,
    make_plan,
    no_axes,
    record_drop,
)
from unidrop.adapters.torch.operators import key_tensor, next_call_number, record_key, rollback_call
from unidrop.dtypes import integer_bits
from unidrop.key import Key
from unidrop.rate import Rate, checked_probability
from unidrop.words import checked_integer

__all__ = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d"]


_NO_CALLS = (
    "a Dropout without a seed counts no calls, as it draws a key for each from PyTorch's default "
    "generator: make it with seed=Key(42).fold_in('its place in the model')"
)


class Dropout(torch.nn.Module):
    """During training, zero elements of the input with probability p and scale the rest.

    As `torch.nn.Dropout`, and its replacement: the elements are zeroed independently at every
    forward call, kept ones are multiplied by ``1 / (1 - p)``, and evaluation is the
    identity. Beyond it, the same seed drops the same elements in every framework, on every
    device, and the backward pass keeps no mask.

    Parameters
    ----------
    p : int or float, default 0.5
        Probability of an element to be zeroed, in [0, 1].
    inplace : bool, default False
        Do this operation in place.
    seed : int or unidrop.Key, optional
        If None, a key is drawn from PyTorch's default generator at every training call, as
        `torch.nn.Dropout` does, and the module has no state. Otherwise training call n = 0, 1,
        2, ... uses the key ``Key(seed).fold_in(n)``. Two modules with one seed drop the same
        units: give each its site, ``seed=Key(42).fold_in("encoder/0")``.

    Attributes
    ----------
    calls : torch.Tensor
        The number of training calls so far, an int64 scalar: with a seed, a buffer that
        ``state_dict`` holds and that may be set, ``module.calls = step``. A checkpoint without
        it, such as one of `torch.nn.Dropout`, loads all the same and leaves it as it is.

    Raises
    ------
    TypeError
        If p is no Python number, inplace no bool, or seed neither an integer nor a Key.
    ValueError
        If p is outside [0, 1], or seed outside [0, 2^64).

    Notes
    -----
    What `torch.utils.checkpoint` computes again has the masks of the first time, and counts no
    call, whatever its ``use_reentrant`` and ``preserve_rng_state`` are. Another checkpointer's
    recomputation is one more training call, with another mask: there use the function `dropout`
    with a key.

    A module runs under torch.compile, torch.export, torch.func and autocast with the masks of
    eager calls. It does not run in torch.jit, which PyTorch has retired: scripting it, and tracing
    it in training, raise RuntimeError.

    `torch.nn.parallel.DistributedDataParallel` keeps one call number in all processes: fold the
    rank into the seed, or all of them drop the same units of their parts of a batch.

    Shape: the input may have any, and the output has the input's.

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
    key: Key | None
    calls: Tensor
    _words: Tensor | None

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, seed: int | Key | None = None
    ) -> None:
        super().__init__()
        Rate.from_p(p)
        if inplace not in (True, False):
            raise TypeError(f"inplace must be a bool, got {inplace!r}; seed= goes by name")
        self.p = p
        self.inplace = inplace
        self.key = seed if seed is None or isinstance(seed, Key) else Key(seed)
        if self.key is not None:
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        """Apply dropout in training, and the identity in evaluation."""
        if is_tracing():
            return self._record(input)
        plan = make_plan(input, Rate.from_p(self.p), self.training, self._axes)
        if plan is None:
            return input
        if self.key is None:
            return drop_drawn(input, plan, self.inplace)
        key = self.key

        def call(number: Any) -> Any:
            if self.inplace:
                return drop(input, plan, key.fold_in(number), inplace=True)
            return LIBRARY.operator.dropout(input, key.fold_in(number), plan)

        return run_counted(
            next_call_number, rollback_call, call, self._buffers["calls"], current_log()
        )

    def _record(self, input: Tensor) -> Tensor:
        p = checked_probability(self.p)
        axes = axes_to_record(input, p, self.training, self._axes)
        if axes is None:
            return input
        if self._words is None:
            words = draw_to_record(input)
        else:
            randomness(input, self.calls)  # raises before anything is counted
            words = record_key(self._words, self.calls)
        return record_drop(input, p, axes, words, self.inplace)

    def __prepare_scriptable__(self) -> Self:
        """Say, in place of the compiler of torch.jit, that it can't have this module."""
        raise RuntimeError(TORCHSCRIPT_MESSAGE)

    def extra_repr(self) -> str:
        """Return what `torch.nn.Dropout` shows, and the key if there is one."""
        shown = f"p={self.p}, inplace={self.inplace}"
        return shown if self.key is None else f"{shown}, seed={self.key}"

    _axes: AxesOf = staticmethod(no_axes)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "key":
            # As a tensor too, so that one compiled graph serves layers of any key. It is neither a
            # parameter nor a buffer: it stays on the CPU, and no replica is given another's.
            self.__dict__["_words"] = None if value is None else key_tensor(value)
        # DataParallel gives each replica a buffer of its own, with the number of this call.
        if name != "calls" or self.__dict__.get("_is_replica"):
            super().__setattr__(name, value)
        elif "calls" in self._buffers:
            self._set_calls(value)
        else:
            raise AttributeError(_NO_CALLS)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "calls":
                raise
            raise AttributeError(_NO_CALLS, name=name, obj=self) from None

    def _set_calls(self, value: Any) -> None:
        """Write a number into the buffer, so that a tensor which is set does not count with it."""
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
        """Start arange64 at 0, as is done after `torch.nn.Module.to_empty`."""
        if self.key is not None:
            self._replace_calls(torch.zeros_like(self.calls))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the call number with the module, and leave it an integer whatever the dtype."""
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
        """Load, and let a checkpoint without a call number pass, as one of nn.Dropout is."""
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys.extend(name for name in missing if name != prefix + "calls")
        if missing and self.key is not None and self.calls.is_meta:
            self._replace_calls(torch.zeros((), dtype=torch.int64, device="cpu"))


class Dropout1d(Dropout):
    """Zero whole channels of a (N, C, L) or (C, L) input, as `torch.nn.Dropout1d`.

    Parameters, attributes and errors are those of `Dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import Dropout1d
    >>> Dropout1d(0.5, seed=42)(torch.ones(1, 2, 3))
    tensor([[[2., 2., 2.],
             [2., 2., 2.]]])
    """

    _axes = staticmethod(axes1d)


class Dropout2d(Dropout):
    """Zero whole channels of a (N, C, H, W) input, as `torch.nn.Dropout2d`.

    Parameters, attributes and errors are those of `Dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import Dropout2d
    >>> Dropout2d(0.5, seed=42)(torch.ones(1, 3, 8, 8)).sum(dim=(2, 3))
    tensor([[128., 128.,   0.]])
    """

    _axes = staticmethod(axes2d)


class Dropout3d(Dropout):
    """Zero whole channels of a (N, C, D, H, W) or (C, D, H, W) input, as `torch.nn.Dropout3d`.

    Parameters, attributes and errors are those of `Dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import Dropout3d
    >>> Dropout3d(0.5, seed=42)(torch.ones(1, 3, 4, 4, 4)).sum(dim=(2, 3, 4))
    tensor([[128., 128.,   0.]])
    """

    _axes = staticmethod(axes3d)
