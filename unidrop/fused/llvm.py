"""A small language for loops over vectors, written in Python and compiled by LLVM.

A `Value` has Python's operators, and a `Function` has loops, conditions and variables. So a kernel
reads as the computation that it is. All integers are unsigned.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

from llvmlite import binding, ir

__all__ = [
    "F32",
    "F64",
    "I8",
    "I16",
    "I32",
    "I64",
    "Function",
    "Value",
    "Variable",
    "compile_module",
    "has_feature",
    "least",
]

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()

_SIZES: Final = {F32: 4, F64: 8}


class Value:
    """A number, or a vector of numbers, that a function computes.

    A Python number stands for a constant. A number that meets a vector fills all lanes.
    """

    __slots__ = ("builder", "value")

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def lanes(self) -> int:
        """The length of the vector; 1 for a number."""
        kind = self.value.type
        return kind.count if isinstance(kind, ir.VectorType) else 1

    @property
    def element(self) -> Any:
        """The type of a lane."""
        return self.value.type.element if self.lanes > 1 else self.value.type

    def _new(self, value: Any) -> "Value":
        return Value(self.builder, value)

    def constant(self, number: Any) -> "Value":
        """Return a constant of the same type: one number for all lanes, or one for each."""
        if self.lanes == 1:
            return self._new(ir.Constant(self.element, number))
        numbers = [number] * self.lanes if isinstance(number, int | float) else list(number)
        return self._new(ir.Constant(self.value.type, numbers))

    def fill(self, lanes: int) -> "Value":
        """Return a vector with this number in all lanes, or the value itself if lanes is 1."""
        if lanes == self.lanes:
            return self
        return self._new(self._insert(lanes)).shuffle([0] * lanes)

    def _insert(self, lanes: int) -> Any:
        """Return a vector whose first lane is this number."""
        empty = ir.Constant(ir.VectorType(self.value.type, lanes), ir.Undefined)
        return self.builder.insert_element(empty, self.value, I32(0))

    def _match(self, other: Any) -> tuple["Value", "Value"]:
        if not isinstance(other, Value):
            return self, self.constant(other)
        lanes = max(self.lanes, other.lanes)
        return self.fill(lanes), other.fill(lanes)

    def _apply(self, operation: str, other: Any) -> "Value":
        a, b = self._match(other)
        return self._new(getattr(self.builder, operation)(a.value, b.value))

    def __add__(self, other: Any) -> "Value":
        return self._apply("add", other)

    def __sub__(self, other: Any) -> "Value":
        return self._apply("sub", other)

    def __mul__(self, other: Any) -> "Value":
        return self._apply("mul", other)

    def __floordiv__(self, other: Any) -> "Value":
        return self._apply("udiv", other)

    def __mod__(self, other: Any) -> "Value":
        return self._apply("urem", other)

    def __and__(self, other: Any) -> "Value":
        return self._apply("and_", other)

    def __or__(self, other: Any) -> "Value":
        return self._apply("or_", other)

    def __xor__(self, other: Any) -> "Value":
        return self._apply("xor", other)

    __radd__, __rmul__, __rxor__ = __add__, __mul__, __xor__

    def __rshift__(self, other: Any) -> "Value":
        return self._apply("lshr", other)

    def __lshift__(self, other: Any) -> "Value":
        return self._apply("shl", other)

    def _compare(self, operator: str, other: Any) -> "Value":
        a, b = self._match(other)
        return self._new(self.builder.icmp_unsigned(operator, a.value, b.value))

    def __lt__(self, other: Any) -> "Value":
        return self._compare("<", other)

    def __ge__(self, other: Any) -> "Value":
        return self._compare(">=", other)

    def equals(self, other: Any) -> "Value":
        """Return whether two integers are equal."""
        return self._compare("==", other)

    def fadd(self, other: Any) -> "Value":
        """Return the sum of floating-point numbers."""
        return self._apply("fadd", other)

    def fmul(self, other: Any) -> "Value":
        """Return the product of floating-point numbers."""
        return self._apply("fmul", other)

    def convert(self, conversion: str, element: Any) -> "Value":
        """Return the lanes converted by bitcast, fptrunc, sitofp, trunc or zext."""
        kind = ir.VectorType(element, self.lanes) if self.lanes > 1 else element
        return self._new(getattr(self.builder, conversion)(self.value, kind))

    def view(self, element: Any, lanes: int) -> "Value":
        """Return the same bits as a vector of other lanes."""
        return self._new(self.builder.bitcast(self.value, ir.VectorType(element, lanes)))

    def any(self) -> "Value":
        """Return whether any lane of this vector of booleans is true."""
        bits = ir.IntType(self.lanes)
        return self._new(self.builder.bitcast(self.value, bits)) >= 1

    def select(self, if_true: Any, if_false: Any) -> "Value":
        """Return, for each lane of this vector of booleans, the lane of one or the other."""
        like = if_true if isinstance(if_true, Value) else if_false
        a, b = (v if isinstance(v, Value) else like.constant(v) for v in (if_true, if_false))
        return self._new(self.builder.select(self.value, a.value, b.value))

    def shuffle(self, order: list[int], other: "Value | None" = None) -> "Value":
        """Return lanes in an order; numbers from the lane count on mean lanes of other."""
        if self.lanes == 1:
            return self.fill(len(order))
        lanes = ir.Constant(ir.VectorType(I32, len(order)), order)
        second = (other or self).value
        return self._new(self.builder.shuffle_vector(self.value, second, lanes))

    def lane(self, number: int) -> "Value":
        """Return one lane."""
        return self._new(self.builder.extract_element(self.value, I32(number)))


class Variable:
    """A number of 64 bits that a function changes."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        with builder.goto_entry_block():
            self._pointer = builder.alloca(I64)
        self.set(value)

    def get(self) -> Value:
        """Return the present value."""
        return Value(self.builder, self.builder.load(self._pointer))

    def set(self, value: Any) -> None:
        """Assign a value."""
        self.builder.store(value.value if isinstance(value, Value) else I64(value), self._pointer)


