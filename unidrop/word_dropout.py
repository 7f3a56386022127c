"""Word dropout: replace tokens of a text by the token for unknown words at random.

Tokens are integers, which have neither a scale nor a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unidrop.arguments import as_tuple, checked_index
from unidrop.dtypes import dtype_name, integer_bits
from unidrop.key import Key, check_key
from unidrop.library import get_library
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.window import Window

__all__ = ["WordPlan", "check_tokens", "plan_word_dropout", "word_dropout"]


@dataclass(frozen=True, slots=True)
class WordPlan(DropoutPlan):
    """A plan that replaces tokens; the mask alone is one of the library's operators."""

    unk_id: int
    special_ids: tuple[int, ...]

    def apply(self, x: Any, key: Key, mask: Any = None) -> Any:
        """Return the tokens under a key."""
        mask = self.mask(x, key) if mask is None else mask
        xp, device = self.library.arrays.namespace(x), self.library.arrays.device(x)

        def make_token(token: int) -> Any:
            return xp.full((), token, dtype=x.dtype, device=device)

        for token in self.special_ids:
            mask = mask | (x == make_token(token))
        return xp.where(mask, x, make_token(self.unk_id))

    def run(self, x: Any, key: Key, mask: Any = None, out: Any = None) -> Any:
        """Compute the tokens under a key; ``out`` is an array to write and return."""
        y = self.apply(x, key, mask)
        if out is None:
            return y
        self.library.buffers.copy_into(out, y)
        return out


def check_tokens(unk_id: Any, special_ids: Any) -> tuple[int, tuple[int, ...]]:
    """Return the tokens of word dropout as integers; raises TypeError."""
    ids = as_tuple(special_ids, "special_ids")
    try:
        unk_id = checked_index(unk_id, "unk_id")
    except TypeError:
        raise TypeError(f"unk_id must be an integer, got {unk_id!r}") from None
    return unk_id, tuple(checked_index(i, "special_ids") for i in ids)


def plan_word_dropout(
    x: Any,
    rate: Rate,
    *,
    unk_id: int,
    special_ids: Sequence[int] = (),
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    name: str = "x",
) -> WordPlan:
    """Return the plan of `word_dropout`."""
    library = get_library(x, name)
    library.arrays.check(x, name)
    bits, kind = integer_bits(x.dtype), dtype_name(x.dtype)
    if bits is None:
        raise TypeError(f"{name} must be of an integer dtype for word dropout, got {x.dtype}")
    unk_id, special_ids = check_tokens(unk_id, special_ids)
    least, most = (
        (0, 2**bits - 1) if kind.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
    for argument, token in (("unk_id", unk_id), *(("special_ids", i) for i in special_ids)):
        if not least <= token <= most:
            raise ValueError(f"{argument} must be in [{least}, {most}] for {kind}, got {token}")
    window = Window.from_args(library.arrays.shape(x), (), global_shape, start)
    return WordPlan(library, window, rate, bool(training) and rate.p > 0, unk_id, special_ids)


def word_dropout(
    x: Any,
    p: float,
    key: Key,
    *,
    unk_id: int,
    special_ids: Sequence[int] = (),
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Replace tokens by the one for unknown words with probability p.

    Parameters
    ----------
    x : array
        Tokens, of any integer dtype and shape; libraries as in `dropout`.
    p : int or float
        The probability of replacing a token, in [0, 1].
    key : Key
        The name of the mask, which is the one of `dropout`.
    unk_id : int
        The token to replace others by.
    special_ids : sequence of int, default ()
        Tokens to keep wherever they are, such as padding and the end of a sentence.
    training, global_shape, start
        As in `dropout`.
    return_mask : bool, default False
        If True, the mask is returned too. It does not depend on the tokens: special ones have
        decisions too.

    Returns
    -------
    y : array
        Of x's shape and dtype.
    mask : array of bool
        Only with ``return_mask``: False for tokens to be replaced, unless they are special.

    Raises
    ------
    TypeError
        As `dropout`, and if x is not of an integer dtype, or a token is not an integer.
    ValueError
        As `dropout`, and if x's dtype cannot hold a token.

    Notes
    -----
    M. Iyyer et al., "Deep unordered composition rivals syntactic methods for text classification",
    ACL 2015. S. Bowman et al., "Generating sentences from a continuous space", CoNLL 2016.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import word_dropout
    >>> word_dropout(numpy.array([5, 6, 7, 8, 0, 0]), 0.5, Key(42), unk_id=1, special_ids=(0,))
    array([5, 1, 1, 1, 0, 0])
    """
    check_key(key)
    options: dict[str, Any] = {"unk_id": unk_id, "special_ids": special_ids, "training": training}
    options |= {"global_shape": global_shape, "start": start}
    return plan_word_dropout(x, Rate.from_p(p), **options).call(x, key, return_mask)
