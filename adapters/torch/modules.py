"""The dropout modules of `torch.nn`, with a seed and a count of training calls."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor

from unidrop.adapters.calls import run_exclusively
from unidrop.adapters.torch.buffers import BUFFERS, is_tracing, refuse_capture
from unidrop.adapters.torch.checkpoint import current_log
from unidrop.adapters.torch.func import randomness
from unidrop.adapters.torch.functional import (
    TORCHSCRIPT_MESSAGE,
    apply_plan,
    apply_traced,
    axes1d,
    axes2d,
    axes3d,
    dropout,
    make_plan,
    run_with_drawn_key,
    trace_identity,
    traced_call_drops,
)
from unidrop.adapters.torch.fx import record_module
from unidrop.adapters.torch.onnx import is_exporting, mark_as_set, take_number
from unidrop.adapters.torch.operators import (
    as_key,
    key_tensor,
    next_call_number,
    next_call_words,
    rollback_call,
    trace_call_key,
    trace_draw_words,
    uncount,
)
from unidrop.adapters.torch.seeds import warn_of_twins
from unidrop.adapters.torch.state import get_number, make_calls, read_saved, set_number
from unidrop.arguments import checked_integer
from unidrop.dtypes import integer_bits
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate, checked_probability
from unidrop.schedule import ScheduledRate, make_rate

__all__ = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "SeededModule"]

T = TypeVar("T")

# A rate for a tensor on the CPU can be read.
_ON_CPU = torch.empty(0)

_HINTS = {
    "calls": (
        "a Dropout without a seed does not count calls, because it draws a key for each call from "
        "PyTorch's default generator: make it with seed=Key(42).fold_in('its place in the model')"
    ),
    "key": "Dropout.key was renamed: use Dropout.seed",
}

# The buffers of a module, and what contains the call number in a state dictionary.
_CALLS, _KEY, _EXTRA_STATE = "_calls", "_key", "_extra_state"

# The state dictionary that each module was last saved into.
_DESTINATIONS: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


class SeededModule(torch.nn.modules.dropout._DropoutNd):
    """The seed and the call number of each module."""

    _buffers: dict[str, Any]
    _seed: Key | None = None
    # The seed as a tensor, so that one compiled graph serves modules of any seed. It is on the CPU.
    _words: Tensor | None
    # The buffer of the key that this module made. `torch.func` replaces it by the key of another
    # module, which then counts. DDP copies the key of another process into it, which does not.
    _own_key: Tensor | None
    # The identity of the module that looked for others with its seed; a copy has another one.
    _checked: int | None = None

    def __init__(
        self, p: float | Tensor = 0.5, inplace: bool = False, *, seed: int | Key | None = None
    ) -> None:
        self._check_rate(p)
        if inplace not in (True, False):
            raise TypeError(f"inplace must be a bool, got {inplace!r}; pass a seed as seed=...")
        super().__init__(cast(float, p), inplace)
        self.seed = seed

    @staticmethod
    def _check_rate(p: Any, name: str = "p") -> Rate:
        """Return the rate; raises TypeError or ValueError unless p is one, or a tensor of one."""
        return make_rate(p, _ON_CPU, name)

    @property
    def seed(self) -> Key | None:
        """The key of the module, or None if it draws a key for each call."""
        return self._seed

    @seed.setter
    def seed(self, value: int | Key | None) -> None:
        seed = value if value is None or isinstance(value, Key) else Key(value)
        with torch.inference_mode(False):  # else training could not advance the call number
            self._seed, self._checked = seed, None
            self._words = None if seed is None else key_tensor(seed)
            if self._words is None:
                self._own_key = None
                for name in (_CALLS, _KEY):
                    self._buffers.pop(name, None)
            elif _CALLS not in self._buffers:
                self._set_buffers(make_calls(), self._words.clone())
            else:
                self._buffers[_KEY].copy_(self._words)

    if TYPE_CHECKING:

        @property
        def calls(self) -> Tensor:
            """The call number; `__setattr__` also accepts other integers."""

        @calls.setter
        def calls(self, value: SupportsIndex | Tensor) -> None: ...

        def __call__(self, input: Tensor) -> Tensor:
            """Run `forward` and the hooks."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply dropout in training, and the identity in evaluation."""
        if not isinstance(input, Tensor):
            proxy: Tensor = record_module(self, input)
            return proxy
        if is_tracing():
            return self._trace(input)
        plan = self._make_plan(input)
        if plan is None:
            return input
        return self._run_eager(apply_plan, input, plan, self.inplace)

    def _make_plan(self, input: Tensor) -> DropoutPlan | None:
        """Return the plan of a call that is not traced, or None if the call drops nothing."""
        return make_plan(input, self.p, self.training, self._get_axes(input))

    def run_with_key(self, input: Tensor, call: Callable[[Key], T]) -> T:
        """Return ``call(key)`` for the key of a training call, which counts unless it raises."""
        if is_tracing():
            return call(self._trace_key(input))
        return self._run_eager(lambda input, plan, key, inplace: call(key), input, None, False)

    def _run_eager(
        self,
        call: Callable[[Tensor, Any, Key, bool], T],
        input: Tensor,
        plan: DropoutPlan | None,
        inplace: bool,
    ) -> T:
        """Return ``call(input, plan, key, inplace)`` in no trace; small calls need no closure."""
        buffers = self._buffers
        seed = self._seed if buffers.get(_KEY) is self._own_key else self._get_key()
        if seed is None:
            return run_with_drawn_key(lambda key: call(input, plan, key, inplace), input, inplace)

        if self._checked != id(self) and not self.__dict__.get("_is_replica"):
            warn_of_twins(self)

        calls = buffers[_CALLS]
        if calls.is_meta or calls.is_inference():
            calls = self._get_calls()
        log = current_log()
        if not calls.is_cpu or BUFFERS.is_interpreted:
            taken = run_exclusively(calls, next_call_words, calls, buffers[_KEY], log)
            key, number = as_key(taken[:2]), taken[2]
        else:
            if not input.is_cpu:
                refuse_capture(input.device)
            number = run_exclusively(calls, next_call_number, calls, log)
            key = seed.fold_in(number)
        if plan is not None and isinstance(plan.rate, ScheduledRate):
            uncount(calls, plan.rate.array)
        try:
            return call(input, plan, key, inplace)
        except BaseException:
            run_exclusively(calls, rollback_call, number, calls, log)
            raise

    def _trace(self, input: Tensor) -> Tensor:
        """Run `forward` by operators of a trace."""
        is_scheduled = isinstance(self.p, Tensor)
        p = self.p if is_scheduled else checked_probability(self.p)
        axes = self._get_axes(input)
        if is_scheduled:
            make_rate(p, input)  # raises before the call is counted
        if not traced_call_drops(input, 1.0 if is_scheduled else p, self.training):
            return trace_identity(input)
        key = self._trace_key(input)
        if is_scheduled or is_exporting():
            return dropout(input, p, True, self.inplace, key=key, broadcast_axes=axes)
        return apply_traced(input, p, axes, key_tensor(key, input.device), self.inplace)

    def _trace_key(self, input: Tensor) -> Key:
        """Return the key of a training call in a trace, and count the call."""
        if self._words is None:
            return Key._from_raw_words(trace_draw_words(input))
        calls, key = self._buffers[_CALLS], self._buffers[_KEY]
        if is_exporting() and self._seed is not None:
            return self._seed.fold_in(take_number(self, calls))
        randomness(input, calls)  # raises before anything is counted
        is_own = key is self._own_key and calls.device.type == "cpu"
        rate = self.p if isinstance(self.p, Tensor) else None
        return Key._from_raw_words(trace_call_key(calls, self._words if is_own else key, rate))

    def _get_axes(self, input: Tensor) -> Sequence[int]:
        """Return the axes along which elements share one decision."""
        return ()

    def _get_key(self) -> Key | None:
        """Return the seed of the module that `torch.func` took the buffers from."""
        key = self._buffers.get(_KEY)
        return self._seed if key is None else as_key(key)

    def _get_calls(self) -> Tensor:
        """Return the call number, after replacing a tensor that cannot be advanced."""
        calls: Tensor = self._buffers[_CALLS]
        if not (calls.is_meta or (calls.is_inference() and not torch.is_inference_mode_enabled())):
            return calls
        # Another thread must not replace what this one has advanced.
        return run_exclusively(calls, self._replace_calls)

    def _replace_calls(self) -> Tensor:
        calls: Tensor = self._buffers[_CALLS]
        if calls.is_meta:
            self.reset_parameters()
        elif calls.is_inference():
            self._set_buffers(calls.clone(), self._buffers[_KEY].clone())
        replaced: Tensor = self._buffers[_CALLS]
        return replaced

    def _set_buffers(self, calls: Tensor, key: Tensor) -> None:
        self.register_buffer(_CALLS, calls, persistent=False)
        self.register_buffer(_KEY, key, persistent=False)
        self._own_key = key

    def __prepare_scriptable__(self) -> Self:
        """Raise, because torch.jit cannot compile this module."""
        raise RuntimeError(TORCHSCRIPT_MESSAGE)

    def extra_repr(self) -> str:
        """Return the text of `torch.nn.Dropout`, and the seed if there is one."""
        text = super().extra_repr()
        return text if self.seed is None else f"{text}, seed={self.seed}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "calls":
            if self._seed is None:
                raise AttributeError(_HINTS[name], name=name, obj=self)
            self._set_calls(value)
        elif name == "key":
            raise AttributeError(_HINTS[name], name=name, obj=self)
        elif name in (_CALLS, _KEY) and not self.__dict__.get("_is_replica"):
            # Transformers sets buffers to uninitialized memory on a device.
            self._move_buffers(value.device)
        elif name != _EXTRA_STATE:  # Transformers sets it too, if a checkpoint has none
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "calls" and self._seed is not None:
            return get_number(self._buffers[_CALLS])
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
            calls = self._get_calls()
            if value.device.type != "cpu" or is_tracing():
                set_number(calls, value.to(calls.device, torch.int64))
                if is_exporting():
                    mark_as_set(calls)
                return
        number = checked_integer(value, "calls", bits=63)
        set_number(self._get_calls(), number)

    def _move_buffers(self, device: torch.device) -> None:
        """Move the buffers to a device that has memory, and keep their numbers."""
        calls, key = self._buffers[_CALLS], self._buffers[_KEY]
        if device.type != "meta" and not calls.is_meta and calls.device != device:
            with torch.inference_mode(False):
                self._set_buffers(calls.to(device), key.to(device))

    def reset_parameters(self) -> None:
        """Set the call number to 0, as users do after `torch.nn.Module.to_empty`."""
        if self._words is not None:
            device = self._buffers[_CALLS].device
            device = torch.device("cpu") if device.type == "meta" else device
            with torch.inference_mode(False):
                self._set_buffers(make_calls().to(device), self._words.clone().to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers with the module; keep their numbers, whatever ``fn`` does to others."""
        calls, key = self._buffers.get(_CALLS), self._buffers.get(_KEY)
        super()._apply(fn, recurse)
        if calls is not None and key is not None:
            device = self._buffers[_CALLS].device
            self._buffers.update({_CALLS: calls, _KEY: key})
            self._move_buffers(device)
        return self

    def get_extra_state(self) -> Any:
        """Return the tensor of the call number and its check, or None without a seed."""
        return None if self._seed is None else self._get_calls()

    def set_extra_state(self, state: Any) -> None:
        """Load the call number of a checkpoint; a module without a seed ignores it.

        Raises
        ------
        TypeError
            If the state is not an int64 tensor of shape (2,).
        ValueError
            If the number is damaged.
        """
        if self._seed is None or (isinstance(state, Tensor) and state.is_meta):
            return
        self._set_calls(read_saved(state))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Save the call number if there is one; a module shared in a model is saved as copies."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + _EXTRA_STATE
        if self._seed is None:
            del destination[name]
        elif (last := _DESTINATIONS.get(self)) is not None and last() is destination:
            destination[name] = destination[name].clone()  # safetensors rejects shared memory
        elif isinstance(destination, OrderedDict):
            _DESTINATIONS[self] = weakref.ref(destination)

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
        name = prefix + _EXTRA_STATE
        missing: list[str] = []
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
            )
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
        missing_keys.extend(key for key in missing if key != name)
        if strict and self._seed is None and name in state_dict:
            unexpected_keys.append(name)


class Dropout(SeededModule, torch.nn.Dropout):
    """During training, zero elements of the input with probability p and scale the others.

    A replacement of `torch.nn.Dropout`: every forward call zeroes elements independently and
    multiplies the kept ones by ``1 / (1 - p)``; evaluation is the identity. Beyond that, one seed
    drops the same elements in every framework and on every device, and the backward pass
    recomputes the mask, so autograd saves no tensor.

    Parameters
    ----------
    p : int, float or 0-d torch.Tensor, default 0.5
        The probability of zeroing an element, in [0, 1]. A schedule may fill a tensor,
        ``module.p.fill_(0.2)``, and torch.compile does not recompile. The function `dropout`
        describes tensors. The module neither saves nor moves one.
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
        The number of training calls so far, an int64 scalar; only with a seed. It can be set:
        ``module.calls = step``. ``state_dict`` contains it as extra state, with a check. A
        checkpoint without it, such as one of `torch.nn.Dropout`, loads in strict mode and leaves
        the number as it is.

    Raises
    ------
    TypeError
        If p is neither a number nor such a tensor, inplace is not a bool, or seed is neither an
        integer nor a Key.
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


class Dropout1d(SeededModule, torch.nn.Dropout1d):
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


class Dropout2d(SeededModule, torch.nn.Dropout2d):
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


class Dropout3d(SeededModule, torch.nn.Dropout3d):
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
