"""What the tests of Keras share with every backend."""

import warnings

import pytest
from keras_models import BACKEND


@pytest.fixture
def quick_torch_compile(monkeypatch):
    """Let torch.compile skip code generation, which takes Inductor a minute.

    Dynamo warns that Keras reads gradients, which it cannot trace.
    """
    if BACKEND != "torch":
        yield
        return
    import torch

    own = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: own(*a, **k, backend="aot_eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