class Function:
    """A function of 64-bit integers. Those that it calls must be in the same module.

    Parameters
    ----------
    module : llvmlite.ir.Module
    name : str
    arguments : int
    is_exported : bool, default False
        Whether Python calls it.
    """

    def __init__(self, module: Any, name: str, arguments: int, is_exported: bool = False) -> None:
        self.ir = ir.Function(module, ir.FunctionType(I64, [I64] * arguments), name)
        if not is_exported:
            self.ir.linkage = "internal"
            self.ir.attributes.add("noinline")  # or LLVM compiles a function in each that calls it
        self.builder = ir.IRBuilder(self.ir.append_basic_block())
        self.arguments = [Value(self.builder, argument) for argument in self.ir.args]

    def number(self, value: int) -> Value:
        """Return a constant."""
        return Value(self.builder, I64(value))

    def range(self, count: int) -> Value:
        """Return the vector of 0, 1, 2, ..."""
        zero = self.number(0).fill(count)
        return zero.constant(range(count))

    def variable(self, value: Any) -> Variable:
        """Return a new variable."""
        return Variable(self.builder, value)

    def allocate(self, size: int) -> Value:
        """Return the address of some bytes on the stack, aligned for any vector."""
        with self.builder.goto_entry_block():
            memory = self.builder.alloca(ir.ArrayType(I8, size))
            memory.align = 64
            return Value(self.builder, self.builder.ptrtoint(memory, I64))

    def load(self, address: Value, element: Any, lanes: int = 1) -> Value:
        """Load a vector, or a number, from an address that is aligned to an element."""
        kind = ir.VectorType(element, lanes) if lanes > 1 else element
        pointer = self.builder.inttoptr(address.value, kind.as_pointer())
        return Value(self.builder, self.builder.load(pointer, align=_get_size(element)))

    def store(self, value: Any, address: Value) -> None:
        """Store a value at an address that is aligned to an element."""
        value = value if isinstance(value, Value) else self.number(value)
        pointer = self.builder.inttoptr(address.value, value.value.type.as_pointer())
        self.builder.store(value.value, pointer, _get_size(value.element))

    def fetch_add(self, address: Value) -> Value:
        """Add 1 to a number in memory atomically, and return its former value."""
        pointer = self.builder.inttoptr(address.value, I64.as_pointer())
        return Value(self.builder, self.builder.atomic_rmw("add", pointer, I64(1), "acq_rel"))

    def load_acquire(self, address: Value) -> Value:
        """Load a number, and synchronize with the thread that wrote it."""
        pointer = self.builder.inttoptr(address.value, I64.as_pointer())
        return Value(self.builder, self.builder.load_atomic(pointer, "acquire", 8))

    def call(self, function: "Function", *arguments: Any) -> Value:
        """Call a function of the same module."""
        values = [a.value if isinstance(a, Value) else I64(a) for a in arguments]
        return Value(self.builder, self.builder.call(function.ir, values))

    @contextmanager
    def loop(self, start: Any, stop: Any, step: Any = 1) -> Iterator[Value]:
        """Repeat what is written inside, for each number of a range."""
        number = self.variable(start)
        with self.repeat(lambda: number.get() < stop):
            now = number.get()
            yield now
            number.set(now + step)

    @contextmanager
    def repeat(self, condition: Callable[[], Value]) -> Iterator[None]:
        """Repeat what is written inside, while a condition holds."""
        head, body, end = (self.ir.append_basic_block() for _ in range(3))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(condition().value, body, end)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(head)
        self.builder.position_at_end(end)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Do what is written inside only if a condition holds."""
        with self.builder.if_then(condition.value):
            yield

    @contextmanager
    def choose(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """Do one of two things: enter the first context for true, the second for false."""
        with self.builder.if_else(condition.value) as branches:
            yield branches

    def finish(self, result: Any = 0) -> None:
        """Return a number."""
        self.builder.ret(result.value if isinstance(result, Value) else I64(result))


def least(a: Value, b: Value | int) -> Value:
    """Return the smaller of two integers."""
    return (a < b).select(a, b)


def _get_size(element: Any) -> int:
    """Return the size of a lane in bytes."""
    return _SIZES.get(element) or element.width // 8


@cache
def _prepare_llvm() -> tuple[str, str]:
    """Prepare LLVM for this processor; return its name and its features."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()


def has_feature(name: str) -> bool:
    """Return whether this processor has a feature of LLVM's list."""
    return f"+{name}" in _prepare_llvm()[1].split(",")


def compile_module(module: Any, names: Sequence[str]) -> list[int]:
    """Compile a module for this processor, and return the addresses of some of its functions.

    Compiled code is never freed, because a finalizer may call it while Python exits.
    """
    cpu, features = _prepare_llvm()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, jit=True)
    parsed = binding.parse_assembly(str(module))
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    addresses = [engine.get_function_address(name) for name in names]
    engine.detach()
    return addresses
