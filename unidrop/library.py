"""The registry: finds the `ArrayLibrary` of an array by its type.

Requirements this design meets:

* The core imports no framework and names none. The entry-point group ``unidrop.libraries`` maps the
  top-level module of an array class to an `ArrayLibrary`. It is loaded when the first such array
  arrives.
* A library that follows the standard, through array-api-compat or by itself, needs no entry.
* The second lookup of a type is one dictionary access, and a cached type can still be freed.
"""

import sys
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import array_api_compat

from unidrop.protocols import ArrayLibrary
from unidrop.threads import fork_guard

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["get_library", "get_namespace_library"]

_NOT_AN_ARRAY = (
    "{name} must be an array of a library that follows the array API standard or has an adapter, "
    "got {kind}"
)


# Classes that are attributes of a module live as long as it does. Compilers can trace this
# dictionary, but not a weak one.
_by_type: dict[type, ArrayLibrary] = {}
_by_local_type: WeakKeyDictionary[type, ArrayLibrary] = WeakKeyDictionary()


def get_library(x: Any, name: str = "x") -> ArrayLibrary:
    """Return the library of an array.

    Raises
    ------
    TypeError
        If x is not an array of a registered library or of one that follows the standard; names the
        argument.
    """
    library = _by_type.get(type(x))
    return _look_up(x, name) if library is None else library


def get_namespace_library(xp: Any) -> tuple[ArrayLibrary, Any]:
    """Return the library of a module of array functions, and the namespace that the core uses.

    Examples
    --------
    >>> import numpy
    >>> _, xp = get_namespace_library(numpy)
    >>> xp.__name__ == "array_api_compat.numpy"
    True
    """
    if not hasattr(xp, "zeros"):
        raise TypeError(f"xp must be an array namespace such as numpy, got {xp!r}")
    probe = xp.zeros((0,))
    library = get_library(probe, "xp.zeros((0,))")
    return library, library.arrays.namespace(probe)


def _look_up(x: Any, name: str) -> ArrayLibrary:
    kind = type(x)
    library = _by_local_type.get(kind)
    if library is None:
        library = _find(x, name)
        library.arrays.check_type(kind, name)
        module = sys.modules.get(kind.__module__)
        if getattr(module, kind.__qualname__, None) is kind:
            _by_type[kind] = library
        else:
            _by_local_type[kind] = library
    return library


def _find(x: Any, name: str) -> ArrayLibrary:
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        raise _not_an_array(x, name)
    for base in type(x).__mro__:
        point = _registered().get(base.__module__.partition(".")[0])
        if point is not None:
            with fork_guard:
                # Frameworks that transform the source of traced code warn of point.load().
                __import__(point.module)
                library: ArrayLibrary = attrgetter(point.attr)(sys.modules[point.module])
            return library
    # A proxy has the attributes of its array, but is not an array.
    is_proxy = hasattr(x, "__array_namespace__") and not hasattr(type(x), "__array_namespace__")
    if array_api_compat.is_array_api_obj(x) and not is_proxy:
        # One for each type: dtypes of two libraries then never meet in a cache, where some of them
        # warn of the comparison.
        return ArrayLibrary()
    raise _not_an_array(x, name)


def _not_an_array(x: Any, name: str) -> TypeError:
    hint = f": pass {name}.to_numpy()" if hasattr(x, "to_numpy") else ""
    return TypeError(_NOT_AN_ARRAY.format(name=name, kind=type(x).__name__) + hint)


@cache
def _registered() -> "dict[str, EntryPoint]":
    # Importing this takes a third of NumPy's own import time, so it waits for the first array.
    with fork_guard:
        from importlib.metadata import entry_points

        return {point.name: point for point in entry_points(group="unidrop.libraries")}
