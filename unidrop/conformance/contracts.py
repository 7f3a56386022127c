"""The contracts: what must be true of every backend, each with its name, promise and check.

A check is a function of a `Cell`. It raises `ContractError` where the promise does not hold; any
other exception is a failure too. No contract knows a backend's name: what one needs it asks for as
an ability. One that depends on the dtype is run for every dtype; the others once.
"""

import hashlib
import math
from collections.abc import Callable, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import unidrop
from unidrop.conformance.backend import ABILITIES, AbleBackend, Backend, has_ability
from unidrop.conformance.compare import (
    ContractError,
    check_equal,
    check_mask,
    check_output,
    numpy_dtype,
)
from unidrop.conformance.golden import (
    GoldenMask,
    GoldenOutput,
    golden_masks,
    golden_outputs,
    read_golden,
)

__all__ = ["CONTRACTS", "Cell", "Contract"]

SEED = 42

# How many steps a compiled mode has to take with what it traced at the first.
_STEPS = 100

# Where each shape and rate is compiled anew, of as many golden vectors as there are, these few.
_TELLING = (
    "size-257",
    "shape-0d",
    "shape-2x3x5x7",
    "rate-0.001",
    "seed-2^64-1-step-7",
    "rate-2^-32-threshold-1",
    "threshold-equals-u-even-0",
    "threshold-is-u-plus-1-even-0",
    "threshold-equals-u-odd-1",
    "threshold-is-u-plus-1-odd-1",
    "broadcast-leading",
    "broadcast-channel-dropout",
    "window-unaligned-7",
    "window-inner-of-37",
    "window-across-index-2^35-2d",
)


