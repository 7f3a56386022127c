"""Docstrings of every module: there is one, its names exist, and its examples are right."""

import doctest
import importlib
import pkgutil

import pytest

import unidrop
import unidrop.adapters

MODULES = sorted(
    module.name
    for package in (unidrop, unidrop.adapters)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")
def test_has_docstrings_with_correct_examples(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("cupy", "triton"):  # which the extra "test" lacks
            raise
        pytest.skip(str(error))
    assert module.__doc__
    for exported in getattr(module, "__all__", ()):
        assert hasattr(module, exported)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
