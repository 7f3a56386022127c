"""Define the interface of a backend, and load the backends that packages register.

A backend reaches one implementation of dropout: it converts arrays from and to NumPy and calls the
implementation. Those methods suffice for most contracts. Each further capability is one method. The
attribute `capabilities` declares the methods that exist, and a reason for each one that is missing.

Packages register backends in the entry-point group ``unidrop.backends``. The matrix calls the
registered object without arguments. It must return a `Backend`, or raise `BackendUnavailableError`
if this machine cannot run it.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Protocol, Self, runtime_checkable

from numpy.typing import NDArray

from unidrop.conformance.error_text import error_text, writable
from unidrop.conformance.family import MEMBERS

__all__ = [
    "CAPABILITIES",
    "Backend",
    "BackendNotRun",
    "BackendUnavailableError",
    "BaseBackend",
    "CapableBackend",
    "Layer",
    "backend_names",
    "check_derived_modes",
    "entry_points_named",
    "load_backends",
    "missing_capability",
    "missing_member",
]

#: Every capability that a contract may require, and its meaning.
CAPABILITIES: Mapping[str, str] = {
    "broadcast_axes": "dropout accepts broadcast_axes",
    "windows": "dropout accepts global_shape and start",
    "mask": "dropout accepts return_mask",
    "gradient": "gradient(...) differentiates dropout",
    "layouts": "layouts(x) returns copies of x with other strides",
    "traces": "traces(...) counts the traces of a compiled mode",
    "words": "words(...) returns the generator's words",
    "key": "key(...) folds integers and strings into a key",
    "traced_key": "traced_key(...) folds an array into a key",
    "layer": "layer(...) creates a layer that counts its calls",
    "layer_gradient": "the layer's vjp(...) differentiates a training call",
    "family": "dropout accepts member and its options",
    "family_gradient": "gradient accepts member and its options",
    "attention": "attention(...) drops attention weights",
    "attention_gradient": "attention_gradient(...) differentiates attention",
    "attention_windows": "attention accepts global_shape and start",
}


class Layer(Protocol):
    """A layer that counts its training calls."""

    calls: Any

    def __call__(self, x: Any, *, training: bool) -> Any:
        """Apply the layer to one of the backend's arrays."""

    def save(self) -> bytes:
        """Return the layer's state in the framework's own file format."""

    def load(self, state: bytes) -> None:
        """Restore the state that another layer's `save` returned."""

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Apply the layer in training mode; required by the capability "layer_gradient".

        Returns
        -------
        y, pullback
            The output, and a function that maps an upstream gradient to the gradient with respect
            to x. The function runs the backward pass, including any recomputation.
        """


@runtime_checkable
class Backend(Protocol):
    """The interface between the matrix and one implementation of dropout.

    Attributes
    ----------
    name : str
        Name in the matrix.
    modes : sequence of str
        Execution modes, such as "eager" and "compiled".
    devices : sequence of str
        Devices of this machine that the backend runs on.
    compiled_modes : sequence of str
        The modes that trace and compile. They require the capability "traces".
    derived_modes : mapping of str to str
        Maps a compiled mode to the mode that it wraps, for example in activation checkpointing.
        Contracts with ``in_derived_modes=False`` run in the wrapped mode only, if they apply there.
    missing_modes : mapping of str to str
        Maps each mode that the framework has and the backend does not support to the reason.
    capabilities : mapping of str to str or None
        Maps a supported member of `CAPABILITIES` to None, and a missing one to the reason. A
        capability that is not declared is missing too.
    members : mapping of str to str or None
        Maps a supported member of the family, a key of `MEMBERS`, to None, and a missing one to the
        reason. A member that is not declared is missing too.
    mode_exclusions : mapping of str to mapping of str to str
        Maps a mode to the capabilities, members and contracts that do not apply in it, each with
        the reason.
    step_limit : int
        Upper bound of steps, exclusive: 2^64 unless the step is a narrower integer of an array or a
        layer.
    """

    name: str
    modes: Sequence[str]
    compiled_modes: Sequence[str]
    derived_modes: Mapping[str, str]
    missing_modes: Mapping[str, str]
    devices: Sequence[str]
    capabilities: Mapping[str, str | None]
    members: Mapping[str, str | None]
    mode_exclusions: Mapping[str, Mapping[str, str]]
    step_limit: int

    def dtypes(self, mode: str) -> Sequence[str]:
        """Return the names of the dtypes that a mode supports: float16, bfloat16, float32, ..."""

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Convert a NumPy array to an array of the backend, with the same values and dtype.

        The NumPy dtype of bfloat16 is ``ml_dtypes.bfloat16``. The contract "bad-dtype" also passes
        integers and bools. If the backend has no such arrays, raise TypeError or ValueError here.
        """

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Convert an array of the backend to NumPy, bfloat16 to ``ml_dtypes.bfloat16``."""

    def get_device(self, y: Any) -> str:
        """Return the member of `devices` that holds an array."""

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Apply dropout to x with the key ``Key(seed).fold_in(step)``.

        ``options`` follow `unidrop.dropout`: ``training=`` and, if the capabilities allow them,
        ``broadcast_axes=``, ``global_shape=`` with ``start=``, and ``return_mask=``. With the
        capability "family", ``member=`` is the name of another function of `unidrop.family`, and
        further options are the ones of that function. Then p is the function's second argument,
        such as a standard deviation. In compiled modes, the step must be an argument of the
        compiled function, not a constant.
        """