@dataclass(frozen=True, slots=True)
class Contract:
    """A named check with one sentence of what it promises.

    Attributes
    ----------
    name, promise : str
    check : callable
    needs : tuple of str
        The abilities without which it can't be run.
    every_dtype : bool
        Whether it is run for each dtype of a mode, or for one.
    in_compiled : bool
        Whether the former is so in compiled modes too, where each takes compilations.
    compiled_only : bool
        Whether it is about compiled modes.
    """

    name: str
    promise: str
    check: Callable[["Cell"], None]
    needs: tuple[str, ...]
    every_dtype: bool
    in_compiled: bool
    compiled_only: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """One contract for one backend, device, dtype and mode."""

    contract: Contract
    backend: Backend
    device: str
    dtype: str
    mode: str

    def __str__(self) -> str:
        return "-".join(self.names().values())

    def names(self) -> dict[str, str]:
        """Return what names the cell."""
        return {
            "contract": self.contract.name,
            "backend": self.backend.name,
            "device": self.device,
            "dtype": self.dtype,
            "mode": self.mode,
        }

    @property
    def is_compiled(self) -> bool:
        """Whether the mode compiles each shape and rate, so that a contract looks at fewer."""
        return self.mode in self.backend.compiled_modes

    @property
    def able(self) -> AbleBackend:
        """The backend, seen as one that has the abilities which the contract needs."""
        return cast(AbleBackend, self.backend)

    def array(self, x: NDArray[Any]) -> Any:
        """Return a NumPy array as the backend's."""
        return self.backend.from_numpy(x, self.device, self.mode)

    def ones(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return ones of the cell's dtype, as NumPy's."""
        return np.ones(shape, dtype=numpy_dtype(self.dtype))

    def values(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return ordinary values of the cell's dtype between -2 and 2, none of them 0."""
        size = math.prod(shape)
        real = np.linspace(-2, 2, 2 * size + 2)[1::2][:size].reshape(shape)
        if self.dtype.startswith("complex"):
            return np.asarray(real + 1j * np.flip(real), dtype=self.dtype)
        return real.astype(numpy_dtype(self.dtype))

    def dropout(
        self, x: NDArray[Any], p: Any, seed: int = SEED, step: int = 0, **options: Any
    ) -> NDArray[Any]:
        """Run the backend's dropout on a NumPy array and return NumPy's."""
        y = self.backend.dropout(self.array(x), p, seed, step, mode=self.mode, **options)
        return self.backend.to_numpy(y)

    def keeps(
        self, shape: tuple[int, ...], p: float, seed: int = SEED, step: int = 0, **options: Any
    ) -> NDArray[np.bool]:
        """Return which elements the backend keeps."""
        kept: NDArray[np.bool] = self.dropout(self.ones(shape), p, seed, step, **options) != 0
        return kept


CONTRACTS: dict[str, Contract] = {}


def _contract(
    name: str,
    promise: str,
    needs: tuple[str, ...] = (),
    *,
    every_dtype: bool = False,
    in_compiled: bool = False,
    compiled_only: bool = False,
) -> Callable[[Callable[[Cell], None]], Callable[[Cell], None]]:
    if not set(needs) <= set(ABILITIES):
        raise ValueError(f"needs has to name abilities, but got {needs}")

    def register(check: Callable[[Cell], None]) -> Callable[[Cell], None]:
        CONTRACTS[name] = Contract(
            name, promise, check, needs, every_dtype, in_compiled, compiled_only
        )
        return check

    return register


def _key(seed: int, step: int) -> unidrop.Key:
    return unidrop.Key(seed).fold_in(step)


def _by_core(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call the core on its portable path, which no kernel has a part in."""
    with unidrop.only("portable"):
        return function(*args, **options)


def _is_threshold_case(golden: GoldenMask) -> bool:
    return golden.name.startswith("threshold") or "-u-" in golden.name


def _check_golden_masks(cell: Cell, where: Callable[[GoldenMask], bool]) -> None:
    chosen = [g for g in golden_masks() if g.step < cell.backend.step_limit and where(g)]
    if cell.is_compiled:
        chosen = [g for g in chosen if g.name in _TELLING]
    _check_some(chosen)
    for golden in chosen:
        keep = cell.keeps(golden.shape, golden.p, golden.seed, golden.step, **golden.options)
        expected = np.broadcast_to(golden.keep, golden.shape)
        what = (
            f"mask {golden.name!r} (p = {golden.p!r}, step {golden.step} of key {golden.seed:#x})"
        )
        check_mask(keep, expected, what)


def _golden_outputs(cell: Cell) -> list[GoldenOutput]:
    limit = cell.backend.step_limit
    chosen = [g for g in golden_outputs() if g.dtype == cell.dtype and g.step < limit]
    _check_some(chosen)
    # The first has a scale that no dtype holds exactly.
    return chosen[:1] if cell.is_compiled else chosen


def _check_some(chosen: Sized) -> None:
    """Raise ContractError where there is nothing to compare: that would hold of anything."""
    if not chosen:
        raise ContractError(
            "something to compare, such as a golden vector of a step it takes", "none"
        )


@_contract("mask", "The mask is that of the golden vectors, bit for bit, at any shape and rate.")
def _mask(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: not g.options and not _is_threshold_case(g))


@_contract("threshold", "An element is kept where u >= T: at u = T kept, at u = T - 1 dropped.")
def _threshold(cell: Cell) -> None:
    windows = has_ability(cell.backend, "windows", cell.mode)
    _check_golden_masks(
        cell, lambda g: _is_threshold_case(g) and (windows or g.global_shape is None)
    )


@_contract(
    "broadcast-axes",
    "Along broadcast axes one decision is shared, and the mask is numbered without them.",
    ("broadcast_axes",),
)
def _broadcast_axes(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: bool(g.broadcast_axes) and g.global_shape is None)


@_contract(
    "windows",
    "A window gets its block of the whole mask, also beyond 2^32 elements.",
    ("windows", "broadcast_axes"),
)
def _windows(cell: Cell) -> None:
    _check_golden_masks(cell, lambda g: g.global_shape is not None and not _is_threshold_case(g))


@_contract("windows-tile", "Windows of any cut tile the whole.", ("windows",))
def _windows_tile(cell: Cell) -> None:
    whole = (6, 5, 11)
    expected = _by_core(unidrop.keep_mask, whole, 0.3, _key(SEED, 5))
    came = np.zeros(whole, dtype=bool)
    for rows in (slice(0, 1), slice(1, 6)):
        for columns in (slice(0, 3), slice(3, 11)):
            block = came[rows, :, columns]
            start = (rows.start, 0, columns.start)
            block[...] = cell.keeps(block.shape, 0.3, SEED, 5, global_shape=whole, start=start)
    check_mask(came, expected, "the whole")


@_contract("large-mask", "A large mask, made in pieces or at once, is that of the specification.")
def _large_mask(cell: Cell) -> None:
    for digest in read_golden()["digests"]:
        keep = cell.keeps(
            tuple(digest["shape"]), digest["p"], int(digest["seed"], 16), digest["step"]
        )
        check_equal(int(keep.sum()), digest["kept"], f"mask {digest['name']!r}: number kept")
        packed = np.packbits(keep).tobytes()
        came = hashlib.blake2b(packed, digest_size=8).hexdigest()
        check_equal(came, digest["blake2b"], f"mask {digest['name']!r}: digest of its bits")


@_contract("steps", "Each step has the mask of its own key, whatever ran before.")
def _steps(cell: Cell) -> None:
    for step in (0, 1, 2, 1, 2**31 - 1, 0):
        expected = _by_core(unidrop.keep_mask, (7, 9), 0.5, _key(SEED, step))
        check_mask(cell.keeps((7, 9), 0.5, SEED, step), expected, f"mask of step {step}")


@_contract(
    "traces",
    "A compiled mode is traced once, however often the step moves.",
    ("traces",),
    compiled_only=True,
)
def _traces(cell: Cell) -> None:
    before = cell.able.traces(cell.mode)
    for step in range(_STEPS):
        cell.keeps((5, 13), 0.37, SEED, step)
    traced = cell.able.traces(cell.mode) - before
    check_equal(traced, 1, f"traces over {_STEPS} steps:")


@_contract(
    "output",
    "The output is that of the golden vectors, bit for bit, by the output rule.",
    every_dtype=True,
    in_compiled=True,
)
def _output(cell: Cell) -> None:
    for golden in _golden_outputs(cell):
        with np.errstate(all="ignore"):
            y = cell.dropout(golden.x, golden.p, golden.seed, golden.step)
            check_output(y, golden.y, golden.x, f"output {golden.name!r}")


@_contract(
    "dropped-is-zero", "A dropped NaN or infinity is +0, and p = 1 drops all.", every_dtype=True
)
def _dropped_is_zero(cell: Cell) -> None:
    x = cell.ones((64,))
    for value in (np.nan, np.inf, -np.inf, -1.0):
        x[...] = value
        with np.errstate(all="ignore"):
            y, none = cell.dropout(x, 0.5), cell.dropout(x, 1)
        keep = _by_core(unidrop.keep_mask, (64,), 0.5, _key(SEED, 0))
        zeros = np.zeros_like(x)
        check_output(y[~keep], zeros[~keep], x[~keep], f"dropped {value}")
        check_output(none, zeros, x, f"p = 1 of {value}")


@_contract("nothing-to-drop", "p = 0 and training = False return x unchanged.", every_dtype=True)
def _nothing_to_drop(cell: Cell) -> None:
    x = cell.values((5, 7))
    x.reshape(-1)[:4] = (np.nan, np.inf, -np.inf, -0.0)
    for options in ({"p": 0}, {"p": 0.0}, {"p": 0.5, "training": False}):
        y = cell.dropout(x, options.pop("p"), **options)
        check_equal(y.tobytes(), x.tobytes(), "the bytes of x,")


@_contract(
    "shape-dtype-device", "Shape, dtype and device are x's, 0-d and empty too.", every_dtype=True
)
def _shape_dtype_device(cell: Cell) -> None:
    shapes = (
        ((), (3, 0, 2), (2, 3, 5)) if cell.is_compiled else ((), (0,), (3, 0, 2), (1,), (2, 3, 5))
    )
    for shape in shapes:
        x = cell.array(cell.values(shape))
        y = cell.backend.dropout(x, 0.5, SEED, 0, mode=cell.mode)
        check_equal(cell.backend.device_of(y), cell.device, "device")
        came = cell.backend.to_numpy(y)
        check_equal(came.shape, shape, "shape")
        check_equal(came.dtype, numpy_dtype(cell.dtype), "dtype")


@_contract("returned-mask", "return_mask returns the mask that was applied.", ("mask",))
def _returned_mask(cell: Cell) -> None:
    x = cell.ones((9, 11))
    for p, training in ((0.4, True), (0, True), (0.4, False), (1, True)):
        y, mask = cell.backend.dropout(
            cell.array(x), p, SEED, 1, mode=cell.mode, training=training, return_mask=True
        )
        expected = _by_core(unidrop.keep_mask, (9, 11), p, _key(SEED, 1), training=training)
        check_mask(cell.backend.to_numpy(mask), expected, f"mask at p = {p}, training = {training}")
        check_mask(cell.backend.to_numpy(y) != 0, expected, f"output at p = {p}")


@_contract(
    "bad-rate",
    "A rate outside [0, 1] or NaN raises ValueError, and what is no Python number TypeError; the "
    "message says what came.",
)
def _bad_rate(cell: Cell) -> None:
    for outside in (-0.1, 1.5, math.nan):
        _check_raises(cell, (ValueError,), cell.ones((4,)), outside, str(outside))
    for other in (True, np.float32(0.1), "0.5", None):
        _check_raises(cell, (TypeError,), cell.ones((4,)), other, str(other))


@_contract(
    "bad-dtype",
    "An array of integers or bools raises TypeError or ValueError that names its dtype.",
)
def _bad_dtype(cell: Cell) -> None:
    for dtype in ("int32", "int64", "uint8", "bool"):
        x = np.ones(4, dtype=dtype)
        mention = str(cell.backend.to_numpy(cell.array(x)).dtype)
        _check_raises(cell, (TypeError, ValueError), x, 0.5, mention)


def _check_raises(
    cell: Cell, errors: tuple[type[Exception], ...], x: NDArray[Any], p: Any, mention: str
) -> None:
    names = " or ".join(error.__name__ for error in errors)
    expected = f"{names} that mentions {mention!r}, for p = {p!r} and x of {x.dtype}"
    try:
        cell.dropout(x, p)
    except Exception as error:
        if not isinstance(error, errors) or mention not in str(error):
            raise ContractError(expected, repr(error)) from None
        return
    raise ContractError(expected, "no error")


@_contract(
    "gradient",
    "The gradient is the output rule applied to the upstream gradient, by the forward's mask.",
    ("gradient",),
    every_dtype=True,
    in_compiled=True,
)
def _gradient(cell: Cell) -> None:
    for golden in _golden_outputs(cell):
        x = cell.array(cell.values(golden.x.shape))
        upstream = cell.array(golden.x)
        with np.errstate(all="ignore"):
            came = cell.able.gradient(
                x, upstream, golden.p, golden.seed, golden.step, mode=cell.mode
            )
            what = f"gradient for the upstream gradient x of output {golden.name!r}"
            check_output(cell.backend.to_numpy(came), golden.y, golden.x, what)


@_contract("layout", "The mask follows logical indices, whatever the memory layout.", ("layouts",))
def _layout(cell: Cell) -> None:
    x = cell.values((4, 6, 5, 3))
    expected = _by_core(unidrop.dropout, x, 0.4, _key(SEED, 4))
    layouts = cell.able.layouts(cell.array(x))
    _check_some(layouts)
    for name, array in layouts.items():
        y = cell.backend.to_numpy(cell.backend.dropout(array, 0.4, SEED, 4, mode=cell.mode))
        check_output(y, expected, x, f"output of layout {name!r}")


@_contract(
    "generator", "The generator gives its known answers on the backend's arrays.", ("words",)
)
def _generator(cell: Cell) -> None:
    for vector in read_golden()["generator"]:
        counter, key, words = (
            [int(word, 16) for word in vector[name]] for name in ("counter", "key", "words")
        )
        came = cell.able.words(counter, key, mode=cell.mode)
        check_equal(came, words, f"words of counter {vector['counter']}:")


@_contract("traced-key", "A step that is an array folds to the key of its value.", ("traced_key",))
def _traced_key(cell: Cell) -> None:
    for seed, step in ((0, 0), (42, 7), (2**64 - 1, 2**31 - 1)):
        came = cell.able.traced_key(seed, step, mode=cell.mode)
        check_equal(f"{came:016x}", f"{int(_key(seed, step)):016x}", "key")


@_contract("keys", "Integers and strings fold to the keys of the golden vectors.", ("key",))
def _keys(cell: Cell) -> None:
    for vector in read_golden()["keys"]:
        data = [i["str"] if "str" in i else int(i["int"], 16) for i in vector["fold_in"]]
        came = cell.able.key(int(vector["seed"], 16), *data)
        check_equal(f"{came:016x}", vector["key"], f"key of {vector['fold_in']}:")


@_contract(
    "layer-calls", "A layer's training calls advance its key; other calls do not.", ("layer",)
)
def _layer_calls(cell: Cell) -> None:
    layer = _layer(cell, 0.5, SEED)
    x = cell.ones((8, 9))
    for call in range(3):
        check_equal(int(layer.calls), call, "calls")
        _check_layer_call(cell, layer, x, call)
        idle = cell.backend.to_numpy(layer(cell.array(x), training=False))
        check_equal(idle.tobytes(), x.tobytes(), "evaluation returns the bytes of x,")
    layer.calls = 100
    _check_layer_call(cell, layer, x, 100)
    idle_layer = _layer(cell, 0.0, SEED)
    idle_layer(cell.array(x), training=True)
    check_equal(int(idle_layer.calls), 0, "calls at p = 0:")


@_contract("layer-error", "A layer's call that raises does not count.", ("layer",))
def _layer_error(cell: Cell) -> None:
    layer = _layer(cell, 0.5, SEED)
    try:
        layer(cell.array(np.ones(4, dtype="int32")), training=True)
    except (TypeError, ValueError):
        check_equal(int(layer.calls), 0, "calls")
        _check_layer_call(cell, layer, cell.ones((8, 9)), 0)
        return
    raise ContractError("an error for integers", "none")


@_contract("layer-resumes", "A layer saved and loaded continues with the next call.", ("layer",))
def _layer_resumes(cell: Cell) -> None:
    layer = _layer(cell, 0.5, SEED)
    x = cell.ones((8, 9))
    for _ in range(3):
        layer(cell.array(x), training=True)
    resumed = _layer(cell, 0.5, SEED)
    resumed.load(layer.save())
    check_equal(int(resumed.calls), 3, "calls")
    _check_layer_call(cell, resumed, x, 3)


@_contract(
    "layer-traces",
    "A layer in a compiled mode is traced once, however often it is called.",
    ("layer", "traces"),
    compiled_only=True,
)
def _layer_traces(cell: Cell) -> None:
    layer = _layer(cell, 0.5, SEED)
    x = cell.ones((5, 13))
    before = cell.able.traces(cell.mode)
    for call in range(_STEPS):
        _check_layer_call(cell, layer, x, call)
    traced = cell.able.traces(cell.mode) - before
    check_equal(traced, 1, f"traces over {_STEPS} calls:")


@_contract(
    "layer-gradient",
    "A layer's gradient is by the mask of its own call, also where the backward pass computes "
    "that again, and where another call came between.",
    ("layer", "layer_gradient"),
)
def _layer_gradient(cell: Cell) -> None:
    layer = _layer(cell, 0.5, SEED)
    x, upstream = cell.values((8, 9)), cell.values((9, 8)).reshape(8, 9)[::-1].copy()
    pending = [layer.vjp(cell.array(x)) for _ in range(2)]
    check_equal(int(layer.calls), 2, "calls after two:")
    for call, (y, pullback) in reversed(list(enumerate(pending))):
        key = _key(SEED, call)
        expected = _by_core(unidrop.dropout, x, 0.5, key)
        check_output(cell.backend.to_numpy(y), expected, x, f"output of call {call}")
        expected = _by_core(unidrop.dropout, upstream, 0.5, key)
        came = cell.backend.to_numpy(pullback(cell.array(upstream)))
        check_output(came, expected, upstream, f"gradient of call {call}")
    check_equal(int(layer.calls), 2, "calls after the backward passes:")
    _check_layer_call(cell, layer, x, 2)


def _layer(cell: Cell, p: float, seed: int) -> Any:
    return cell.able.layer(p, seed, dtype=cell.dtype, device=cell.device, mode=cell.mode)


def _check_layer_call(cell: Cell, layer: Any, x: NDArray[Any], call: int) -> None:
    y = cell.backend.to_numpy(layer(cell.array(x), training=True))
    expected = _by_core(unidrop.dropout, x, 0.5, _key(SEED, call))
    check_output(y, expected, x, f"output of call {call}")


@_contract("threads", "Calls from many threads give the masks of their keys.")
def _threads(cell: Cell) -> None:
    def keeps(step: int) -> NDArray[np.bool]:
        return cell.keeps((65, 33), 0.2, SEED, step)

    if cell.is_compiled:
        keeps(0)  # compiled here, and not by each of the threads at once
    with ThreadPoolExecutor(8) as pool:
        for step, keep in enumerate(pool.map(keeps, range(16))):
            expected = _by_core(unidrop.keep_mask, (65, 33), 0.2, _key(SEED, step))
            check_mask(keep, expected, f"mask of step {step}")


@_contract("rate", "The realised rate over 2^18 elements is within 4 standard deviations of p.")
def _rate(cell: Cell) -> None:
    for p in (0.1,) if cell.is_compiled else (0.001, 0.1, 0.5, 0.9):
        drops = ~cell.keeps((512, 512), p, SEED, 6)
        _check_sigmas(drops.sum(), drops.size, p, f"dropped share at p = {p}")


@_contract(
    "independence",
    "Masks of neighbours, steps and sites agree as often as independent ones, within 4 "
    "standard deviations.",
)
def _independence(cell: Cell) -> None:
    shape, p = (512, 512), 0.5
    site = int(unidrop.Key(SEED).fold_in("another site"))
    mask = cell.keeps(shape, p, SEED, 0).ravel()
    others = {
        "the next element": np.roll(mask, 1),
        "the next row": np.roll(mask, shape[1]),
        "the next step": cell.keeps(shape, p, SEED, 1).ravel(),
        "another site": cell.keeps(shape, p, site, 0).ravel(),
    }
    for name, other in others.items():
        _check_sigmas((mask == other).sum(), mask.size, 0.5, f"agreement with {name}")


def _check_sigmas(count: int, size: int, p: float, what: str) -> None:
    sigmas = (int(count) - size * p) / math.sqrt(size * p * (1 - p))
    if abs(sigmas) > 4:
        raise ContractError(
            f"{what} within 4 sigma of {p}", f"{count / size} ({sigmas:+.1f} sigma)"
        )
