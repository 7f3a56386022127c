"""Dropout for PyTorch: what `torch.nn` and `torch.nn.functional` call by these names.

PyTorch documentation: torch.nn.Dropout, torch.nn.functional.dropout (2.13).
"""

import warnings
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor

from unidrop.dropout import Call
from unidrop.dtypes import integer_bits
from unidrop.key import Key, check_key
from unidrop.library import library_of
from unidrop.rate import Rate
from unidrop.words import checked_integer

__all__ = [
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
]


# Looked up here, since what is looked up for the first time can't be compiled.
for _tensor in (torch.empty(0), torch.nn.Parameter(torch.empty(0))):
    library_of(_tensor)

# Reading a call number and advancing it is one act, also where threads share a module. One lock
# for all, since a module has to be copied and pickled.
_COUNTING = Lock()


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""During training, zero elements of the input with probability p and scale the rest.

    Parameters
    ----------
    input : torch.Tensor
        Of any shape and layout, of a floating-point or complex dtype. The mask follows logical
        indices; the output has the strides that `torch.empty_like` gives.
    p : int or float, default 0.5
        Probability of an element to be zeroed, in [0, 1].
    training : bool, default True
        Apply dropout if True; otherwise return the input.
    inplace : bool, default False
        Write the output over the input, and return it.
    key : unidrop.Key, optional
        The name of the mask. If None it is drawn from PyTorch's default generator, which
        `torch.manual_seed` seeds, so that a CPU and a GPU draw the same mask.

    Returns
    -------
    torch.Tensor
        Kept elements times :math:`\frac{1}{1-p}`. The backward pass makes the mask again from
        the key, and no tensor is kept for it.

    Raises
    ------
    TypeError
        If p is no Python number, key no Key, or the input has an integer or bool dtype.
    ValueError
        If p is outside [0, 1].

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import dropout
    >>> dropout(torch.ones(6), 0.5, key=Key(42))
    tensor([2., 0., 0., 0., 0., 2.])
    """
    return _dropout(input, p, training, inplace, key, _no_axes)


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    """Zero whole channels of a (N, C, L) or (C, L) input with probability p.

    Parameters, returns and errors are those of `dropout`, and a RuntimeError for an input of
    another rank, as `torch.nn.functional.dropout1d` has.
    """
    return _dropout(input, p, training, inplace, key, _axes1d)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    """Zero whole channels of a (N, C, H, W) input with probability p.

    Parameters, returns and errors are those of `dropout`. As `torch.nn.functional.dropout2d`, it
    warns of an input of another rank, and takes a 3D one as (N, C, L).
    """
    return _dropout(input, p, training, inplace, key, _axes2d)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    """Zero whole channels of a (N, C, D, H, W) or (C, D, H, W) input with probability p.

    Parameters, returns and errors are those of `dropout`. As `torch.nn.functional.dropout3d`, it
    warns of an input of another rank.
    """
    return _dropout(input, p, training, inplace, key, _axes3d)


def _axes1d(input: Tensor, training: bool) -> range:
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input."
        )
    return _behind_channels(input, training, batched=input.dim() == 3)


def _axes2d(input: Tensor, training: bool) -> range:
    if input.dim() == 3:
        warnings.warn(
            "dropout2d: Received a 3D input, which is interpreted as shape (N, C, L), as "
            "torch.nn.functional.dropout2d does; use dropout1d instead.",
            stacklevel=3,
        )
    elif input.dim() != 4:
        _warn_of_rank("dropout2d", input, "3D or 4D")
    return _behind_channels(input, training, batched=True)


def _axes3d(input: Tensor, training: bool) -> range:
    if input.dim() not in (4, 5):
        _warn_of_rank("dropout3d", input, "4D or 5D")
    return _behind_channels(input, training, batched=input.dim() == 5)


def _behind_channels(input: Tensor, training: bool, *, batched: bool) -> range:
    """Return the axes behind batch and channels, along which `feature_dropout` shares a mask."""
    first = 2 if batched else 1
    if training and input.dim() < first:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return range(first, input.dim())


def _warn_of_rank(function: str, input: Tensor, expected: str) -> None:
    warnings.warn(
        f"{function}: Received a {input.dim()}-D input to {function}, which is deprecated; "
        f"it provides channel-wise dropout on {expected} inputs.",
        stacklevel=4,
    )


def _dropout(
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    key: Key | None,
    axes_of: Callable[[Tensor, bool], Sequence[int]],
) -> Tensor:
    rate = Rate.of(p)
    if key is not None:
        check_key(key)
    call = _checked_call(input, rate, training, axes_of)
    if call is None:
        return input
    return _drop_drawn(input, call, inplace) if key is None else _drop(input, call, key, inplace)


def _checked_call(
    input: Tensor, rate: Rate, training: bool, axes_of: Callable[[Tensor, bool], Sequence[int]]
) -> Call | None:
    """Return the call that this is, its arguments being good; None if nothing is to be dropped."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input has to be a torch.Tensor, but got {type(input).__name__}")
    axes = axes_of(input, training)
    if not training:
        return None
    call = Call.of(input, rate, broadcast_axes=axes, name="input")
    return call if call.drops else None


