"""Recurrent layers of `torch.nn`, with masks of a seed between layers, on inputs and on states.

PyTorch documentation: torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN (2.13).
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Self

import torch
from torch import _VF, Tensor
from torch._compile import _disable_dynamo
from torch.nn import functional
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from unidrop.adapters.torch.chunked import is_autocasting
from unidrop.adapters.torch.functional import TORCHSCRIPT_MESSAGE, dropout
from unidrop.adapters.torch.fx import record_module
from unidrop.adapters.torch.modules import SeededModule
from unidrop.key import Key
from unidrop.rate import Rate

__all__ = ["GRU", "LSTM", "RNN"]

_RATES: Final = ("dropout", "input_dropout", "recurrent_dropout")

_FUSED: Final[dict[str, Callable[..., tuple[Tensor, ...]]]] = {
    "LSTM": _VF.lstm,
    "GRU": _VF.gru,
    "RNN_TANH": _VF.rnn_tanh,
    "RNN_RELU": _VF.rnn_relu,
}

# The number of each gate in keys, in the order of PyTorch's weights; the numbers are Keras's.
_GATES: Final[dict[str, Sequence[int]]] = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}


class _Packing(NamedTuple):
    """Where the rows of a packed sequence are in the padded tensor, with its batch in order."""

    batch_sizes: Tensor
    rows: Tensor
    length: int
    batch: int

    @classmethod
    def from_packed(cls, packed: PackedSequence) -> Self:
        """Find the rows; no row depends on how the sequences are sorted."""
        sizes, device = packed.batch_sizes, packed.data.device
        length, batch = len(sizes), int(sizes[0])
        columns = torch.arange(batch, device=device)
        is_row = columns < sizes.to(device)[:, None]
        if packed.sorted_indices is not None:
            columns = packed.sorted_indices
        numbers = torch.arange(length, device=device)[:, None] * batch + columns
        return cls(sizes, numbers[is_row], length, batch)

    def pad(self, x: Tensor) -> Tensor:
        """Return a tensor (L, N, H) of rows, with 0 after the end of each sequence."""
        padded = x.new_zeros(self.length * self.batch, x.shape[-1]).index_copy(0, self.rows, x)
        return padded.view(self.length, self.batch, -1)

    def unpad(self, x: Tensor) -> Tensor:
        """Return the rows of a padded tensor."""
        return x.flatten(0, 1).index_select(0, self.rows)


class _Calls(SeededModule):
    """The seed and the call number of a recurrent layer; p is its largest rate."""


class _SeededRNNMixin(RNNBase):
    """The masks of a seed, for layers that also derive from PyTorch's."""

    # The seed has the qualified name of the layer in `assign_seeds`.
    _unnamed_child = "_calls_of_seed"

    input_dropout: float
    recurrent_dropout: float
    variational: bool

    def __init__(
        self,
        *args: Any,
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        variational: bool = False,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if variational not in (True, False):
            raise TypeError(f"variational must be a bool, got {variational!r}")
        self.variational = variational
        self.input_dropout = input_dropout
        self.recurrent_dropout = recurrent_dropout
        self._calls_of_seed = _Calls(self._largest_rate, seed=seed)

    @property
    def seed(self) -> Key | None:
        """The key of the module, or None if it draws a key for each call."""
        return self._calls_of_seed.seed

    @seed.setter
    def seed(self, value: int | Key | None) -> None:
        self._calls_of_seed.seed = value

    @property
    def calls(self) -> Any:
        """The number of training calls so far; only with a seed."""
        return self._calls_of_seed.calls

    @calls.setter
    def calls(self, value: Any) -> None:
        self._calls_of_seed.calls = value

    @property
    def _largest_rate(self) -> float:
        """The largest rate that drops something: there is nothing between the layers of one."""
        rates = self.input_dropout, self.recurrent_dropout
        return max(*rates, self.dropout if self.num_layers > 1 else 0.0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _RATES and "_modules" in self.__dict__:
            value = Rate.from_p(value, name).p
        super().__setattr__(name, value)
        if name in _RATES and "_calls_of_seed" in self._modules:
            self._calls_of_seed.p = self._largest_rate

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run the layers, with dropout in training; as the layer of PyTorch."""
        if not isinstance(input, Tensor | PackedSequence):
            return record_module(self, input, hx)
        if not self.training or self._largest_rate == 0 or not self._has_right_ranks(input, hx):
            return super().forward(input, hx)  # which raises if a rank is wrong
        if torch.compiler.is_dynamo_compiling() or "torch._dynamo" not in sys.modules:
            return self._run(input, hx)
        return self._run_uncompiled(input, hx)

    def _run(self, input: Any, hx: Any) -> Any:
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx)
        return self._run_dense(input, hx)

    # Unless told otherwise, PyTorch compiles no recurrent layer. It would compile each step of a
    # call that it does not trace, again and again.
    _run_uncompiled = _disable_dynamo(_run)

    def _has_right_ranks(self, input: Any, hx: Any) -> bool:
        """Return whether PyTorch accepts the numbers of axes."""
        if isinstance(input, PackedSequence):
            return True
        states = () if hx is None else self._as_states(hx)
        return input.dim() in (2, 3) and all(state.dim() == input.dim() for state in states)

    def _run_dense(self, input: Tensor, hx: Any) -> Any:
        is_batched = input.dim() == 3
        axis = 0 if self.batch_first else 1
        x = input if is_batched else input.unsqueeze(axis)
        states = self._make_states(x, x.shape[axis]) if hx is None else self._as_states(hx)
        if hx is not None and not is_batched:
            states = tuple(state.unsqueeze(1) for state in states)
        self.check_forward_args(x, self._as_hx(states), None)
        # Masks follow (time, batch, feature) in each layout, so all layouts have the same masks.
        x = x.transpose(0, 1) if self.batch_first else x
        x, states = self._run_with_key(x, None, states)
        x = x.transpose(0, 1) if self.batch_first else x
        if not is_batched:
            x, states = x.squeeze(axis), tuple(state.squeeze(1) for state in states)
        return x, self._as_hx(states)

    def _run_packed(self, input: PackedSequence, hx: Any) -> Any:
        packing = _Packing.from_packed(input)
        x = input.data
        states = self._make_states(x, packing.batch) if hx is None else self._as_states(hx)
        self.check_forward_args(x, self._as_hx(states), input.batch_sizes)
        if self.recurrent_dropout == 0:  # the kernel wants the order of the rows
            states = self._permute(states, input.sorted_indices)
        x, states = self._run_with_key(x, packing, states)
        if self.recurrent_dropout == 0:
            states = self._permute(states, input.unsorted_indices)
        return PackedSequence(x, *input[1:]), self._as_hx(states)

    def _run_with_key(
        self, x: Tensor, packing: _Packing | None, states: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        run = self._run_cells if self.recurrent_dropout > 0 else self._run_fused
        return self._calls_of_seed.run_with_key(x, lambda key: run(x, packing, states, key))

    def _run_fused(
        self, x: Tensor, packing: _Packing | None, states: Sequence[Tensor], key: Key
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run layer after layer by the kernels of PyTorch."""
        run, finals = _FUSED[self.mode], []
        sizes = () if packing is None else (packing.batch_sizes,)
        flags = (False,) if packing is None else ()  # of batch_first
        for layer in range(self.num_layers):
            if p := self._get_rate(layer):
                x = self._drop_inputs(x if packing is None else packing.pad(x), p, layer, key)
                x = x if packing is None else packing.unpad(x)
            directions = self._get_directions(layer)
            weights = [w for number in directions for w in self._get_weights(number)]
            hx = self._as_hx([state[directions.start : directions.stop] for state in states])
            options = self.bias, 1, 0.0, True, self.bidirectional
            x, *final = run(x, *sizes, hx, weights, *options, *flags)
            finals.append(final)
        return x, tuple(torch.cat(states) for states in zip(*finals, strict=True))

    def _run_cells(
        self, x: Tensor, packing: _Packing | None, states: Sequence[Tensor], key: Key
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run layer after layer by a loop over time, because no kernel drops states."""
        finals, is_row = [], None
        if is_autocasting(x.device):  # as the kernels of PyTorch do, for all that they take
            dtype = torch.get_autocast_dtype(x.device.type)
            x, states = x.to(dtype), [state.to(dtype) for state in states]
        if packing is not None:
            is_row = packing.pad(torch.ones_like(x[:, :1], dtype=torch.bool))
            x = packing.pad(x)
        for layer in range(self.num_layers):
            if p := self._get_rate(layer):
                x = self._drop_inputs(x, p, layer, key)
            outputs = []
            for number in self._get_directions(layer):
                output, final = self._run_direction(
                    x, is_row, [state[number] for state in states], number, key
                )
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, -1)
        x = x if packing is None else packing.unpad(x)
        return x, tuple(torch.stack(states) for states in zip(*finals, strict=True))

    def _run_direction(
        self, x: Tensor, is_row: Tensor | None, states: Sequence[Tensor], number: int, key: Key
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Run the cell over time; a sequence that has ended keeps its states."""
        w_ih, w_hh, *rest = (w.to(x.dtype) for w in self._get_weights(number))
        b_ih, b_hh = rest[:2] if self.bias else (None, None)
        w_hr = rest[-1] if self.proj_size else None
        gates = len(w_hh) // self.hidden_size
        masks = self._make_masks(states[0], number, key)
        inputs = functional.linear(x, w_ih, b_ih)
        inputs = inputs.reshape(*x.shape[:2], gates, self.hidden_size).transpose(1, 2)
        w_hh = w_hh.reshape(gates, -1, w_hh.shape[1]).transpose(1, 2)
        b_hh = None if b_hh is None else b_hh.reshape(gates, 1, -1)
        steps = range(len(x))
        if not steps:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        outputs = []
        for step in reversed(steps) if number % self._directions else steps:
            recurrent = states[0] * masks
            recurrent = recurrent @ w_hh if b_hh is None else torch.baddbmm(b_hh, recurrent, w_hh)
            new = self._run_cell(inputs[step], recurrent, states)
            if w_hr is not None:
                new = functional.linear(new[0], w_hr), *new[1:]
            if is_row is not None:
                pairs = zip(new, states, strict=True)
                new = tuple(torch.where(is_row[step], now, old) for now, old in pairs)
            states = new
            outputs.append(states[0])
        return torch.stack(outputs[::-1] if number % self._directions else outputs), states

    def _run_cell(self, x: Tensor, h: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the states after a step; x and h are terms of the gates before activation."""
        if self.mode == "LSTM":
            i, f, g, o = (x + h).unbind()
            c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        if self.mode == "GRU":
            r, z = (x[:2] + h[:2]).sigmoid()
            n = (x[2] + r * h[2]).tanh()
            return (n + z * (states[0] - n),)
        activate = torch.tanh if self.mode == "RNN_TANH" else torch.relu
        return (activate(x[0] + h[0]),)

    def _get_rate(self, layer: int) -> float:
        """Return the rate of the inputs of a layer."""
        return self.dropout if layer else self.input_dropout

    def _drop_inputs(self, x: Tensor, p: float, layer: int, key: Key) -> Tensor:
        """Return the inputs of a layer, (L, N, H), after dropout."""
        key = (key.fold_in(f"l{layer}") if layer else key).fold_in("dropout")
        return dropout(x, p, key=key, broadcast_axes=(0,) if self.variational else ())

    def _make_masks(self, state: Tensor, number: int, key: Key) -> Tensor:
        """Return the scaled masks of a state, one for each gate."""
        layer, is_reverse = divmod(number, self._directions)
        if number:
            key = key.fold_in(f"l{layer}_reverse" if is_reverse else f"l{layer}")
        key, ones = key.fold_in("recurrent_dropout"), torch.ones_like(state)
        gates = _GATES.get(self.mode)
        keys = [key] if gates is None else [key.fold_in(gate) for gate in gates]
        return torch.stack([dropout(ones, self.recurrent_dropout, key=key) for key in keys])

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _get_directions(self, layer: int) -> range:
        """Return the numbers of a layer's directions, which count their weights and states."""
        return range(layer * self._directions, (layer + 1) * self._directions)

    def _get_weights(self, number: int) -> list[Tensor]:
        weights: Any = self._flat_weights
        count = len(weights) // (self.num_layers * self._directions)
        return list(weights[number * count : (number + 1) * count])

    def _make_states(self, x: Tensor, batch: int) -> tuple[Tensor, ...]:
        sizes = [self.proj_size or self.hidden_size, self.hidden_size]
        count = self.num_layers * self._directions
        states = tuple(x.new_zeros(count, batch, size) for size in sizes)
        return states if self.mode == "LSTM" else states[:1]

    def _as_states(self, hx: Any) -> tuple[Tensor, ...]:
        return (hx[0], hx[1]) if self.mode == "LSTM" else (hx,)

    def _as_hx(self, states: Sequence[Tensor]) -> Any:
        return tuple(states) if self.mode == "LSTM" else states[0]

    def _permute(self, states: Sequence[Tensor], order: Tensor | None) -> tuple[Tensor, ...]:
        return self._as_states(self.permute_hidden(self._as_hx(states), order))

    def __prepare_scriptable__(self) -> Self:
        """Raise, because torch.jit cannot compile this module."""
        raise RuntimeError(TORCHSCRIPT_MESSAGE)

    def extra_repr(self) -> str:
        """Return the text of PyTorch, and the arguments beyond it."""
        texts = [f"{name}={getattr(self, name)}" for name in _RATES[1:] if getattr(self, name)]
        texts += ["variational=True"] if self.variational else []
        texts += [] if self.seed is None else [f"seed={self.seed}"]
        return ", ".join([super().extra_repr(), *texts])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class LSTM(_SeededRNNMixin, torch.nn.LSTM):
    """Long short-term memory as `torch.nn.LSTM`, with a seed, and dropout of inputs and states.

    Arguments, weights, results and errors are as in PyTorch, and evaluation is PyTorch's own.

    Parameters
    ----------
    *args, **kwargs
        The arguments of `torch.nn.LSTM`. Its ``dropout`` drops the outputs of each layer but the
        last.
    input_dropout : int or float, default 0.0
        The probability of zeroing an element of the inputs of the first layer, in [0, 1].
    recurrent_dropout : int or float, default 0.0
        The probability of zeroing an element of the hidden state, in [0, 1]. Each gate of each
        direction has one mask for all timesteps.
    variational : bool, default False
        If True, inputs and outputs too have one mask for all timesteps: locked dropout.
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Attributes
    ----------
    dropout, input_dropout, recurrent_dropout : float
        The rates, which a schedule may set.
    seed : unidrop.Key or None
        As in `Dropout`.
    calls : torch.Tensor
        As in `Dropout`. ``state_dict`` contains it as the extra state of a child. A checkpoint of
        `torch.nn.LSTM` loads in strict mode and leaves the number as it is.

    Raises
    ------
    TypeError
        If a rate is not a Python number, variational is not a bool, or seed is neither an integer
        nor a Key.
    ValueError
        If a rate is outside [0, 1], or seed is outside [0, 2^64).

    Notes
    -----
    With ``K = Key(seed).fold_in(n)`` in training call n, ``K.fold_in("dropout")`` drops the inputs
    of the first layer, and ``K.fold_in("l1").fold_in("dropout")`` the inputs of layer 1. Masks of
    states have the keys ``K.fold_in("recurrent_dropout").fold_in(gate)``. If the names of the
    weights end in another suffix than "l0", such as "l0_reverse" or "l1", then K is
    ``Key(seed).fold_in(n).fold_in(suffix)``. Gates have the numbers of Keras: input, forget, cell,
    output.

    The mask of an element depends on its time, its place in the batch, and its feature. So
    batch_first and `torch.nn.utils.rnn.PackedSequence`, in any order, do not change masks: packed
    sequences have the masks of the padded tensor.

    With recurrent_dropout, a loop over time replaces the kernels of PyTorch. Each layer runs on its
    own, so that dropout can follow it.

    Y. Gal, Z. Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NeurIPS 2016.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import LSTM
    >>> layer = LSTM(8, 4, recurrent_dropout=0.2, seed=Key(42).fold_in("encoder/0"))
    >>> output, (h, c) = layer(torch.ones(3, 2, 8))
    >>> output.shape, int(layer.calls)
    (torch.Size([3, 2, 4]), 1)
    """


class GRU(_SeededRNNMixin, torch.nn.GRU):
    """Gated recurrent units as `torch.nn.GRU`, with a seed, and dropout of inputs and states.

    Parameters, attributes, keys and errors are as in `LSTM`. As in Keras, the update gate has the
    number 0, the reset gate 1, and the candidate 2.
    """


class RNN(_SeededRNNMixin, torch.nn.RNN):
    """An Elman network as `torch.nn.RNN`, with a seed, and dropout of inputs and states.

    Parameters, attributes, keys and errors are as in `LSTM`. It has no gates: the mask of its state
    has the key ``K.fold_in("recurrent_dropout")``.
    """
