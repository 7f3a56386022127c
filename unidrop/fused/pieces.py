"""Functions of a kernel that handle some elements, whose words stay in registers where they can."""

from typing import Any, Final

from unidrop.fused.generator import BLOCKS, LANES, Consecutive, generate
from unidrop.fused.llvm import F64, I8, I32, I64, Function, Value, has_feature, least
from unidrop.fused.products import Kind
from unidrop.words import MASK32

__all__ = ["BLOCK_SIZE", "GROUP", "MANY_BLOCKS", "RUN_BLOCKS", "Pieces"]

GROUP: Final = 8 * BLOCKS  # the elements of a group of blocks
BLOCK_SIZE: Final = 32  # bytes of the words of a block
RUN_BLOCKS: Final = 64  # that `Pieces.generate_run` generates at most

# Blocks that are computed together. More hide more latency, as long as registers suffice.
MANY_BLOCKS: Final = BLOCKS * (4 if has_feature("avx512f") else 2)


class Pieces:
    """The functions of a module that handle some elements of a dtype.

    Words, numbers of blocks, x and y are addresses. Indices and counts are in elements.
    """

    def __init__(self, module: Any, kind: Kind) -> None:
        self.module, self.kind = module, kind
        self.generate = self._define_generate()
        self.generate_run = self._define_generate_run()
        self.select = self._define_select()
        self.drop = self._define_drop()
        self.piece = self._define_piece()
        self.span = self._define_span()

    def _store(
        self, f: Function, words: Value, x: Value, y: Value, threshold: Value, scale: Value
    ) -> None:
        """Write the output of a vector of elements whose words are given, or of a single one."""
        keep = words >= threshold.convert("trunc", I32)
        width, lanes = self.kind.width, words.lanes * self.kind.width
        if self.kind.multiply is None:
            f.store(keep.convert("zext", I8), y)
            return
        keep = keep.shuffle([lane // width for lane in range(lanes)])
        elements = f.load(x, self.kind.element, lanes)
        product = self.kind.multiply(elements, scale.convert("bitcast", F64))
        f.store(keep.select(product, 0), y)

    def _define_generate(self) -> Function:
        """Write the words of blocks whose numbers are given. Both buffers are padded by a group."""
        f = Function(self.module, "generate", 4)
        words, numbers, count, key = f.arguments

        def write(blocks: Value, high: Value, i: Value) -> None:
            for j, vector in enumerate(generate((blocks, high, 0, 0), key)):
                f.store(vector, words + i * BLOCK_SIZE + 4 * LANES * j)

        done = f.variable(0)
        with f.repeat(lambda: done.get() < count):
            i = done.get()
            blocks = f.load(numbers + i * 8, I64, MANY_BLOCKS)
            first = blocks.lane(0)
            is_uniform = ((blocks ^ first) >= 1 << 32).any().equals(0)
            with f.choose((i + (MANY_BLOCKS - 1) < count) & is_uniform) as (wide, narrow):
                with wide:
                    write(blocks, first >> 32, i)
                    done.set(i + MANY_BLOCKS)
                with narrow:
                    blocks = f.load(numbers + i * 8, I64, BLOCKS)
                    write(blocks, blocks >> 32, i)
                    done.set(i + BLOCKS)
        f.finish()
        return f

    def _define_select(self) -> Function:
        """Write the output of elements whose words are given."""
        f = Function(self.module, "select", 6)
        words, x, y, count, threshold, scale = f.arguments
        size = self.kind.size
        done = count & -LANES
        with f.loop(0, done, LANES) as i:
            vector = f.load(words + i * 4, I32, LANES)
            self._store(f, vector, x + i * size, y + i * size, threshold, scale)
        with f.loop(done, count) as i:
            word = f.load(words + i * 4, I32)
            self._store(f, word, x + i * size, y + i * size, threshold, scale)
        f.finish()
        return f

    def _define_drop(self) -> Function:
        """Write the output of whole groups, from a block on; its low word must not wrap."""
        f = Function(self.module, "drop", 7)
        x, y, block, count, key, threshold, scale = f.arguments
        size = self.kind.size
        low, high, many = block & MASK32, block >> 32, 8 * MANY_BLOCKS
        with f.loop(0, count & -many, many) as i:
            counter = (Consecutive(low + (i >> 3), MANY_BLOCKS), high, 0, 0)
            for j, vector in enumerate(generate(counter, key)):
                offset = (i + LANES * j) * size
                self._store(f, vector, x + offset, y + offset, threshold, scale)
        with f.loop(count & -many, count, GROUP) as i:
            counter = (Consecutive(low + (i >> 3), BLOCKS), high, 0, 0)
            for j, vector in enumerate(generate(counter, key)):
                offset = (i + LANES * j) * size
                self._store(f, vector, x + offset, y + offset, threshold, scale)
        f.finish()
        return f

    def _define_generate_run(self) -> Function:
        """Write the words of consecutive elements; return the address of the first one's word."""
        f = Function(self.module, "generate_run", 4)
        words, index, count, key = f.arguments
        offset = index & 7
        numbers = f.allocate(8 * (RUN_BLOCKS + MANY_BLOCKS))
        blocks = (offset + count + 7) >> 3
        with f.loop(0, blocks, BLOCKS) as i:
            f.store((index >> 3) + i + f.range(BLOCKS), numbers + i * 8)
        f.call(self.generate, words, numbers, blocks, key)
        f.finish(words + offset * 4)
        return f

    def _define_piece(self) -> Function:
        """Write the output of at most a group, which may begin inside a block."""
        f = Function(self.module, "piece", 7)
        x, y, index, count, key, threshold, scale = f.arguments
        words = f.allocate(BLOCK_SIZE * 2 * BLOCKS)
        first = f.call(self.generate_run, words, index, count, key)
        f.call(self.select, first, x, y, count, threshold, scale)
        f.finish()
        return f

    def _define_span(self) -> Function:
        """Write the output of elements that are neighbors in the mask's numbering."""
        f = Function(self.module, "span", 7)
        x, y, index, count, *others = f.arguments
        size = self.kind.size
        done = f.variable(0)

        def advance(function: Function, length: Value) -> None:
            now = done.get()
            where = index + now if function is self.piece else (index + now) >> 3
            f.call(function, x + now * size, y + now * size, where, length, *others)
            done.set(now + length)

        head = least((f.number(0) - index) & 7, count)
        with f.when(f.number(0) < head):
            advance(self.piece, head)
        with f.repeat(lambda: done.get() < count):
            now = done.get()
            left = count - now
            # The elements up to the block at which the counter's low word wraps.
            until = (f.number(1 << 32) - (((index + now) >> 3) & MASK32)) << 3
            whole = least(left, until) & -GROUP
            with f.choose(whole < 1) as (few, many):
                with few:
                    advance(self.piece, least(left, GROUP))
                with many:
                    advance(self.drop, whole)
        f.finish()
        return f
