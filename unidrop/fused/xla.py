"""Handlers: machine code through which programs of XLA call kernels.

Requirements this design meets:

* XLA calls a handler through its C interface for foreign functions, so LLVM compiles one here, and
  users need no C compiler. The handler runs without Python and its lock.
* XLA may change its structures. A handler of another layout than XLA's refuses its registration,
  and a call of unexpected operands raises.
* A program serves all rates, keys and starts of a window that are arrays: they are operands.

Documentation: xla/ffi/api/c_api.h, which jaxlib contains.
"""

import ctypes
import sys
from typing import Any, Final

from llvmlite import binding, ir

from unidrop.fused.kernels import AXES
from unidrop.fused.llvm import I32, I64, Function, Value
from unidrop.fused.memory import MADV_HUGEPAGE, MIN_SIZE

__all__ = ["make_handler"]

# XLA's structures, version 0.3 of the interface. Each begins with its size. A frame contains the
# operands, the results and the attributes; offsets are in bytes.
_API_VERSION: Final = (0, 3)
_SIZES: Final = {"frame": 168, "operands": 40, "results": 40, "attributes": 48}
_EXTENSION, _API, _OPERANDS, _RESULTS, _ATTRIBUTES = 8, 16, 40, 80, 120  # of a frame
_COUNT, _TYPES = 16, 24  # of operands and attributes
_OPERAND_LIST, _RESULT_LIST, _ATTRIBUTE_LIST = 32, 32, 40
_BUFFER_SIZE, _BUFFER_DATA = 48, 24
_ARRAY, _INT64, _ARRAY_COUNT, _ARRAY_DATA = 1, 5, 8, 16  # of an attribute
_EXTENSION_KIND, _METADATA_KIND, _METADATA, _METADATA_SIZE = 8, 1, 24, 36  # of an extension
_METADATA_VERSION, _METADATA_TRAITS, _METADATA_STATE = 24, 32, 40
_CREATE_ERROR, _INTERNAL_ERROR = 48, 13

_FIRST_START = 4  # of the operands
_RUNS, _RUN_SIZE, _BASE, _STRIDES = range(4)  # of the attribute

_HUGE_PAGE = 1 << 21  # bytes

_MESSAGE: Final = ctypes.create_string_buffer(
    b"unidrop's handler got a call that it does not know: clear JAX's compilation cache"
)


