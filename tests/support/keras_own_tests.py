"""A pytest plugin that replaces Keras's own layers by ours, for Keras's own tests."""

from pathlib import Path
from typing import Any

import keras.src.layers
import pytest

from unidrop.adapters import keras as ours

NAMES = ["AlphaDropout", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D"]

made: set[str] = set()


def _replaced(name: str) -> type:
    layer = getattr(ours, name)
    assert issubclass(layer, getattr(keras.src.layers, name))
    init = layer.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.add(name)
        init(self, *args, **kwargs)

    layer.__init__ = counted
    return layer


for _name in NAMES:
    setattr(keras.src.layers, _name, _replaced(_name))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if Keras tests a layer but its tests made none of our replacements."""
    if session.testscollected and made != {name for name in NAMES if _is_tested(session, name)}:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _is_tested(session: pytest.Session, name: str) -> bool:
    file = {"AlphaDropout": "alpha_dropout_test", "Dropout": "dropout_test"}
    expected = file.get(name, "spatial_dropout_test")
    return any(Path(item.path).stem == expected for item in session.items)
