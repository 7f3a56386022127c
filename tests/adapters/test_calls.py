"""Call numbers under errors, threads, finalizers and forks."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from unidrop import Key
from unidrop.adapters.calls import run_counted


class Counter:
    """A call number that takes itself back as layers do."""

    def __init__(self, meanwhile=lambda: None):
        self.calls = 0
        self.meanwhile = meanwhile

    def call(self, function=lambda number: number):
        return run_counted(Counter.take, roll_back, function, self)

    def take(self):
        number = self.calls
        self.meanwhile()
        self.calls = number + 1
        return number


def roll_back(number, counter):
    if counter.calls == number + 1:
        counter.meanwhile()
        counter.calls = number


def test_takes_back_the_number_of_a_call_that_raises():
    counter = Counter()
    with pytest.raises(ZeroDivisionError):
        counter.call(lambda number: 1 / number)
    assert counter.calls == 0


def run_in_thread(function):
    """Call a function in a thread that may hang, and return its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(30)
    assert results, "the call hangs or raises"
    return results[0]


def test_counts_another_layer_in_finalizer_during_count():
    class Finalized:
        def __del__(self):
            numbers.append(other.call())

    numbers, other = [], Counter()
    counter = Counter(Finalized)
    assert run_in_thread(lambda: [counter.call(), counter.call()]) == [0, 1]
    assert numbers == [0, 1]


def test_raises_if_finalizer_counts_the_same_call_number():
    def call_again():
        counter.meanwhile = lambda: None
        with pytest.raises(RuntimeError, match="use the function with a key"):
            counter.call()
        refused.append(1)

    def fail(number):
        counter.meanwhile = call_again
        raise MemoryError

    refused, counter = [], Counter(call_again)
    assert run_in_thread(lambda: [counter.call(), counter.call()]) == [0, 1]
    with pytest.raises(MemoryError):
        counter.call(fail)
    assert (refused, counter.calls) == ([1, 1], 2)


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
def test_counts_in_child_of_fork_during_count():
    code = """
import os, sys, threading, time
from unidrop.adapters.calls import run_counted, run_exclusively
held = threading.Event()
def count(take):
    return run_counted(take, lambda number, owner: None, lambda number: number, object())
def hold():
    held.set()
    time.sleep(0.2)
def finish(child):
    if child == 0:
        os._exit(count(lambda owner: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
thread = threading.Thread(target=lambda: run_exclusively(None, hold))
thread.start()
held.wait()
finish(os.fork())
finish(count(lambda owner: os.fork()))  # as a signal handler in the middle of a count
"""
    run = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    assert subprocess.run(run, timeout=60, check=False).returncode == 0
