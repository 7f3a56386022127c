"""A backend that depends on environment variables, which its own process has from the start.

Some frameworks read the environment once, when they are imported: Keras chooses its backend and JAX
its devices. An entry point can therefore be a `SubprocessBackend`, which names the backend's class
without importing it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name

from unidrop.conformance.backend import Backend, BackendUnavailableError, entry_points_named

__all__ = ["SubprocessBackend", "needs_own_process"]


@dataclass(frozen=True)
class SubprocessBackend:
    """An entry point that declares the environment of its backend's process.

    The matrix starts a process with these variables. Anywhere else, the backend loads only if the
    process already has the required ones.

    Attributes
    ----------
    name : str
        The name of the entry point, which becomes the backend's.
    target : str
        The backend's class, as ``"package.module:Class"``.
    environment : mapping of str to str
        Required variables: with other values it would be another backend.
    defaults : mapping of str to str
        Variables for the matrix's process, unless the user has set them.

    Raises
    ------
    BackendUnavailableError
        By a call, if this process lacks a required variable.

    Examples
    --------
    >>> keras_jax = SubprocessBackend(
    ...     "keras-jax",
    ...     "unidrop.conformance.backends.keras:Keras",
    ...     environment={"KERAS_BACKEND": "jax"},
    ... )
    >>> keras_jax.full_environment()["KERAS_BACKEND"]
    'jax'
    """

    name: str
    target: str
    environment: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    def __call__(self) -> Backend:
        """Return the backend."""
        if not self.fits:
            needed = " ".join(f"{name}={value}" for name, value in self.environment.items())
            raise BackendUnavailableError(
                f"it needs a process with {needed}: run unidrop conformance --backend {self.name}"
            )
        backend: Backend = resolve_name(self.target)()
        backend.name = self.name
        return backend

    @property
    def fits(self) -> bool:
        """Whether this process has the required variables."""
        return _strings(self.environment).items() <= os.environ.items()

    def full_environment(self) -> dict[str, str]:
        """Return all variables of the backend's own process."""
        return {**_strings(self.defaults), **os.environ, **_strings(self.environment)}


def needs_own_process(name: str) -> SubprocessBackend | None:
    """Return the entry point of a registered backend that does not fit this process, or None."""
    try:
        loaded = entry_points_named(name)[0].load()
    except Exception:  # load_backends reports it
        return None
    return loaded if isinstance(loaded, SubprocessBackend) and not loaded.fits else None


def _strings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables as the environment will hold them, which may be paths."""
    return {name: str(value) for name, value in environment.items()}