def make_handler(kernel: int) -> int:
    """Compile a handler, and return its address.

    Its operands are x, the rate, the words of the key, and the words of each start of a window that
    is an array. Its attribute consists of the number of runs, the bytes of a run, the number of the
    first element, the stride of each such start, and the template of a task. Each run has its own
    key and its own starts. The rate consists of the threshold and the words of the scale.

    Parameters
    ----------
    kernel : int
        The address of a kernel's ``run_alone``.
    """
    module = ir.Module()
    _build(Function(module, "handle", 1, is_exported=True), kernel)
    # Optimization would take longer than it saves.
    machine = binding.Target.from_default_triple().create_target_machine(opt=1, jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    address: int = engine.get_function_address("handle")
    engine.detach()  # XLA may call the code until the process ends
    return address


def _build(f: Function, kernel: int) -> None:
    """Build a handler: it receives a frame, and returns an error of XLA or 0."""
    (frame,) = f.arguments
    error, is_question = f.variable(0), f.variable(0)
    extension = f.load(frame + _EXTENSION, I64)
    with f.when(extension >= 1):
        kind = f.load(extension + _EXTENSION_KIND, I32)
        is_question.set(kind.equals(_METADATA_KIND).convert("zext", I64))
    with f.choose(is_question.get().equals(0)) as (execute, describe):
        with execute, f.choose(_is_call(f, frame)) as (known, unknown):
            with known:
                _run(f, frame, kernel)
            with unknown:
                error.set(_create_error(f, frame))
        with describe:
            _describe(f, frame)
    f.finish(error.get())


def _describe(f: Function, frame: Value) -> None:
    """Answer the question for the version of the interface, by -1 if a structure differs."""
    extension = f.load(frame + _EXTENSION, I64)
    metadata = f.load(extension + _METADATA, I64)
    is_known = _all(
        f.load(frame, I64).equals(_SIZES["frame"]),
        f.load(frame + _OPERANDS, I64).equals(_SIZES["operands"]),
        f.load(frame + _RESULTS, I64).equals(_SIZES["results"]),
        f.load(frame + _ATTRIBUTES, I64).equals(_SIZES["attributes"]),
        f.load(metadata, I64) >= _METADATA_SIZE,
    )
    for at, number in zip((0, 4), _API_VERSION, strict=True):
        version = is_known.select(f.number(number), f.number(-1)).convert("trunc", I32)
        f.store(version, metadata + _METADATA_VERSION + at)
    f.store(f.number(0).convert("trunc", I32), metadata + _METADATA_TRAITS)
    f.store(0, metadata + _METADATA_STATE)


def _is_call(f: Function, frame: Value) -> Value:
    """Return whether a frame has the structures, the operands and the attribute of a call."""
    x = f.load(_get_operands(f, frame), I64)
    return _all(
        f.load(frame, I64).equals(_SIZES["frame"]),
        f.load(x, I64).equals(_BUFFER_SIZE),
        f.load(frame + _OPERANDS + _COUNT, I64) >= _FIRST_START,
        f.load(frame + _RESULTS + _COUNT, I64).equals(1),
        f.load(frame + _ATTRIBUTES + _COUNT, I64).equals(1),
        f.load(f.load(frame + _ATTRIBUTES + _TYPES, I64), I32).equals(_ARRAY),
        f.load(_get_attribute(f, frame), I32).equals(_INT64),
        f.load(_get_attribute(f, frame) + _ARRAY_COUNT, I64) >= AXES,
    )


def _run(f: Function, frame: Value, kernel: int) -> None:
    """Run the kernel on each part of x."""
    operands = _get_operands(f, frame)
    x, rate, low, high = (_get_data(f, operands, number) for number in range(_FIRST_START))
    y = _get_data(f, f.load(frame + _RESULTS + _RESULT_LIST, I64), 0)
    starts = (f.load(frame + _OPERANDS + _COUNT, I64) - _FIRST_START) >> 1
    numbers = f.load(_get_attribute(f, frame) + _ARRAY_DATA, I64)
    template = numbers + (starts + _STRIDES) * 8
    runs, run_size, first = (
        f.load(numbers + 8 * number, I64) for number in (_RUNS, _RUN_SIZE, _BASE)
    )
    threshold = _load_word(f, rate, 0)
    scale = _load_word(f, rate, 1) | _load_word(f, rate, 2) << 32
    _advise(f, y, runs * run_size)
    with f.loop(0, runs) as run:
        skip = run * run_size
        key = _load_word(f, low, run) | _load_word(f, high, run) << 32
        base = f.variable(first)
        with f.loop(0, starts) as start:
            operand = start * 2 + _FIRST_START
            high_word = _load_word(f, _get_data(f, operands, operand), run)
            low_word = _load_word(f, _get_data(f, operands, operand + 1), run)
            stride = f.load(numbers + (start + _STRIDES) * 8, I64)
            base.set(base.get() + (low_word | high_word << 32) * stride)
        _call_at(f, kernel, template, x + skip, y + skip, threshold, scale, key, base.get())


def _advise(f: Function, y: Value, size: Value) -> None:
    """Advise Linux to use huge pages for a large output, which is often fresh memory."""
    if sys.platform != "linux":
        return
    madvise = ctypes.cast(ctypes.CDLL(None).madvise, ctypes.c_void_p).value
    with f.when(size >= MIN_SIZE):
        start = (y + _HUGE_PAGE - 1) & -_HUGE_PAGE
        end = (y + size) & -_HUGE_PAGE
        _call_at(f, madvise, start, end - start, f.number(MADV_HUGEPAGE))


def _create_error(f: Function, frame: Value) -> Value:
    """Return an error of XLA."""
    arguments = f.allocate(32)
    create = f.load(f.load(frame + _API, I64) + _CREATE_ERROR, I64)
    for at, number in ((0, 28), (8, 0), (16, ctypes.addressof(_MESSAGE)), (24, _INTERNAL_ERROR)):
        f.store(number, arguments + at)
    return _call_at(f, create, arguments)


def _get_operands(f: Function, frame: Value) -> Value:
    return f.load(frame + _OPERANDS + _OPERAND_LIST, I64)


def _get_attribute(f: Function, frame: Value) -> Value:
    return f.load(f.load(frame + _ATTRIBUTES + _ATTRIBUTE_LIST, I64), I64)


def _get_data(f: Function, buffers: Value, number: Any) -> Value:
    """Return the address of the elements of a buffer."""
    return f.load(f.load(buffers + f.number(8) * number, I64) + _BUFFER_DATA, I64)


def _load_word(f: Function, words: Value, number: Any) -> Value:
    return f.load(words + f.number(4) * number, I32).convert("zext", I64)


def _all(first: Value, *others: Value) -> Value:
    """Return whether all conditions hold."""
    for other in others:
        first = first & other
    return first


def _call_at(f: Function, address: Any, *arguments: Value) -> Value:
    """Call the function at an address with 64-bit integers; return its result."""
    kind = ir.FunctionType(I64, [I64] * len(arguments)).as_pointer()
    address = address if isinstance(address, Value) else f.number(address)
    pointer = address.convert("inttoptr", kind).value
    return Value(f.builder, f.builder.call(pointer, [argument.value for argument in arguments]))
