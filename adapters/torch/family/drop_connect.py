"""DropConnect: dropout of the weights of another module, as AWD-LSTM drops recurrent weights."""

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from unidrop.adapters.torch.functional import dropout
from unidrop.adapters.torch.fx import record_module
from unidrop.adapters.torch.modules import SeededModule
from unidrop.dtypes import compute_dtype
from unidrop.key import Key
from unidrop.rate import Rate

__all__ = ["DropConnect"]


class DropConnect(SeededModule):
    """Drop weights of a module in training, as fastai's ``WeightDropout``.

    With ``K = Key(seed).fold_in(n)``, training call n = 0, 1, 2, ... runs the module with
    ``dropout(weight, p, key=K.fold_in(name))`` in place of the parameter of each name. The module
    keeps its parameters, and so do optimizers and other modules that share them.

    Parameters
    ----------
    module : torch.nn.Module
        The module, such as a `torch.nn.Linear` or a `torch.nn.LSTM`.
    p : int or float, default 0.5
        The probability of dropping a weight, in [0, 1].
    names : str or sequence of str, default ("weight",)
        The parameters to drop, by their names in ``module.named_parameters()``, such as
        "weight_hh_l0" of an LSTM.
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Attributes
    ----------
    module : torch.nn.Module
        The module.
    p : float
        The rate, which a schedule may set.
    names : tuple of str
        The names of the parameters.
    seed, calls
        As in `Dropout`.

    Raises
    ------
    TypeError
        As `Dropout`; if a parameter is not of a floating-point or complex dtype.
    ValueError
        As `Dropout`; if the module has no parameter of a name, or there are no names.

    Notes
    -----
    `torch.func.functional_call` puts the dropped weights in, so other threads must not call the
    module meanwhile. On a GPU, PyTorch copies the weights of recurrent modules to one place in each
    call, because cuDNN requires that.

    L. Wan et al., "Regularization of neural networks using DropConnect", ICML 2013; S. Merity et
    al., "Regularizing and optimizing LSTM language models", ICLR 2018.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import DropConnect
    >>> linear = torch.nn.Linear(1, 4, bias=False)
    >>> _ = torch.nn.init.ones_(linear.weight)
    >>> DropConnect(linear, 0.5, seed=42)(torch.ones(1)).detach()
    tensor([2., 2., 0., 0.])
    """

    _check_rate = staticmethod(Rate.from_p)

    def __init__(
        self,
        module: torch.nn.Module,
        p: float = 0.5,
        names: str | Sequence[str] = ("weight",),
        *,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(p, seed=seed)
        names = (names,) if isinstance(names, str) else tuple(names)
        parameters = dict(module.named_parameters())
        if not names or not parameters.keys() >= set(names):
            raise ValueError(
                f"names must be parameters of the module, some of {', '.join(parameters)}, "
                f"got {names}"
            )
        for name in names:
            compute_dtype(parameters[name].dtype, name)
        self.module, self.names = module, names

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Run `forward` and the hooks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, with dropped weights in training."""
        if args and isinstance(args[0], torch.fx.Proxy):
            return record_module(self, *args, **kwargs)
        if not self.training or Rate.from_p(self.p).p == 0:
            return self.module(*args, **kwargs)
        weights = {name: attrgetter(name)(self.module) for name in self.names}

        def call(key: Key) -> Any:
            dropped = {
                name: dropout(weight, self.p, key=key.fold_in(name))
                for name, weight in weights.items()
            }
            return functional_call(self.module, dropped, args, kwargs)

        return self.run_with_key(weights[self.names[0]], call)

    def extra_repr(self) -> str:
        """Return the rate and the names, and the seed if there is one."""
        text = f"p={self.p}, names={self.names}"
        return text if self.seed is None else f"{text}, seed={self.seed}"
