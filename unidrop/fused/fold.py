"""Keys: the function that folds an integer into a key, compiled from the core's `philox`."""

from collections.abc import Callable
from ctypes import PYFUNCTYPE, c_uint64
from typing import Any, cast

from llvmlite import binding, ir

from unidrop.fused.kernels import _Vector, _VectorWords
from unidrop.philox import philox
from unidrop.words import MASK32

__all__ = ["compile_fold"]


def compile_fold() -> Callable[[int, int, int], int]:
    """Return a function of a key, data and a tag, each below 2^64, that returns the folded key."""
    kind = ir.IntType(64)
    module = ir.Module("unidrop_fold")
    function = ir.Function(module, ir.FunctionType(kind, [kind] * 3), "unidrop_fold")
    builder = ir.IRBuilder(function.append_basic_block())
    key, data, tag = (_Vector.broadcast(builder, argument, 1) for argument in function.args)
    counter = (data & MASK32, data >> 32, data & 0, tag)
    lo, hi, _, _ = philox(counter, (key & MASK32, key >> 32), cast(Any, _VectorWords()))
    number = (lo & MASK32) | hi << 32
    builder.ret(builder.extract_element(number.value, ir.Constant(ir.IntType(32), 0)))

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(opt=3)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    fold: Any = PYFUNCTYPE(c_uint64, c_uint64, c_uint64, c_uint64)(
        engine.get_function_address(function.name)
    )
    fold.engine = engine  # which owns the code
    compiled: Callable[[int, int, int], int] = fold
    return compiled
