"""What a backend is to the conformance matrix, and where backends are found.

A backend says how to reach an implementation of dropout: how to build its arrays from NumPy's and
give them back, and how to call it. That much already gets the contracts that need no more. Each
further capability is a method, and `capabilities` says which of them there are; the matrix shows a
reason for each that is missing.

Backends are found through the entry-point group ``unidrop.backends``; an entry point's object is
called without arguments and returns a `Backend`, or raises `BackendUnavailableError` where it can't be run.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Protocol, Self, runtime_checkable

from numpy.typing import NDArray

from unidrop.conformance.error_text import error_text, writable

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
]

#: Every capability that a contract may ask for, and what it means.
CAPABILITIES: Mapping[str, str] = {
    "broadcast_axes": "dropout takes broadcast_axes",
    "windows": "dropout takes global_shape and start",
    "mask": "dropout takes return_mask",
    "gradient": "gradient(...) differentiates dropout",
    "layouts": "layouts(x) lays the same values out in memory in other ways",
    "traces": "traces(...) counts how often a compiled mode has been traced",
    "words": "words(...) gives the generator's words",
    "key": "key(...) folds integers and strings into a key",
    "traced_key": "traced_key(...) folds an array into a key",
    "layer": "layer(...) makes a layer that counts its calls",
    "layer_gradient": "the layer's vjp(...) differentiates a training call",
}


class Layer(Protocol):
    """A layer that counts its training calls."""

    calls: Any

    def __call__(self, x: Any, *, training: bool) -> Any:
        """Apply the layer to one of the backend's arrays."""

    def save(self) -> bytes:
        """Return the layer's state as the framework writes it to a file."""

    def load(self, state: bytes) -> None:
        """Restore what another layer's `save` returned."""

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Apply the layer in training; with the capability "layer_gradient".

        Returns
        -------
        y, pullback
            The output, and a function of an upstream gradient that runs the backward pass, with
            whatever that computes again, and returns the gradient with respect to x.
        """


@runtime_checkable
class Backend(Protocol):
    """How to reach one implementation of dropout.

    Attributes
    ----------
    name : str
        What the matrix calls it.
    modes : sequence of str
        Ways in which it runs, such as "eager" and "compiled".
    devices : sequence of str
        Where it runs on this machine.
    compiled_modes : sequence of str
        Those of modes that trace and compile; with the capability "traces".
    derived_modes : mapping of str to str
        For a compiled mode that runs what another does in something around it, such as a
        checkpoint, that other. It has the contracts too, but those that look closer at what decides
        about an element only if the other has not.
    missing_modes : mapping of str to str
        Ways in which the framework runs and this backend can't, each with the reason.
    capabilities : mapping of str to str or None
        For each of `CAPABILITIES` that it has, None; for one it lacks, why. One that is not
        mentioned is lacking without a reason.
    mode_exclusions : mapping of str to mapping of str to str
        For a mode, which capabilities or contracts, by name, do not apply in it, each with the reason.
    step_limit : int
        Steps are below this: 2^64, unless they are an array's or a layer's narrower integers.
    """

    name: str
    modes: Sequence[str]
    compiled_modes: Sequence[str]
    derived_modes: Mapping[str, str]
    missing_modes: Mapping[str, str]
    devices: Sequence[str]
    capabilities: Mapping[str, str | None]
    mode_exclusions: Mapping[str, Mapping[str, str]]
    step_limit: int

    def dtypes(self, mode: str) -> Sequence[str]:
        """Return the names of the dtypes that a mode takes: float16, bfloat16, float32, ..."""

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Return an array of the backend with the values and dtype of a NumPy one.

        bfloat16 comes as ``ml_dtypes.bfloat16``. Integers and bools come too, to see that dropout
        refuses them; where there are no such arrays, it is refused here.
        """

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Return the NumPy array of a backend's, bfloat16 as ``ml_dtypes.bfloat16``."""

    def get_device(self, y: Any) -> str:
        """Return which of `devices` an array is on."""

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Return dropout of x under ``Key(seed).fold_in(step)``.

        ``options`` are ``training=`` and, as capabilities allow, ``broadcast_axes=``,
        ``global_shape=`` with ``start=``, and ``return_mask=``, as `unidrop.dropout` has them. In
        compiled modes the step has to be an argument of what is compiled, not a constant.
        """


class BaseBackend:
    """What most backends have in common: they run eagerly, on the CPU, on float32.

    A subclass has to define ``name``, ``from_numpy``, ``to_numpy`` and ``dropout``, and overrides
    what it has more of.

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
    mode_exclusions: Mapping[str, Mapping[str, str]] = MappingProxyType({})
    step_limit = 1 << 64

    def dtypes(self, mode: str) -> Sequence[str]:
        """Return float32."""
        return ("float32",)

    def get_device(self, y: Any) -> str:
        """Return the only device."""
        return self.devices[0]


