"""Test the matrix: change one place of a second route at a time, and see whether it turns red.

    python tests/mutation/routes.py --list                   # the mutants, and run none
    python tests/mutation/routes.py                          # run all mutants
    python tests/mutation/routes.py --only jax --only fold   # run those whose group or name matches

A second route computes what a simpler one computes too, in less time: the kernels, plain calls, the
compiled `fold_in`, the custom call of JAX, the programs of TensorFlow. The mutants here are made by
hand, and each changes bits, counts or errors that the contracts promise. Each mutant runs in a copy
of the repository that is installed into its own environment, under ``unidrop conformance``. First
the contracts run that should see it, and if they are green, the whole matrix of the backend.

The result of a mutant is "red" if a contract fails, "crash" if the backend's process ends early,
and "timeout" if a contract takes too long: the matrix exits with 1 in all three cases. A mutant
that is "GREEN" shows a promise that the matrix does not test. One that is "broken" keeps the
backend from loading, so it tests nothing.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from mutants import ROOT
from run import Copy

CELL_TIMEOUT = 120  # seconds; the slowest cells take 20
MATRIX_TIMEOUT = 3600


@dataclass(frozen=True)
class RouteMutant:
    """One change of a file: the text ``old``, which must occur once, becomes ``new``.

    ``contracts`` are the names of the contracts that should see it in the matrix of ``backend``.
    """

    group: str
    name: str
    file: str
    old: str
    new: str
    backend: str
    contracts: str

    def read(self, root: Path = ROOT) -> str:
        """Return the text of the file with the change.

        Raises
        ------
        ValueError
            If the file does not contain the old text exactly once.
        """
        source = (root / self.file).read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(
                f"old must occur once in {self.file}, and it occurs {source.count(self.old)} "
                f"times: {self.old!r}, of the mutant {self.name!r}"
            )
        return source.replace(self.old, self.new)


def _make_table() -> list[RouteMutant]:
    return [
        RouteMutant(group, name, file, old, new, backend, contracts)
        for (group, backend), files in _TABLE.items()
        for file, mutants in files.items()
        for name, contracts, old, new in mutants
    ]


_ROUNDS = ("folded rounds", "numpy")
_KERNELS = ("kernels", "numpy")
_FOLD_NUMPY = ("compiled fold_in", "numpy")
_FOLD_TORCH = ("compiled fold_in", "torch")
_FOLD_FLAX = ("compiled fold_in", "flax")
_PLAIN_NUMPY = ("plain calls of NumPy", "numpy")
_PLAIN_TORCH = ("plain calls of PyTorch", "torch")
_CALLS_TORCH = ("call numbers of PyTorch", "torch")
_FRAME = ("custom call of JAX", "jax")
_TENSORFLOW = ("routes of TensorFlow", "tensorflow")
_KERAS = ("call numbers of Keras", "keras")
_ATTENTION_TORCH = ("attention of PyTorch", "torch")
_ATTENTION_JAX = ("attention of JAX", "jax")
_MEMBERS = ("members of the family", "numpy")
_MEMBERS_TORCH = ("members in PyTorch", "torch")

# By group and backend, then by file: the name, the contracts, the old and the new text.
_TABLE: dict[tuple[str, str], dict[str, list[tuple[str, str, str, str]]]] = {
    _MEMBERS: {
        "unidrop/family.py": [
            (
                "alpha dropout has the scale of dropout",
                "family-alpha-dropout",
                "scale = 1 / math.sqrt((1 - p) * (1 + p * _SELU_LIMIT**2))",
                "scale = 1 / (1 - p)",
            ),
            (
                "scores are filled with the largest negative number",
                "family-drop-key",
                "shift=0.0, fill=-math.inf",
                "shift=0.0, fill=-3e38",
            ),
            (
                "locked dropout locks the axis after the one of time",
                "family-locked-dropout",
                "axes = (checked_axis(axis, x.shape),)",
                "axes = ((checked_axis(axis, x.shape) + 1) % len(x.shape),)",
            ),
            (
                "whole rows of features are dropped",
                "family-feature-alpha-dropout",
                "axes = tuple(range(2, len(x.shape)))",
                "axes = tuple(range(1, len(x.shape)))",
            ),
        ],
        "unidrop/drop_block.py": [
            (
                "blocks are longer by one",
                "family-drop-block",
                "shape[axis] = self.block_size - 1",
                "shape[axis] = self.block_size",
            ),
            (
                "the rate of corners ignores the border",
                "family-drop-block",
                "gamma = rate.p * math.prod(lengths) / (size ** len(spatial) * places)",
                "gamma = rate.p / size ** len(spatial)",
            ),
            (
                "kept elements are scaled by the rate",
                "family-drop-block",
                "ratio = total / xp.astype(kept, dtype)",
                "ratio = xp.astype(kept, dtype) / total",
            ),
        ],
        "unidrop/permutation.py": [
            (
                "permutations have the words of normal deviates",
                "family-patch-dropout",
                "PERMUTATION_TAG: Final = 4",
                "PERMUTATION_TAG: Final = 3",
            ),
            (
                "kept tokens do not begin after the prefix",
                "family-patch-dropout",
                "* length + self.prefix",
                "* length",
            ),
            (
                "the last tokens of permutations are kept",
                "family-patch-dropout",
                "[:, : self.kept]",
                "[:, -self.kept :]",
            ),
        ],
        "unidrop/normal.py": [
            (
                "the sign of the deviates is lost",
                "family-gaussian-dropout family-gaussian-noise",
                "return xp.where(is_positive, size, -size)",
                "return size",
            ),
            (
                "deviates are not interpolated",
                "family-gaussian-dropout family-gaussian-noise",
                "return xp.take(table, entry, axis=0) - fall",
                "return xp.take(table, entry, axis=0)",
            ),
            (
                "the tails have one level less",
                "family-gaussian-dropout family-gaussian-noise",
                "for _ in range(1, _LEVELS):",
                "for _ in range(2, _LEVELS):",
            ),
        ],
        "unidrop/gaussian.py": [
            (
                "the variance is the rate",
                "family-gaussian-dropout",
                "math.sqrt(rate.p / (1 - rate.p))",
                "math.sqrt(rate.p)",
            ),
        ],
    },
    _MEMBERS_TORCH: {
        "adapters/torch/family/sequences.py": [
            (
                "batch_first is ignored",
                "family-locked-dropout",
                "return 1 if batch_first and input.dim() == 3 else 0",
                "return 0",
            ),
        ],
        "adapters/torch/family/drop_block.py": [
            (
                "blocks extend along the channels",
                "family-drop-block",
                '"axes": tuple(range(2, spatial + 2)), "clip": True',
                '"axes": tuple(range(1, spatial + 1)), "clip": True',
            ),
        ],
    },
    _ATTENTION_TORCH: {
        "adapters/torch/chunked.py": [
            (
                "the mask restarts in each tile of keys",
                "attention-output",
                "start=(*first, row + rows.start, column + columns.start),",
                "start=(*first, row + rows.start, column),",
            ),
            (
                "the mask ignores the window's first query",
                "attention-windows",
                "start=(*first, row + rows.start, column + columns.start),",
                "start=(*first, rows.start, column + columns.start),",
            ),
            (
                "the softmax adds up the weights after dropout",
                "attention-output",
                """                total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
                weights = tiles.drop(weights, rows, columns, inplace=True)
