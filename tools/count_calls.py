"""Count the Python calls inside unidrop, and how many of them cross from one file to another.

Each entry drops half of a (32, 128) ``float32`` array through a framework's public interface:

    python tools/count_calls.py                     # every entry, as a table
    python tools/count_calls.py numpy jax-jit       # these entries
    python tools/count_calls.py --files jax-jit     # and the calls across files, as a tree

A call counts if its code belongs to the package; resuming a generator is a call too. A call
crosses if its caller, skipping frames of other packages, is in another file or outside the package.
Each entry warms up first. A tracing entry then retraces in a warm process, as users do when the
shape of an input changes.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import numpy as np

import unidrop
import unidrop.adapters
from unidrop import Key

SHAPE = (32, 128)
OTHER_SHAPE = (7, 5)
KEY = Key(42)

Run = Callable[[], object]
Call = tuple[int, CodeType]  # the number of package frames above it, and its code


def _numpy() -> tuple[Run, Run]:
    from unidrop.adapters.numpy import dropout

    x = np.ones(SHAPE, np.float32)
    return (lambda: dropout(x, 0.5, key=KEY),) * 2


def _torch() -> tuple[Run, Run]:
    import torch

    from unidrop.adapters.torch import Dropout

    layer, x = Dropout(0.5, seed=KEY), torch.ones(SHAPE, requires_grad=True)
    return (lambda: layer(x),) * 2


def _torch_functional() -> tuple[Run, Run]:
    import torch

    from unidrop.adapters.torch import dropout

    x = torch.ones(SHAPE, requires_grad=True)
    return (lambda: dropout(x, 0.5, key=KEY),) * 2


def _torch_compile() -> tuple[Run, Run]:
    import torch

    from unidrop.adapters.torch import Dropout

    layer = torch.compile(Dropout(0.5, seed=KEY))
    x = torch.ones(SHAPE, requires_grad=True)
    return (lambda: layer(x),) * 2


def _tensorflow() -> tuple[Run, Run]:
    import tensorflow as tf

    from unidrop.adapters.tensorflow import dropout

    x = tf.ones(SHAPE)
    return (lambda: dropout(x, 0.5, key=KEY),) * 2


def _tensorflow_function() -> tuple[Run, Run]:
    import tensorflow as tf

    from unidrop.adapters.tensorflow import dropout

    drop = tf.function(lambda x, step: dropout(x, 0.5, key=KEY.fold_in(step)), autograph=False)
    step = tf.constant(0)
    return lambda: drop(tf.ones(OTHER_SHAPE), step), lambda: drop(tf.ones(SHAPE), step)


def _keras() -> tuple[Run, Run]:
    import tensorflow as tf

    from unidrop.adapters.keras import Dropout

    layer, x = Dropout(0.5, seed=KEY), tf.ones(SHAPE)
    return (lambda: layer(x, training=True),) * 2


def _keras_function() -> tuple[Run, Run]:
    import tensorflow as tf

    from unidrop.adapters.keras import Dropout

    layer = Dropout(0.5, seed=KEY)
    drop = tf.function(lambda x: layer(x, training=True), autograph=False)
    return lambda: drop(tf.ones(OTHER_SHAPE)), lambda: drop(tf.ones(SHAPE))


def _jax() -> tuple[Run, Run]:
    from jax import numpy as jnp

    from unidrop.adapters.jax import dropout

    x = jnp.ones(SHAPE)
    return (lambda: dropout(x, 0.5, KEY),) * 2


def _jax_jit() -> tuple[Run, Run]:
    import jax
    from jax import numpy as jnp

    from unidrop.adapters.jax import dropout

    drop = jax.jit(lambda x, step: dropout(x, 0.5, KEY.fold_in(step)))
    return lambda: drop(jnp.ones(OTHER_SHAPE), 0), lambda: drop(jnp.ones(SHAPE), 0)


def _flax_jit() -> tuple[Run, Run]:
    from flax import nnx
    from jax import numpy as jnp

    from unidrop.adapters.flax import Dropout

    layer = Dropout(0.5, seed=KEY)
    drop = nnx.jit(lambda layer, x: layer(x))
    return lambda: drop(layer, jnp.ones(OTHER_SHAPE)), lambda: drop(layer, jnp.ones(SHAPE))


# From an entry's name to its description, and a maker of two functions: to warm up, and to count.
ENTRIES: dict[str, tuple[str, Callable[[], tuple[Run, Run]]]] = {
    "numpy": ("NumPy, fused", _numpy),
    "torch": ("torch layer, eager forward", _torch),
    "torch-functional": ("torch function, eager forward", _torch_functional),
    "torch-compile": ("torch.compile, each call", _torch_compile),
    "tensorflow": ("TensorFlow, eager", _tensorflow),
    "tensorflow-function": ("TensorFlow tf.function, one trace", _tensorflow_function),
    "keras": ("Keras layer, eager", _keras),
    "keras-function": ("Keras tf.function, one trace", _keras_function),
    "jax": ("JAX, eager", _jax),
    "jax-jit": ("JAX jit, one trace", _jax_jit),
    "flax-jit": ("Flax nnx.jit, one trace", _flax_jit),
}

_ROOTS = tuple(os.path.join(path, "") for path in [*unidrop.__path__, *unidrop.adapters.__path__])


def record(run: Run) -> list[Call]:
    """Run a function, and return the calls inside the package in their order."""
    calls: list[Call] = []
    depth = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth
        if event in ("call", "return") and frame.f_code.co_filename.startswith(_ROOTS):
            if event == "call":
                calls.append((depth, frame.f_code))
            depth += 1 if event == "call" else -1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def crossings(calls: list[Call]) -> list[tuple[Call, bool]]:
    """Return each call, and whether its caller is in another file."""
    above: list[str] = []
    found = []
    for depth, code in calls:
        del above[depth:]
        found.append(((depth, code), not above or above[-1] != code.co_filename))
        above.append(code.co_filename)
    return found


def print_files(calls: list[Call]) -> None:
    """Print the crossings as a tree of files and functions, and the functions called most."""
    indents: list[int] = []
    for (depth, code), crosses in crossings(calls):
        del indents[depth:]
        indent = indents[-1] if indents else -1
        if crosses:
            indent += 1
            print("  " * indent + f"{_short(code)}:{code.co_firstlineno} {code.co_qualname}")
        indents.append(indent)
    print("called most:")
    for code, count in Counter(code for _, code in calls).most_common(12):
        print(f"  {count:3} {_short(code)} {code.co_qualname}")


def _short(code: CodeType) -> str:
    path = Path(code.co_filename)
    return path.relative_to(Path(unidrop.__path__[0]).parent).as_posix()


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entry", nargs="*", help=f"of {', '.join(ENTRIES)} (default: all)")
    parser.add_argument("--files", action="store_true", help="print the tree of crossings")
    arguments = parser.parse_args()
    if unknown := set(arguments.entry) - set(ENTRIES):
        parser.error(f"entry must be one of {', '.join(ENTRIES)}, got {', '.join(sorted(unknown))}")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    print("| entry | Python calls | file crossings |\n|---|---|---|")
    for name in arguments.entry or ENTRIES:
        description, make = ENTRIES[name]
        warm_up, run = make()
        for _ in range(3):
            warm_up()
        calls = record(run)
        print(f"| {description} | {len(calls)} | {sum(new for _, new in crossings(calls))} |")
        if arguments.files:
            print_files(calls)


if __name__ == "__main__":
    main()