def _no_axes(input: Tensor, training: bool) -> tuple[int, ...]:
    return ()


def _drop(input: Tensor, call: Call, key: Key, inplace: bool) -> Tensor:
    output: Tensor
    if not inplace:
        output = call.drop(input, key)
        return output
    if input.is_inference() and not torch.is_inference_mode_enabled():
        # PyTorch would say so when it has written.
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed"
        )
    if _is_watched(input):
        # Copied by PyTorch, which then refuses what it always does, before it writes.
        return input.copy_(call.drop(input, key))
    try:
        output = call.drop(input, key, out=input)
    except KeyboardInterrupt:
        # It is raised when all is written.
        torch.autograd.graph.increment_version(input)
        raise
    torch.autograd.graph.increment_version(input)
    return output


def _is_watched(input: Tensor) -> bool:
    """Tell whether PyTorch is to see what is written to a tensor in place."""
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and input.requires_grad)
        or torch.autograd.forward_ad._current_level >= 0
        or input.is_inference()
    )


def _drop_drawn(input: Tensor, call: Call, inplace: bool) -> Tensor:
    """Drop under a key from the default generator, which a call that raises leaves as it was."""
    if not inplace:
        return _drop(input, call, _drawn_key(), inplace)
    state = torch.get_rng_state()
    try:
        return _drop(input, call, _drawn_key(), inplace)
    except RuntimeError:
        torch.set_rng_state(state)
        raise


def _drawn_key() -> Key:
    """Draw from the default generator: on the CPU, so that no device is waited for."""
    lo, hi = torch.randint(1 << 32, (2,), dtype=torch.int64, device="cpu").tolist()
    return Key.from_words(lo, hi)


class Dropout(torch.nn.Module):
    r"""During training, zero elements of the input with probability p and scale the rest.

    As `torch.nn.Dropout`, and its replacement: the elements are zeroed independently at every
    forward call, kept ones are multiplied by :math:`\frac{1}{1-p}`, and evaluation is the
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
    A recomputation, as `torch.utils.checkpoint` makes, is one more training call to a module with
    a seed, with another mask. There use ``seed=None``, or the function `dropout` with a key.

    Shape:
        - Input: :math:`(*)`. Input can be of any shape
        - Output: :math:`(*)`. Output is of the same shape as input

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

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, seed: int | Key | None = None
    ) -> None:
        super().__init__()
        Rate.of(p)
        if inplace not in (True, False):
            raise TypeError(f"inplace has to be a bool, but got {inplace!r}; seed= goes by name")
        self.p = p
        self.inplace = inplace
        self.key = seed if seed is None or isinstance(seed, Key) else Key(seed)
        if self.key is not None:
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        """Apply dropout in training, and the identity in evaluation."""
        call = _checked_call(input, Rate.of(self.p), self.training, self._axes)
        if call is None:
            return input
        if self.key is None:
            return _drop_drawn(input, call, self.inplace)
        if torch.compiler.is_compiling():
            number = torch.ops.unidrop.next_call(self.calls)
            return _drop(input, call, self.key.fold_in(number), self.inplace)
        calls = self.calls
        with _COUNTING:
            # Read where that waits for nothing.
            number = int(calls) if calls.device.type == "cpu" else calls.clone()
            calls.add_(1)
        try:
            return _drop(input, call, self.key.fold_in(number), self.inplace)
        except BaseException:
            with _COUNTING:
                self.calls.sub_(1)
            raise

    def extra_repr(self) -> str:
        """Return what `torch.nn.Dropout` shows, and the key if there is one."""
        shown = f"p={self.p}, inplace={self.inplace}"
        return shown if self.key is None else f"{shown}, seed={self.key}"

    _axes: Callable[[Tensor, bool], Sequence[int]] = staticmethod(_no_axes)

    def __setattr__(self, name: str, value: Any) -> None:
        # DataParallel gives each replica a buffer of its own, with the number of this call.
        if name != "calls" or self.__dict__.get("_is_replica"):
            super().__setattr__(name, value)
        elif "calls" in self._buffers:
            self._set_calls(value)
        else:
            raise AttributeError("a Dropout without a seed counts no calls: make it with seed=")

    def _set_calls(self, value: Any) -> None:
        """Write a number into the buffer, so that a tensor which is set does not count with it."""
        if isinstance(value, Tensor):
            if value.dim() != 0 or integer_bits(value.dtype) is None:
                raise TypeError(f"calls has to be an integer, but got {value!r}")
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
        """Start counting at 0, as is done after `torch.nn.Module.to_empty`."""
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

    _axes = staticmethod(_axes1d)


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

    _axes = staticmethod(_axes2d)


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

    _axes = staticmethod(_axes3d)