""",
                """                weights = tiles.drop(weights, rows, columns, inplace=True)
                total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
""",
            ),
            (
                "the causal diagonal ignores the window",
                "attention-windows",
                "difference: Any = self.start[-2] - self.start[-1]",
                "difference: Any = 0",
            ),
            (
                "the gradient has the weights without dropout",
                "attention-gradient",
                "gradient = tiles.drop(weights, rows, columns, inplace=False)",
                "gradient = weights.clone()",
            ),
        ],
    },
    _ATTENTION_JAX: {
        "adapters/jax/attention.py": [
            (
                "the mask restarts in each block of keys",
                "attention-output",
                "start=(*starts, start + first_of_block),",
                "start=(*starts, start),",
            ),
            (
                "the last block has the mask of the keys after it",
                "attention-output",
                "start=(*starts, start + first_of_block),",
                "start=(*starts, start + first),",
            ),
            (
                "groups and heads change places in the mask",
                "attention-mask",
                "*(batch,) * settings.is_batched, groups * heads, length, count",
                "*(batch,) * settings.is_batched, length, groups * heads, count",
            ),
            (
                "the weights are dropped before they are normalized",
                "attention-output",
                "total = total * decay + weights.sum(-1)",
                "total = total * decay + mixed.sum(-1)",
            ),
        ],
    },
    _ROUNDS: {
        "unidrop/fused/generator.py": [
            (
                "the constant of a folded product has 32 bits",
                "mask",
                "product.constant(i * m for i in range(a.blocks))",
                "product.constant(i * m & MASK32 for i in range(a.blocks))",
            ),
            (
                "the first product of a group has 32 bits",
                "mask",
                "product = (a.first * m).fill(a.blocks)",
                "product = (a.first * m & MASK32).fill(a.blocks)",
            ),
            (
                "the upper halves of lanes enter a product",
                "mask",
                "product = (a & MASK32) * m",
                "product = a * m",
            ),
            (
                "the words of the key change places",
                "mask",
                "philox(counter, (key, key >> 32), VectorWords())",
                "philox(counter, (key >> 32, key), VectorWords())",
            ),
            (
                "two lanes of odd elements change places",
                "mask",
                "[1, 9, 3, 11, 5, 13, 7, 15]",
                "[1, 9, 3, 11, 5, 15, 7, 13]",
            ),
            (
                "words serve four lanes",
                "word-order",
                "shuffle([lane & -2 for lane in",
                "shuffle([lane & -4 for lane in",
            ),
            (
                "the multiplier is of even elements",
                "odd-elements",
                "twice.constant([1, ODD_MULTIPLIER] * BLOCKS)",
                "twice.constant([ODD_MULTIPLIER, 1] * BLOCKS)",
            ),
        ],
        "unidrop/philox.py": [
            (
                "a key increment is lost",
                "mask",
                "keys.append((k0 + first, k1 + second))",
                "keys.append((k0 + first, k1))",
            ),
        ],
    },
    _KERNELS: {
        "unidrop/fused/pieces.py": [
            (
                "the sign of the words is flipped, and of the threshold not",
                "mask",
                'keep = words >= threshold.convert("trunc", I32)',
                'keep = (words ^ 0x80000000) >= threshold.convert("trunc", I32)',
            ),
            (
                "an element at the threshold is dropped",
                "threshold",
                'keep = words >= threshold.convert("trunc", I32)',
                'keep = words >= threshold.convert("trunc", I32) + 1',
            ),
            (
                "kept elements are not scaled",
                "scale",
                "f.store(keep.select(product, 0), y)",
                "f.store(keep.select(elements, 0), y)",
            ),
            (
                "complex elements share flags",
                "output",
                "keep.shuffle([lane // width for lane in range(lanes)])",
                "keep.shuffle([lane // width // width * width for lane in range(lanes)])",
            ),
            (
                "the counter has 32 bits in registers",
                "windows",
                "low, high, many = block & MASK32, block >> 32,",
                "low, high, many = block & MASK32, block & 0,",
            ),
            (
                "the counter has 32 bits in the buffer",
                "windows",
                "write(blocks, blocks >> 32, i)",
                "write(blocks, blocks & 0, i)",
            ),
            (
                "blocks share the high word of the first, which differs",
                "windows",
                "((blocks ^ first) >= 1 << 32).any()",
                "((blocks ^ first) >= 1 << 33).any()",
            ),
            (
                "the low word wraps inside a piece",
                "windows",
                "(f.number(1 << 32) -",
                "(f.number(1 << 40) -",
            ),
            (
                "the elements of a tail share a word",
                "mask",
                "word = f.load(words + i * 4, I32)",
                "word = f.load(words + done * 4, I32)",
            ),
            (
                "the head of a row has another length",
                "windows",
                "head = least((f.number(0) - index) & 7, count)",
                "head = least(index & 7, count)",
            ),
            (
                "a span never ends",
                "mask",
                "done.set(now + length)",
                "done.set(now)",
            ),
            (
                "a run begins at its block",
                "windows",
                "f.finish(words + offset * 4)",
                "f.finish(words)",
            ),
        ],
        "unidrop/fused/kernels.py": [
            (
                "a work item begins at column 0",
                "large-mask",
                "f.variable(done.get() % length)",
                "f.variable(0)",
            ),
            (
                "a work item of short rows begins at column 0",
                "windows",
                "index = start.get() + base + column.get()",
                "index = start.get() + base",
            ),
            (
                "short rows repeat",
                "windows",
                "start.set(start.get() + step)",
                "start.set(start.get())",
            ),
            (
                "short rows miss the end of an axis",
                "windows windows-tile",
                "left.set(outer)\n",
                "left.set(outer + 1)\n",
            ),
            (
                "all short rows share their words",
                "windows",
                "with f.when((number < 1) | (previous.get() ^ index >= 1)):",
                "with f.when(number < 1):",
            ),
            (
                "a tile ignores its place in the mask",
                "layout",
                "index += base + row + column * mask_stride",
                "index += base",
            ),
            (
                "a tile ignores its row in memory",
                "layout",
                "start += row * row_stride + column",
                "start += row + column",
            ),
            (
                "the rows of a square change places",
                "layout",
                "f.store(row, tile + pitch * i)",
                "f.store(row, tile + pitch * (i ^ 1))",
            ),
            (
                "squares of one column group share their words",
                "layout",
                "starts, (i + j * height) * 4)",
                "starts, i * 4)",
            ),
            (
                "columns lie apart by another stride",
                "layout",
                "own = at + j * mask_stride",
                "own = at + j * height",
            ),
            (
                "a broadcast tile has the words of its first row",
                "broadcast-axes",
                "f.load(first + (i + k) * 4, I32)",
                "f.load(first + i * 4, I32)",
            ),
        ],
        "unidrop/fused/layout.py": [
            (
                "axes with gaps in the mask are merged",
                "windows",
                "axis.mask_stride == inner.length * inner.mask_stride",
                "axis.mask_stride >= inner.length * inner.mask_stride",
            ),
        ],
        "unidrop/fused/products.py": [
            (
                "bfloat16 rounds half up",
                "output",
                "0x7FFF + ((product >> 16) & 1)",
                "0x8000",
            ),
            (
                "float16 rounds half up",
                "output",
                "0xFFF + ((magnitude >> 13) & 1)",
                "0x1000",
            ),
            (
                "some subnormal float16 are read as normal",
                "output",
                "(magnitude >= 0x400).select(normal, subnormal)",
                "(magnitude >= 0x200).select(normal, subnormal)",
            ),
        ],
    },
    _FOLD_NUMPY: {
        "unidrop/fused/generator.py": [
            (
                "the high word of the data is lost",
                "mask step-keys",
                "(data & MASK32, data >> 32, 0, tag)",
                "(data & MASK32, 0, 0, tag)",
            ),
            (
                "strings have the tag of integers",
                "mask keys",
                "(data & MASK32, data >> 32, 0, tag)",
                "(data & MASK32, data >> 32, 0, 1)",
            ),
        ],
    },
    _FOLD_TORCH: {
        "unidrop/fused/generator.py": [
            (
                "the high word of the key is lost",
                "mask step-keys",
                "(key & MASK32, key >> 32), VectorWords()",
                "(key & MASK32, key & 0), VectorWords()",
            ),
        ],
    },
    _FOLD_FLAX: {
        "unidrop/fused/generator.py": [
            (
                "the upper half of a lane enters the key",
                "mask layer-resumes",
                "f.finish((four[0] & MASK32) | four[1] << 32)",
                "f.finish(four[0] | four[1] << 32)",
            ),
        ],
    },
    _PLAIN_NUMPY: {
        "adapters/numpy/arrays.py": [
            (
                "arrays need no C order",
                "layout",
                "PLAIN_FLAGS = 0x1 | 0x100 | 0x400",
                "PLAIN_FLAGS = 0x100 | 0x400",
            ),
        ],
        "adapters/numpy/functional.py": [
            (
                "the high word of the key is lost",
                "mask",
                "else hi << 32 | lo",
                "else lo",
            ),
            (
                "swapped bytes are read as they are",
                "layout",
                "dtype not in _PLAIN_DTYPES",
                'dtype.newbyteorder("=") not in _PLAIN_DTYPES',
            ),
            (
                "a rate that keeps nothing keeps everything",
                "mask threshold",
                "if rate.keeps_nothing:",
                "if p == 1:",
            ),
            (
                "evaluation drops",
                "nothing-to-drop",
                "and training is True\n        and return_mask is False",
                "and return_mask is False",
            ),
            (
                "windows are ignored",
                "windows",
                "and rng is None\n        and global_shape is None\n        and start is None",
                "and rng is None",
            ),
            (
                "broadcast axes are ignored",
                "broadcast-axes",
                "and return_mask is False\n        and type(broadcast_axes) is tuple\n"
                "        and not broadcast_axes",
                "and return_mask is False",
            ),
            (
                "the mask is not returned",
                "returned-mask",
                "and return_mask is False\n",
                "\n",
            ),
            (
                "a rate of any type is compared",
                "bad-rate",
                "!= PLAIN_FLAGS or type(p) is not float:",
                "!= PLAIN_FLAGS:",
            ),
            (
                "the backward pass has another key",
                "gradient-mask",
                "gradient = _run_plain(grad, p, key, out)",
                "gradient = _run_plain(grad, p, key.fold_in(0), out)",
            ),
        ],
    },
    _PLAIN_TORCH: {
        "adapters/torch/plain.py": [
            (
                "the words of the key change places",
                "mask",
                "words[1] << 32 | words[0]",
                "words[0] << 32 | words[1]",
            ),
            (
                "tensors need no C order",
                "layout",
                "rate.threshold == KEEP_NOTHING or not x.is_contiguous()",
                "rate.threshold == KEEP_NOTHING",
            ),
            (
                "a rate that keeps nothing keeps everything",
                "dropped-is-zero",
                "rate.threshold == KEEP_NOTHING or not x.is_contiguous()",
                "not x.is_contiguous()",
            ),
        ],
        "adapters/torch/buffers.py": [
            (
                "a lazy conjugation is lost",
                "output",
                "if x.is_conj() or x.is_neg():",
                "if x.is_neg():",
            ),
            (
                "forward-mode differentiation sees nothing",
                "gradient",
                "if torch.autograd.forward_ad._current_level >= 0:",
                "if torch.autograd.forward_ad._current_level >= 9:",
            ),
        ],
        "adapters/torch/operators.py": [
            (
                "the operator ignores broadcast axes",
                "broadcast-axes",
                "if axes or global_shape is not None or",
                "if global_shape is not None or",
            ),
            (
                "the operator ignores windows",
                "windows",
                "if axes or global_shape is not None or",
                "if axes or",
            ),
            (
                "the operator records no gradient",
                "gradient-mask gradient",
                "if not (x.requires_grad and torch.is_grad_enabled()):\n        # Two",
                "if True:\n        # Two",
            ),
        ],
        "adapters/torch/arrays.py": [
            (
                "an eager call ignores broadcast axes",
                "broadcast-axes",
                "if plan.has_kernels and window.start is None and not window.broadcast_axes:",
                "if plan.has_kernels and window.start is None:",
            ),
            (
                "an eager call ignores windows",
                "windows",
                "if plan.has_kernels and window.start is None and not window.broadcast_axes:",
                "if plan.has_kernels and not window.broadcast_axes:",
            ),
            (
                "the backward pass has another key",
                "gradient-mask",
                "x, key, plan = upstream[0], ctx.key, ctx.plan",
                "x, key, plan = upstream[0], ctx.key.fold_in(0), ctx.plan",
            ),
        ],
        "adapters/torch/functional.py": [
            (
                "a rate of 0 drops and counts",
                "layer-calls",
                "DropoutPlan(LIBRARY, window, Rate.from_p(p), p > 0)",
                "DropoutPlan(LIBRARY, window, Rate.from_p(p), True)",
            ),
        ],
    },
    _CALLS_TORCH: {
        "adapters/torch/operators.py": [
            (
                "the operator folds the number of the next call",
                "layer-calls",
                "as_key(key).fold_in(int(number))",
                "as_key(key).fold_in(int(number) + 1)",
            ),
        ],
        "adapters/torch/state.py": [
            (
                "a call counts twice",
                "layer-calls",
                "memory, 0, number + 1, ~(number + 1) & _MASK64)",
                "memory, 0, number + 2, ~(number + 2) & _MASK64)",
            ),
            (
                "the check does not advance",
                "layer-calls",
                "memory, 0, number + 1, ~(number + 1) & _MASK64)",
                "memory, 0, number + 1, ~number & _MASK64)",
            ),
            (
                "a call has the number of the next",
                "layer-calls",
                "    return int(number)\n\n\ndef add_calls",
                "    return int(number + 1)\n\n\ndef add_calls",
            ),
        ],
    },
    _FRAME: {
        "unidrop/fused/xla.py": [
            (
                "the operands of the key change places",
                "mask",
                "x, rate, low, high = (",
                "x, rate, high, low = (",
            ),
            (
                "the words of the scale change places",
                "scale",
                "_load_word(f, rate, 1) | _load_word(f, rate, 2) << 32",
                "_load_word(f, rate, 2) | _load_word(f, rate, 1) << 32",
            ),
            (
                "the list of operands has another offset",
                "mask",
                "_ATTRIBUTE_LIST = 32, 32, 40",
                "_ATTRIBUTE_LIST = 24, 32, 40",
            ),
            (
                "the elements of a buffer have another offset",
                "mask",
                "_BUFFER_SIZE, _BUFFER_DATA = 48, 24",
                "_BUFFER_SIZE, _BUFFER_DATA = 48, 32",
            ),
            (
                "the numbers of the attribute have another offset",
                "mask",
                "_ARRAY_COUNT, _ARRAY_DATA = 1, 5, 8, 16",
                "_ARRAY_COUNT, _ARRAY_DATA = 1, 5, 8, 8",
            ),
            (
                "a call must have two results",
                "mask",
                "f.load(frame + _RESULTS + _COUNT, I64).equals(1)",
                "f.load(frame + _RESULTS + _COUNT, I64).equals(2)",
            ),
            (
                "a call must have a start",
                "mask",
                "f.load(frame + _OPERANDS + _COUNT, I64) >= _FIRST_START,",
                "f.load(frame + _OPERANDS + _COUNT, I64) >= _FIRST_START + 1,",
            ),
            (
                "all runs write to the first",
                "mask",
                "skip = run * run_size",
                "skip = run * 0",
            ),
            (
                "all runs have the low word of the first key",
                "mask",
                "_load_word(f, low, run) | _load_word(f, high, run) << 32",
                "_load_word(f, low, 0) | _load_word(f, high, run) << 32",
            ),
            (
                "starts share words",
                "windows",
                "operand = start * 2 + _FIRST_START",
                "operand = start + _FIRST_START",
            ),
            (
                "a start has 32 bits",
                "threshold-ends",
                "(low_word | high_word << 32) * stride",
                "low_word * stride",
            ),
            (
                "all starts have the first stride",
                "windows",
                "f.load(numbers + (start + _STRIDES) * 8, I64)",
                "f.load(numbers + _STRIDES * 8, I64)",
            ),
        ],
        "adapters/jax/custom_call.py": [
            (
                "the words of the scale are packed in another order",
                "scale",
                "np.array([rate.threshold, lo, hi], np.uint32)",
                "np.array([rate.threshold, hi, lo], np.uint32)",
            ),
            (
                "the first element has the number 0",
                "windows",
                "numbers = runs, kernel.size, base, *start_strides",
                "numbers = runs, kernel.size, 0, *start_strides",
            ),
            (
                "the traversals of a dtype share a handler",
                "mask broadcast-axes",
                "    if (traversal, kind) not in _targets:\n"
                "        _targets[traversal, kind] = _register_once(traversal, kind, kernel)\n"
                "    return _targets[traversal, kind]",
                "    if ('', kind) not in _targets:\n"
                "        _targets['', kind] = _register_once(traversal, kind, kernel)\n"
                "    return _targets['', kind]",
            ),
        ],
        "adapters/jax/primitive.py": [
            (
                "examples with one key have different masks",
                "mask",
                "strides = (0,) * ndim + strides",
                "strides = (math.prod(shape[ndim:]),) * ndim + strides",
            ),
            (
                "words are spread as the operand before them",
                "windows",
                "for operand, word in enumerate(words, 1):",
                "for operand, word in enumerate(words):",
            ),
        ],
    },
    _TENSORFLOW: {
        "adapters/tensorflow/xla.py": [
            (
                "an element at the threshold is dropped",
                "threshold",
                "tf.cast(u >= least, tf.uint32)",
                "tf.cast(u > least, tf.uint32)",
            ),
            (
                "odd elements have the place of even ones",
                "mask",
                "(even * ODD_MULTIPLIER, 2 * place + 1)",
                "(even * ODD_MULTIPLIER, 2 * place)",
            ),
            (
                "blocks are out of order",
                "mask",
                "_right_shift(bits, _uint32(8)) | _left_shift(byte, _uint32(flags - 8))",
                "_left_shift(bits, _uint32(8)) | byte",
            ),
            (
                "the end of a padded tensor is returned",
                "mask",
                "program(padded, *numbers)[:size]",
                "program(padded, *numbers)[-size:]",
            ),
            (
                "programs ignore broadcast axes",
                "broadcast-axes",
                "        and not plan.window.broadcast_axes\n",
                "",
            ),
            (
                "programs ignore windows",
                "windows",
                "        and plan.window.global_shape is None\n",
                "",
            ),
        ],
        "adapters/tensorflow/tape.py": [
            (
                "a tape records nothing",
                "gradient-mask",
                "if not could_possibly_record():",
                "if could_possibly_record():",
            ),
            (
                "the gradient is not masked",
                "gradient-mask",
                "lambda upstream: [backward(upstream)]",
                "lambda upstream: [upstream]",
            ),
        ],
        "adapters/tensorflow/arrays.py": [
            (
                "small bfloat16 tensors share memory of NumPy",
                "output",
                "like.nbytes < _LARGE and x.dtype != tf.bfloat16:",
                "like.nbytes < _LARGE:",
            ),
            (
                "the backward pass of a tensor has another key",
                "gradient-mask",
                "return plan.apply(upstream, key)",
                "return plan.apply(upstream, key.fold_in(0))",
            ),
            (
                "the halves of a product change places",
                "word-order",
                "tf.constant(ODD_MULTIPLIER << 32 | 1, tf.uint64)",
                "tf.constant(1 << 32 | ODD_MULTIPLIER, tf.uint64)",
            ),
            (
                "runs of blocks are read as one",
                "windows",
                "is_one_run = isinstance(first[0], int) or first[0].shape.rank == 0",
                "is_one_run = True",
            ),
            (
                "the words of a folded key change places",
                "traced-key",
                "return flat[0], flat[1]",
                "return flat[1], flat[0]",
            ),
        ],
    },
    _KERAS: {
        "adapters/keras_backend.py": [
            (
                "a call counts twice",
                "layer-calls",
                "tf.constant([0, 1], dtype)",
                "tf.constant([0, 2], dtype)",
            ),
            (
                "a call has the number of the next",
                "layer-calls",
                "    return before\n\n\n@cache",
                "    return before + [0, 1]\n\n\n@cache",
            ),
        ],
        "adapters/keras/layers.py": [
            (
                "an eager call is counted by both routes",
                "layer-calls",
                "return self._advance(state, inputs, rate) if before is None else before",
                "return self._advance(state, inputs, rate)",
            ),
        ],
    },
}

MUTANTS = _make_table()


@dataclass(frozen=True)
class RouteResult:
    """What the matrix reported about a mutant, how many cells failed, and one line about them."""

    status: str
    failed: int
    what: str
    seconds: float

    @property
    def is_red(self) -> bool:
        """Whether the matrix reported the mutant."""
        return self.status in ("red", "crash", "timeout")


def run_matrix(copy: Copy, backend: str, contracts: Sequence[str]) -> RouteResult:
    """Run contracts of a backend in a copy, all of them if there is none."""
    report = copy.folder.parent / "report.json"
    report.unlink(missing_ok=True)
    options = [word for name in contracts for word in ("--contract", name)]
    command = ["unidrop.cli", "conformance", "--backend", backend, "--jobs", "1"]
    command += ["--timeout", str(CELL_TIMEOUT), "--json", str(report), *options]
    begin = time.monotonic()
    status, printed = copy.run(command, MATRIX_TIMEOUT)
    seconds = time.monotonic() - begin
    if status not in (0, 1) or not report.exists():
        return RouteResult("broken", 0, f"exit status {status}: {printed[-300:]}", seconds)
    outcomes = json.loads(report.read_text(encoding="utf-8"))
    failed = [cell for cell in outcomes["cells"] if cell["status"] == "failed"]
    errors = " ".join(backend["error"] for backend in outcomes["unavailable"])
    if status == 0:
        return RouteResult("GREEN", 0, "", seconds)
    if "did not answer" in errors:
        result = "timeout"
    elif "was killed by signal" in errors or "ended with exit status" in errors:
        result = "crash"
    else:
        result = "red" if failed else "broken"
    return RouteResult(result, len(failed), _describe(failed) or errors[:100], seconds)


def _describe(failed: Sequence[dict[str, Any]]) -> str:
    """Return the contracts that failed, with their modes."""
    modes: dict[str, list[str]] = {}
    for cell in failed:
        modes.setdefault(cell["contract"], []).append(cell["mode"])
    return "; ".join(f"{name} ({', '.join(dict.fromkeys(modes[name]))})" for name in modes)


def test(mutant: RouteMutant, copy: Copy) -> RouteResult:
    """Run the contracts of a mutant, and the whole matrix of its backend if they are green."""
    path = copy.folder / mutant.file
    path.write_text(mutant.read(), encoding="utf-8")
    try:
        result = run_matrix(copy, mutant.backend, mutant.contracts.split())
        return run_matrix(copy, mutant.backend, ()) if result.status == "GREEN" else result
    finally:
        shutil.copy2(ROOT / mutant.file, path)


def check_green(mutants: Sequence[RouteMutant], copy: Copy) -> None:
    """Exit unless all contracts of the mutants are green without a mutant."""
    contracts: dict[str, dict[str, None]] = {}
    for mutant in mutants:
        contracts.setdefault(mutant.backend, {}).update(dict.fromkeys(mutant.contracts.split()))
    for backend, names in contracts.items():
        result = run_matrix(copy, backend, list(names))
        print(f"without a mutant: {backend}: {result}", flush=True)
        if result.status != "GREEN":
            sys.exit("the matrix must be green without a mutant")


def run(mutants: Sequence[RouteMutant], jobs: int, work: Path) -> list[RouteResult]:
    """Test mutants in as many copies as there are jobs, and print each result."""
    copies: Queue[Copy] = Queue()
    for i in range(min(jobs, len(mutants))):
        copies.put(Copy(work / f"copy{i}"))
    first = copies.get()
    check_green(mutants, first)
    copies.put(first)

    def one(mutant: RouteMutant) -> RouteResult:
        copy = copies.get()
        try:
            result = test(mutant, copy)
        finally:
            copies.put(copy)
        shown = f"{result.status:7} {result.seconds:4.0f} s {mutant.group}: {mutant.name}"
        print(f"{shown}: {result.what}", flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, mutants))


def show(mutants: Sequence[RouteMutant], results: Sequence[RouteResult]) -> None:
    """Print a table of the results."""
    print("\n| group | mutant | backend | result | cells | seen by |\n|---|---|---|---|---|---|")
    for mutant, result in zip(mutants, results, strict=True):
        cells = f"{result.status} | {result.failed or ''} | {result.what}"
        print(f"| {mutant.group} | {mutant.name} | {mutant.backend} | {cells} |")
    print(f"\n{len(results)} mutants:", dict(Counter(result.status for result in results)))


def main() -> None:
    """Parse the arguments, run the mutants and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(tempfile.gettempdir()) / "unidrop-routes"
    parser.add_argument(
        "--only", metavar="TEXT", action="append", help="mutants whose group, file or name has it"
    )
    parser.add_argument("--jobs", type=int, default=2, help="copies to run in (%(default)s)")
    parser.add_argument("--work", type=Path, default=default, help="folder (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the mutants, run none")
    arguments = parser.parse_args()
    mutants = [m for m in MUTANTS if not arguments.only or _matches(m, arguments.only)]
    for mutant in mutants:
        mutant.read()  # raises before anything runs
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.group}, {mutant.backend}, {mutant.contracts}: {mutant.name}")
            print(f"  {mutant.file}\n- {mutant.old}\n+ {mutant.new}")
        print(len(mutants), "mutants:", dict(Counter(mutant.group for mutant in mutants)))
        return
    if not mutants:
        sys.exit(f"--only must match a mutant, got {arguments.only}")
    results = run(mutants, arguments.jobs, arguments.work)
    show(mutants, results)
    sys.exit(not all(result.is_red for result in results))


def _matches(mutant: RouteMutant, texts: Sequence[str]) -> bool:
    searched = f"{mutant.group}\n{mutant.backend}\n{mutant.file}\n{mutant.name}"
    return any(text in searched for text in texts)


if __name__ == "__main__":
    main()
