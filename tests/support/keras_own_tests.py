"""A pytest plugin that replaces Keras's own layers by ours, for Keras's own tests."""

from typing import Any

import keras.src.layers
import pytest

from unidrop.adapters import keras as ours

# Our layers, and the files of Keras's tests for each.
FILES = {
    "AlphaDropout": "alpha_dropout_test.py",
    "Dropout": "dropout_test.py",
    **{f"SpatialDropout{n}D": "spatial_dropout_test.py" for n in (1, 2, 3)},
    "LSTM": "lstm_test.py",
    "GRU": "gru_test.py",
    "SimpleRNN": "simple_rnn_test.py",
}

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


for _name in FILES:
    setattr(keras.src.layers, _name, _replaced(_name))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if Keras tests a layer but its tests made none of our replacements."""
    tested = {item.path.name for item in session.items}
    if tested and made != {name for name, file in FILES.items() if file in tested}:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