class CapableBackend(Backend, Protocol):
    """The methods that capabilities promise, by the capability's name."""

    def gradient(self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str) -> Any:
        """Return the gradient with respect to x, under ``Key(seed).fold_in(step)``."""

    def layouts(self, x: Any) -> Mapping[str, Any]:
        """Return arrays equal to x that lie otherwise in memory, by the layouts' names."""

    def traces(self, mode: str) -> int:
        """Return how often what a mode compiles has been traced so far."""

    def words(self, counter: Sequence[int], key: Sequence[int], *, mode: str) -> list[int]:
        """Return Philox4x32-10 of a counter (four words) under a key (two), lowest first."""

    def key(self, seed: int, *data: int | str) -> int:
        """Return ``Key(seed)`` with each of data folded in, in order."""

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Return ``Key(seed).fold_in(step)``, step given as one of the backend's arrays."""

    def layer(self, p: float, seed: int, *, dtype: str, device: str, mode: str) -> Layer:
        """Return a new layer, in training call n of which the key is ``Key(seed).fold_in(n)``."""


def missing_capability(backend: Backend, capability: str, mode: str) -> str | None:
    """Return why a backend lacks a capability in a mode, or None if it has it."""
    reason = backend.capabilities.get(capability, f"{capability} is not declared")
    return reason or backend.mode_exclusions.get(mode, {}).get(capability)


class BackendUnavailableError(Exception):
    """Raised by a backend as it is made, where its library is installed and can't be run.

    Its message says what this machine lacks, such as a GPU. The matrix shows it as untested, which
    is no failure.
    """


