"""Call numbers: a call that raises takes back its own number only, and forks find the lock free."""

import os
import subprocess
import sys

import numpy as np
import pytest

from unidrop import Key
from unidrop.adapters.calls import run_counted


class Counter:
    """A call number that takes itself back as layers do."""

    def __init__(self):
        self.calls = 0

    def take(self):
        self.calls += 1
        return self.calls - 1

    def roll_back(self, number):
        if self.calls == number + 1:
            self.calls = number


def test_takes_back_the_number_of_a_call_that_raises():
    counter = Counter()
    with pytest.raises(ZeroDivisionError):
        run_counted(counter.take, counter.roll_back, lambda number: 1 / number)
    assert counter.calls == 0


def make_torch_layer():
    import torch

    from unidrop.adapters.torch import Dropout

    return Dropout(0.5, seed=1), lambda layer: layer(torch.ones(64)).numpy()


def make_keras_layer():
    from unidrop.adapters.keras import Dropout

    layer = Dropout(0.5, seed=1)
    return layer, lambda layer: np.asarray(layer(np.ones(64, "float32"), training=True))


def make_flax_layer():
    import jax

    from unidrop.adapters.flax import Dropout

    return Dropout(0.5, seed=1), lambda layer: np.asarray(layer(jax.numpy.ones(64)))


LAYERS = {"torch": make_torch_layer, "keras": make_keras_layer, "flax": make_flax_layer}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_skips_the_number_of_a_failed_call_that_a_later_call_followed(make, monkeypatch):
    layer, drop = make()
    fold_in, masks = Key.fold_in, []

    def fail_after_another_call(key, data):
        monkeypatch.setattr(Key, "fold_in", fold_in)
        masks.append(drop(layer))
        raise MemoryError

    monkeypatch.setattr(Key, "fold_in", fail_after_another_call)
    with pytest.raises(MemoryError):
        drop(layer)
    masks.append(drop(layer))
    assert not np.array_equal(*masks)
    assert int(layer.calls) == 3


@pytest.mark.parametrize("make", [make_keras_layer, make_flax_layer], ids=["keras", "flax"])
def test_converts_a_seed_that_is_set_and_refuses_the_name_key(make):
    layer, drop = make()
    expected = drop(make()[0])
    layer.seed = 1
    assert layer.seed == Key(1)
    np.testing.assert_array_equal(drop(layer), expected)
    with pytest.raises(TypeError, match="seed must be an integer"):
        layer.seed = "a"
    with pytest.raises(AttributeError, match=r"seed|setter"):
        layer.key = Key(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_frees_the_lock_of_call_numbers_in_a_forked_child():
    code = """
import os, sys, threading
from unidrop.adapters.calls import COUNTING, run_counted
held, done = threading.Event(), threading.Event()
def hold():
    with COUNTING:
        held.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    os._exit(run_counted(lambda: 7, lambda number: None, lambda number: number))
done.set()
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    assert subprocess.run(run, timeout=60, check=False).returncode == 7
