"""LayerDrop for PyTorch: a list that skips modules at random, as fairseq has it.

fairseq: fairseq.modules.LayerDropModuleList (0.12).
"""

from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

import unidrop.layer_drop as core
from unidrop.adapters.torch.modules import SeededModule
from unidrop.key import Key
from unidrop.rate import Rate

__all__ = ["LayerDropModuleList", "layer_drop"]

_TRACED = (
    "LayerDropModuleList cannot be traced in training, because the trace would keep one choice of "
    "layers: use unidrop.adapters.torch.layer_drop(num_layers, p, key=key), whose decisions are a "
    "tensor, with torch.where or torch.cond"
)


def layer_drop(
    num_layers: int,
    p: float = 0.5,
    training: bool = True,
    *,
    key: Key,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return which layers of a stack run, if each is skipped with probability p.

    `unidrop.family.layer_drop` describes the result.

    Examples
    --------
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import layer_drop
    >>> layer_drop(6, 0.5, key=Key(42))
    tensor([ True, False, False, False, False,  True])
    """
    place = None if device is None else torch.device(device)
    kept: Tensor = core.layer_drop(num_layers, p, key, xp=torch, device=place, training=training)
    return kept


class LayerDropModuleList(SeededModule, torch.nn.ModuleList):
    """A list of layers that skips some of them in training, as in fairseq.

    Each iteration is one training call: it decides for each layer, and yields the kept ones in
    order. In evaluation it yields all. A call of the list itself runs an iteration, as
    `torch.nn.Sequential` does.

    Parameters
    ----------
    p : int or float
        The probability of skipping a layer, in [0, 1].
    modules : iterable of torch.nn.Module, optional
        The layers.
    seed : int or unidrop.Key, optional
        As in `Dropout`. Training iteration n = 0, 1, 2, ... has the decisions
        ``layer_drop(len(layers), p, key=Key(seed).fold_in(n))``.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`.

    Notes
    -----
    All processes of `torch.nn.parallel.DistributedDataParallel` must skip the same layers, so fold
    no rank into the seed. Skipped layers have no gradients: DDP needs
    ``find_unused_parameters=True``.

    torch.compile breaks its graph at an iteration, so that each one has its own decisions. With
    ``fullgraph=True``, and in other traces, a training iteration raises.

    Slices, sums, ``in``, `len` and `repr` see all layers, and decide nothing. In fairseq, sums,
    ``in`` and `repr` skip some. But `torch.nn.ModuleList` iterates over its argument: give it
    ``layers[:]``.

    A. Fan, E. Grave, A. Joulin, "Reducing transformer depth on demand with structured dropout",
    ICLR 2020.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import LayerDropModuleList
    >>> layers = LayerDropModuleList(0.5, [torch.nn.Linear(1, n) for n in range(1, 5)], seed=42)
    >>> [layer.out_features for layer in layers]
    [1, 2]
    >>> [layer.out_features for layer in layers.eval()]
    [1, 2, 3, 4]
    """

    _check_rate = staticmethod(Rate.from_p)

    def __init__(
        self,
        p: float,
        modules: Iterable[torch.nn.Module] | None = None,
        *,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(p, seed=seed)
        if modules is not None:
            self.extend(modules)

    def __iter__(self) -> Iterator[torch.nn.Module]:
        """Return an iterator of kept layers in training, and of all in evaluation."""
        layers = self._list_layers()
        if self.training and self.p > 0:
            kept = self._decide(len(layers))
            layers = [layer for layer, keeps in zip(layers, kept, strict=True) if keeps]
        return iter(layers)

    @_disable_dynamo
    def _decide(self, count: int) -> list[bool]:
        """Return the decisions of a training iteration, which counts."""
        is_recorded = torch._C._get_tracing_state() is not None
        is_recorded = is_recorded or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        if is_recorded or torch._C._len_torch_dispatch_stack() > 0:
            raise RuntimeError(_TRACED)
        p = Rate.from_p(self.p).p

        def decide(key: Key) -> list[bool]:
            if key.is_traced:
                word, _ = key.words
                decisions: list[bool] = layer_drop(count, p, key=key, device=word.device).tolist()
                return decisions
            return [bool(keeps) for keeps in core.layer_drop(count, p, key)]

        return self.run_with_key(torch.empty(0), decide)

    def _list_layers(self) -> list[Any]:
        return list(self._modules.values())

    def forward(self, input: Any) -> Any:
        """Run the kept layers in order."""
        for layer in self:
            input = layer(input)
        return input

    def __getitem__(self, index: Any) -> Any:
        """Return a layer, or a `torch.nn.ModuleList` of a slice of the layers."""
        if isinstance(index, slice):
            return torch.nn.ModuleList(self._list_layers()[index])
        return super().__getitem__(index)

    def __add__(self, other: Iterable[torch.nn.Module]) -> torch.nn.ModuleList:
        """Return a `torch.nn.ModuleList` of all layers of both."""
        return torch.nn.ModuleList([*self._list_layers(), *_list_all(other)])

    def __radd__(self, other: Iterable[torch.nn.Module]) -> torch.nn.ModuleList:
        """Return a `torch.nn.ModuleList` of all layers of both."""
        return torch.nn.ModuleList([*_list_all(other), *self._list_layers()])

    def extend(self, modules: Iterable[torch.nn.Module]) -> Self:
        """Append layers, all of them if they are in such a list."""
        super().extend(_list_all(modules))
        return self

    def __contains__(self, layer: object) -> bool:
        """Return whether a layer is in the list."""
        return any(layer is other for other in self._list_layers())

    def __repr__(self) -> str:
        """Return the text of all layers."""
        return torch.nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        """Return the rate, and the seed if there is one."""
        return f"p={self.p}" if self.seed is None else f"p={self.p}, seed={self.seed}"


def _list_all(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """Return modules as a list, without decisions."""
    if isinstance(modules, LayerDropModuleList):
        return modules._list_layers()
    return list(modules)