class BaseBackend:
    """Defaults for a backend that runs eagerly, on the CPU, with float32 arrays.

    A subclass must define ``name``, ``from_numpy``, ``to_numpy`` and ``dropout``, and may override
    every other member.

    Examples
    --------
    >>> import unidrop
    >>> class Plain(BaseBackend):
    ...     name = "plain"
    ...
    ...     def from_numpy(self, x, device, mode):
    ...         return x
    ...
    ...     def to_numpy(self, y):
    ...         return y
    ...
    ...     def dropout(self, x, p, seed, step, *, mode, **options):
    ...         return unidrop.dropout(x, p, unidrop.Key(seed).fold_in(step), **options)
    >>> isinstance(Plain(), Backend)
    True
    """

    name: str
    modes: Sequence[str] = ("eager",)
    compiled_modes: Sequence[str] = ()
    derived_modes: Mapping[str, str] = MappingProxyType({})
    missing_modes: Mapping[str, str] = MappingProxyType({})
    devices: Sequence[str] = ("cpu",)
    capabilities: Mapping[str, str | None] = MappingProxyType({})
    members: Mapping[str, str | None] = MappingProxyType({})
    mode_exclusions: Mapping[str, Mapping[str, str]] = MappingProxyType({})
    step_limit = 1 << 64

    def dtypes(self, mode: str) -> Sequence[str]:
        """Return float32."""
        return ("float32",)

    def get_device(self, y: Any) -> str:
        """Return the first device."""
        return self.devices[0]