@dataclass(frozen=True, slots=True)
class BackendNotRun:
    """Stands in the matrix for a backend that could not be loaded, or has broken down.

    Attributes
    ----------
    name : str
    error : str
        What was raised, in a line; or that it is untested, and why.
    details : str
        The traceback.
    is_missing : bool
        Whether its library just is not installed, or can't be run on this machine; anything else
        is a failure.
    """

    name: str
    error: str
    details: str = ""
    is_missing: bool = False

    @classmethod
    def from_error(cls, name: str, error: BaseException, own: str = "") -> Self:
        """Return what stands for a backend, the loading of which raised an error.

        A module that is not found is a library that is not installed, unless it is the backend's
        own, of a package that names a wrong one.
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
    """Load the registered backends, or those named, in the order of their names.

    Yields
    ------
    Backend or BackendNotRun
        The latter for one whose library is not installed, that can't be run on this machine, or
        that is broken in any way, so that the others still run.

    Raises
    ------
    ValueError
        If a name is not registered; says which are.
    """
    for name in backend_names(names):
        points = entry_points_named(name)
        try:
            yield _loaded(points)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # even one that exits must not take the others with it
            yield BackendNotRun.from_error(name, error, own=points[0].module)


def backend_names(names: Sequence[str] = ()) -> list[str]:
    """Return the names of the registered backends, or those given, in order and each once.

    Raises
    ------
    ValueError
        If a name is not registered; says which are.
    """
    known = {point.name for point in _entry_points()}
    for name in names:
        if name not in known:
            raise ValueError(
                f"backend has to be one of {', '.join(sorted(known))}, but got {name!r}"
            )
    return sorted(set(names) or known)


def entry_points_named(name: str) -> list[EntryPoint]:
    """Return the entry points of a name: one, unless packages disagree on whose it is."""
    return [point for point in _entry_points() if point.name == name]


def _entry_points() -> Iterable[EntryPoint]:
    return entry_points(group="unidrop.backends")


def _loaded(points: Sequence[EntryPoint]) -> Backend:
    """Return the backend of an entry point, checked to be one."""
    if len({point.value for point in points}) > 1:
        raise ValueError(f"several backends have this name: {[point.value for point in points]}")
    backend = points[0].load()()
    if not isinstance(backend, Backend):
        members = (*Backend.__annotations__, *(n for n in vars(Backend) if not n.startswith("_")))
        missing = [member for member in members if not hasattr(backend, member)]
        raise TypeError(f"it lacks {', '.join(missing)}: see unidrop.conformance.Backend")
    if backend.name != points[0].name:
        raise ValueError(f"name has to be that of the entry point, but got {backend.name!r}")
    if not callable(backend.dtypes):
        raise TypeError(f"dtypes has to be a method of a mode, but got {backend.dtypes!r}")
    empty = [mode for mode in backend.modes if not backend.dtypes(mode)]
    if empty or not backend.modes or not backend.devices:
        raise ValueError("a backend has to have a mode, a device, and in each mode a dtype")
    for name in ("capabilities", "mode_exclusions", "missing_modes", "derived_modes"):
        if not isinstance(getattr(backend, name), Mapping):
            raise TypeError(f"{name} has to be a mapping, but got {getattr(backend, name)!r}")
    _check_modes(backend)
    _check_capabilities(backend)
    return backend


def _check_capabilities(backend: Backend) -> None:
    """Raise ValueError for a capability that there is not, or that lacks its method."""
    unknown = [name for name in backend.capabilities if name not in CAPABILITIES]
    if unknown:
        raise ValueError(f"capabilities has to name {', '.join(CAPABILITIES)}, but got {unknown}")
    for name, reason in backend.capabilities.items():
        if reason == "":
            raise ValueError(
                f"capabilities has to say why {name} is lacking, but got an empty reason"
            )
        method = CAPABILITIES[name].partition("(")[0]
        if reason is None and method == name and not hasattr(backend, name):
            raise ValueError(f"capabilities declares {name}, but there is no method {name}")


def _check_modes(backend: Backend) -> None:
    """Raise ValueError for what would be passed over without a word, such as a misspelt mode."""
    if len(set(backend.modes)) != len(backend.modes):
        raise ValueError(f"modes has to name each mode once, but got {tuple(backend.modes)}")
    for name in ("compiled_modes", "mode_exclusions"):
        unknown = [mode for mode in getattr(backend, name) if mode not in backend.modes]
        if unknown:
            raise ValueError(f"{name} has to name modes, but got {unknown}")
    check_derived_modes(backend)
    both = [mode for mode in backend.missing_modes if mode in backend.modes]
    if both:
        raise ValueError(f"missing_modes has to name other modes than modes, but got {both}")


def check_derived_modes(backend: Backend) -> None:
    """Raise ValueError where a variant, or what it is one of, is no compiled mode by itself."""
    compiled = [mode for mode in backend.compiled_modes if mode not in backend.derived_modes]
    for mode, base in backend.derived_modes.items():
        if mode not in backend.compiled_modes or base not in compiled:
            raise ValueError(
                f"derived_modes has to map a compiled mode to one that is no variant, such as "
                f"{compiled}, but got {mode!r}: {base!r}"
            )
