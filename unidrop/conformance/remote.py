"""A backend in a process of its own.

Some frameworks are one thing a process: Keras has one backend, JAX one set of devices, each chosen
by the environment before the import. To have several of them in one matrix, all but one have to
live elsewhere. The matrix has a process for each backend, and there they need no other.
"""

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from unidrop.conformance.backend import Backend, entry_points_named
from unidrop.conformance.process import Process, forwarded, made

__all__ = ["BACKEND_ENV_VAR", "RemoteBackend", "get_environment"]

#: The variable of the environment that names the backend which has a process to itself.
BACKEND_ENV_VAR = "UNIDROP_MATRIX_BACKEND"

# What a backend says of itself, beside its name.
_ATTRIBUTES = tuple(name for name in Backend.__annotations__ if name != "name")


class RemoteBackend:
    """A backend whose calls run in a process of its own.

    A subclass defines the three class attributes; everything else is what the backend says there.

    Attributes
    ----------
    name : str
        What the matrix calls it.
    target : str
        The backend's class, as ``"package.module:Class"``.
    environment : mapping of str to str
        The variables of the environment that differ from this process's.

    Raises
    ------
    Exception
        On construction, what loading the backend raises there: a `ModuleNotFoundError` where its
        library is not installed, an `BackendUnavailableError` where it can't be run on this machine.
    """

    name: str
    target: ClassVar[str]
    environment: ClassVar[Mapping[str, str]]

    modes: Sequence[str]
    compiled_modes: Sequence[str]
    derived_modes: Mapping[str, str]
    missing_modes: Mapping[str, str]
    devices: Sequence[str]
    capabilities: Mapping[str, str | None]
    mode_exclusions: Mapping[str, Mapping[str, str]]
    step_limit: int

    _number = 0

    def __init__(self) -> None:
        self._process = self._begun()
        for attribute in _ATTRIBUTES:
            setattr(self, attribute, self._process.call(0, "__getattribute__", (attribute,), {}))

    def _begun(self) -> "Process | _Here":
        """Return what makes the calls: another process, unless this one is the backend's own."""
        needed = {**_variables(self.environment), BACKEND_ENV_VAR: self.name}
        if needed.items() <= os.environ.items():
            return _Here(self.target)
        process = Process(f"backend {self.name}", self.target, self.environment)
        weakref.finalize(self, process.stop)
        return process

    dtypes = forwarded("dtypes")
    from_numpy = forwarded("from_numpy")
    to_numpy = forwarded("to_numpy")
    get_device = forwarded("get_device")
    dropout = forwarded("dropout")
    gradient = forwarded("gradient")
    layouts = forwarded("layouts")
    traces = forwarded("traces")
    words = forwarded("words")
    key = forwarded("key")
    traced_key = forwarded("traced_key")
    layer = forwarded("layer")


class _Here:
    """Makes the calls in this process."""

    def __init__(self, target: str) -> None:
        self._backend = made(target)

    def call(
        self, number: int, method: str, args: Sequence[Any], options: Mapping[str, Any]
    ) -> Any:
        """Call a method of the only object there is."""
        return getattr(self._backend, method)(*args, **options)


def get_environment(name: str) -> dict[str, str]:
    """Return the variables that a registered backend needs its process to begin with.

    What its entry point may raise is raised here.
    """
    loaded = entry_points_named(name)[0].load()
    is_remote = isinstance(loaded, type) and issubclass(loaded, RemoteBackend)
    return _variables(loaded.environment) if is_remote else {}


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables as an environment has them: plain strings, also of paths and of an enum."""
    return {name: str.__str__(os.fspath(value)) for name, value in environment.items()}