class CapableBackend(Backend, Protocol):
    """The methods of a backend with every capability, each named after its capability."""

    def gradient(
        self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str, **options: Any
    ) -> Any:
        """Return the gradient of dropout with respect to x, for ``Key(seed).fold_in(step)``.

        With the capability "family_gradient", ``options`` are ``member=`` and its options.
        """

    def layouts(self, x: Any) -> Mapping[str, Any]:
        """Return arrays that equal x and have other strides, by the name of the layout."""

    def traces(self, mode: str) -> int:
        """Return the number of traces in a mode so far."""

    def words(self, counter: Sequence[int], key: Sequence[int], *, mode: str) -> list[int]:
        """Return Philox4x32-10 of a counter of four words and a key of two, lowest word first."""

    def key(self, seed: int, *data: int | str) -> int:
        """Return ``Key(seed)`` after folding in each of data in order."""

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Return ``Key(seed).fold_in(step)``, with the step as an array of the backend."""

    def layer(self, p: float, seed: int, *, dtype: str, device: str, mode: str) -> Layer:
        """Return a new layer whose training call n uses ``Key(seed).fold_in(n)``."""

    def attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        p: float,
        seed: int,
        step: int,
        *,
        mode: str,
        **options: Any,
    ) -> Any:
        """Return ``dropout(softmax(query @ key.mT / sqrt(features))) @ value``.

        Arrays have the axes batch, head, position and feature. Each head of keys and values serves
        a group of successive heads of queries. All arrays have the same number of features. The
        mask is ``keep_mask((batch, heads, queries, keys), p, Key(seed).fold_in(step))``. In
        compiled modes, the step must be an argument of the compiled function.

        ``options`` are ``is_causal=``: if True, a query attends to no later position; ``mask=``: an
        array of bools of shape (batch, 1, queries, keys), True for pairs that attend; and, with the
        capability "attention_windows", ``global_shape=`` and ``start=`` of the weights.
        """

    def attention_gradient(
        self,
        query: Any,
        key: Any,
        value: Any,
        upstream: Any,
        p: float,
        seed: int,
        step: int,
        *,
        mode: str,
        **options: Any,
    ) -> tuple[Any, Any, Any]:
        """Return the gradients of attention with respect to query, key and value."""


def missing_capability(backend: Backend, capability: str, mode: str) -> str | None:
    """Return the reason why a backend lacks a capability in a mode, or None if it has it."""
    reason = backend.capabilities.get(capability, f"{capability} is not declared")
    return reason or backend.mode_exclusions.get(mode, {}).get(capability)


def missing_member(backend: Backend, member: str, mode: str) -> str | None:
    """Return the reason why a backend lacks a member in a mode, or None if it has it."""
    reason = backend.members.get(member, f"the member {member} is not declared")
    return reason or backend.mode_exclusions.get(mode, {}).get(member)


class BackendUnavailableError(Exception):
    """A backend's library is installed, but this machine cannot run it.

    The constructor of a backend raises it, with a message that names the missing part, such as a
    GPU. The matrix then skips the backend and does not count that as a failure.
    """


@dataclass(frozen=True, slots=True)
class BackendNotRun:
    """The outcome of a backend that did not load, or whose process failed.

    Attributes
    ----------
    name : str
    error : str
        The reason in one line.
    details : str
        The traceback.
    is_missing : bool
        True if the library is not installed or cannot run on this machine. Every other reason
        counts as a failure.
    """

    name: str
    error: str
    details: str = ""
    is_missing: bool = False

    @classmethod
    def from_error(cls, name: str, error: BaseException, own: str = "") -> Self:
        """Return the outcome of a backend whose loading raised an error.

        A missing module means that a library is not installed. The exception is the backend's
        ``own`` module: then the entry point is wrong.
        """
        details = writable("".join(traceback.format_exception(error)))
        if isinstance(error, BackendUnavailableError):
            return cls(name, writable(str(error)), details, is_missing=True)
        if isinstance(error, ModuleNotFoundError) and (error.name or "") != own:
            library = error.name or str(error)
            reason = "not installed" if library == name else f"{library} is not installed"
            return cls(name, writable(reason), details, is_missing=True)
        return cls(name, error_text(error), details)


def load_backends(names: Sequence[str] = ()) -> Iterator[Backend | BackendNotRun]:
    """Load the named backends in alphabetical order, all registered ones by default.

    Yields
    ------
    Backend or BackendNotRun
        The backend, or the reason why it did not load. An error in one backend does not prevent
        the others from loading.

    Raises
    ------
    ValueError
        If a name is not registered. The message lists the registered names.
    """
    for name in backend_names(names):
        points = entry_points_named(name)
        try:
            yield _load(points)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a backend that calls sys.exit must not stop the others
            yield BackendNotRun.from_error(name, error, own=points[0].module)


def backend_names(names: Sequence[str] = ()) -> list[str]:
    """Return the given names without duplicates, sorted; all registered names by default.

    Raises
    ------
    ValueError
        If a name is not registered. The message lists the registered names.
    """
    known = {point.name for point in _entry_points()}
    for name in names:
        if name not in known:
            raise ValueError(f"backend must be one of {', '.join(sorted(known))}, got {name!r}")
    return sorted(set(names) or known)


def entry_points_named(name: str) -> list[EntryPoint]:
    """Return the entry points of a name: several if packages register different backends for it."""
    return [point for point in _entry_points() if point.name == name]


def _entry_points() -> Iterable[EntryPoint]:
    return entry_points(group="unidrop.backends")


def _load(points: Sequence[EntryPoint]) -> Backend:
    """Load and validate the backend of an entry point."""
    if len({point.value for point in points}) > 1:
        values = [point.value for point in points]
        raise ValueError(f"the name must belong to one backend, got {values}")
    backend = points[0].load()()
    if not isinstance(backend, Backend):
        members = (*Backend.__annotations__, *(n for n in vars(Backend) if not n.startswith("_")))
        missing = [member for member in members if not hasattr(backend, member)]
        lacks = ", ".join(missing)
        raise TypeError(f"{backend!r} lacks {lacks}: see unidrop.conformance.Backend")
    if backend.name != points[0].name:
        expected = repr(points[0].name)
        raise ValueError(f"name must be {expected}, as the entry point, got {backend.name!r}")
    if not callable(backend.dtypes):
        raise TypeError(f"dtypes must be a method with one argument, got {backend.dtypes!r}")
    for name in ("modes", "devices"):
        if not getattr(backend, name):
            raise ValueError(f"{name} must not be empty, got {getattr(backend, name)!r}")
    for mode in backend.modes:
        dtypes = backend.dtypes(mode)
        if not dtypes:
            raise ValueError(f"dtypes({mode!r}) must not be empty, got {dtypes!r}")
    for name in ("capabilities", "members", "mode_exclusions", "missing_modes", "derived_modes"):
        if not isinstance(getattr(backend, name), Mapping):
            raise TypeError(f"{name} must be a mapping, got {getattr(backend, name)!r}")
    _check_modes(backend)
    _check_capabilities(backend)
    return backend


def _check_capabilities(backend: Backend) -> None:
    """Raise ValueError for an unknown capability, an empty reason or a missing method."""
    for declared, known in (("capabilities", CAPABILITIES), ("members", MEMBERS)):
        reasons = getattr(backend, declared)
        unknown = [name for name in reasons if name not in known]
        if unknown:
            raise ValueError(f"{declared} must be among {', '.join(known)}, got {unknown}")
        for name, reason in reasons.items():
            if reason == "":
                raise ValueError(f"{declared}[{name!r}] must be None or a reason, got {reason!r}")
    for name, reason in backend.capabilities.items():
        method = CAPABILITIES[name].partition("(")[0]
        if reason is None and method == name and not hasattr(backend, name):
            raise ValueError(f"capabilities declares {name}, but the backend has no method {name}")


def _check_modes(backend: Backend) -> None:
    """Raise ValueError for a declaration without effect, such as a misspelled mode."""
    if len(set(backend.modes)) != len(backend.modes):
        raise ValueError(f"modes must be unique, got {tuple(backend.modes)}")
    for name in ("compiled_modes", "mode_exclusions"):
        unknown = [mode for mode in getattr(backend, name) if mode not in backend.modes]
        if unknown:
            raise ValueError(f"{name} must be among {tuple(backend.modes)}, got {unknown}")
    check_derived_modes(backend)
    both = [mode for mode in backend.missing_modes if mode in backend.modes]
    if both:
        raise ValueError(f"missing_modes must not be among {tuple(backend.modes)}, got {both}")


def check_derived_modes(backend: Backend) -> None:
    """Raise ValueError unless derived modes and the modes they wrap are compiled.

    A derived mode must not wrap another derived mode.
    """
    compiled = [mode for mode in backend.compiled_modes if mode not in backend.derived_modes]
    for mode, base in backend.derived_modes.items():
        if mode not in backend.compiled_modes or base not in compiled:
            raise ValueError(
                "derived_modes must map a compiled mode to a compiled mode that is not derived, "
                f"one of {compiled}, got {mode!r}: {base!r}"
            )
