"""Build the golden vectors, ``unidrop/conformance/vectors/``, from the specification in integers.

That is ``reference.py`` and ``reference_family.py`` of ``tests/support/``.

    python tools/make_golden.py           write the file
    python tools/make_golden.py --check   exit with 1 if the file differs from the vectors

The file is JSON with one vector per line. Keys, seeds, words and bit patterns are hexadecimal.
Every plain integer is below 2**53, so any JSON reader reads it exactly. Every p is the shortest
decimal of its double. ``keep`` is the whole mask, and ``u`` decides its first 24 elements. A
computed NaN is the canonical NaN of the dtype, but any NaN conforms.
"""

import argparse
import hashlib
import json
import math
import sys
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import chain, count, cycle, islice, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import reference
import reference_family
from reference import Format, Words

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "unidrop" / "conformance" / "vectors" / "vectors.json"

Vector = dict[str, Any]

SEED, STEP = 42, 7  # for every mask and output without other values
RATES = {"1/3": 1 / 3, "0.1": 0.1, "0.5": 0.5, "0.9": 0.9}
TINY = 2.0**-33  # as a p, half a unit of T


def hexes(numbers: Sequence[int], digits: int = 8) -> list[str]:
    """Return the numbers as hexadecimal strings of a fixed width."""
    return [f"{number:0{digits}x}" for number in numbers]


def generator_vectors() -> list[Vector]:
    """Return Random123's known answers, and inputs that show a wrong word, carry or round."""
    known: list[tuple[Words, tuple[int, int]]] = [
        ((0,) * 4, (0,) * 2),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
    ]
    bits = [[bit if k == j else 0 for k in range(6)] for j in range(6) for bit in (1, 2**31)]
    single = [((a, b, c, d), (k, m)) for a, b, c, d, k, m in bits]
    blocks = [1, 2, 2**32 - 1, 2**32, 2**32 + 5, 2**61 - 1]
    masks = [((n % 2**32, n // 2**32, 0, 0), (0x8D0F18C9, 0x4569F48A)) for n in blocks]
    tags = [((STEP, 0, 0, tag), (SEED, 0)) for tag in (1, 2, 3, 2**31)]
    inputs = known + single + masks + tags
    for _ in range(8):  # the words before are the next counter
        words = reference.philox(*inputs[-1])
        inputs.append((words, (words[2], words[1])))
    return [
        {"counter": hexes(c), "key": hexes(k), "words": hexes(reference.philox(c, k))}
        for c, k in inputs
    ]


def key_vectors() -> list[Vector]:
    """Return seeds, the data to fold in, and the resulting keys."""
    edges = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    texts = ["", "7", "encoder/0", "encoder/1", "Encoder/0", " encoder/0", composed, decomposed]
    texts += [
        "\u5c64/\u4e00",
        "\U0001f3b2",
        "a\0b",
        "x" * 128,
        "x" * 129,
    ]  # BLAKE2b's block is 128 bytes
    chains: list[list[int | str]] = [
        ["encoder/0", 7],
        [7, "encoder/0"],
        ["encoder/0", 3, 7],
        ["encoder/0", 7, 3],
        ["encoder/0", 2**32 - 1],
        ["encoder/0", 2**32],
        [0, 0],
        [0, 0, 0],
        ["", "", ""],
    ]
    cases: list[tuple[int, list[int | str]]] = [(seed, []) for seed in edges]
    cases += [(seed, [0]) for seed in edges]
    items: list[int | str] = [*edges, *texts]
    cases += [(seed, [item]) for seed in (0, SEED, 2**64 - 1) for item in items]
    cases += [(seed, folded) for seed in (0, SEED, 2**63 + 5) for folded in chains]
    return [key_vector(seed, folded) for seed, folded in cases]


def key_vector(seed: int, folded: Sequence[int | str]) -> Vector:
    """Return one vector: a seed, and the chain of data to fold in."""
    key = seed
    for item in folded:
        key = reference.fold_in(key, item)
    items = [{"str": x} if isinstance(x, str) else {"int": f"{x:016x}"} for x in folded]
    return {"seed": f"{seed:016x}", "fold_in": items, "key": f"{key:016x}"}


def mask_vector(
    name: str,
    p: float,
    shape: Sequence[int],
    *,
    seed: int = SEED,
    step: int = STEP,
    broadcast_axes: Collection[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
) -> Vector:
    """Return one mask, with the numbers that decide its first elements."""
    key = reference.fold_in(seed, step)
    indices = reference.mask_indices(
        shape, broadcast_axes=broadcast_axes, global_shape=global_shape, start=start
    )
    keep = reference.keep_mask(
        shape, p, key, broadcast_axes=broadcast_axes, global_shape=global_shape, start=start
    )
    return {
        "name": name,
        "seed": f"{seed:016x}",
        "step": step,
        "key": f"{key:016x}",
        "p": float(p),
        "shape": list(shape),
        "broadcast_axes": list(broadcast_axes),
        "global_shape": None if global_shape is None else list(global_shape),
        "start": None if start is None else list(start),
        "mask_shape": list(reference.mask_shape(shape, broadcast_axes)),
        "u": hexes([reference.u(key, i) for i in indices[:24]]),
        "keep": "".join(map(str, keep)),
    }


def shape_masks() -> Iterator[Vector]:
    """Yield masks of many shapes: around the block of eight, odd, empty, 0-d."""
    for size in (0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 257, 1000):
        yield mask_vector(f"size-{size}", 0.5, [size])
    for shape in (
        *([], [3, 5], [1, 1], [7, 13], [5, 64], [3, 5, 7], [2, 3, 5, 7], [9, 1, 11, 1]),
        *([0, 5], [5, 0], [2, 0, 3]),
    ):
        yield mask_vector(f"shape-{'x'.join(map(str, shape)) or '0d'}", 0.5, shape)


def rate_masks() -> Iterator[Vector]:
    """Yield masks at ordinary rates, and at rates that test the rounding to T."""
    for rate, p in RATES.items():
        yield mask_vector(f"rate-{rate.replace('/', '-over-')}", p, [200])
    yield mask_vector("rate-0", 0.0, [32])
    yield mask_vector("rate-0.001", 0.001, [1000])
    yield mask_vector("rate-0.25", 0.25, [200])
    yield mask_vector("rate-0.999", 0.999, [1000])
    yield mask_vector("rate-1e-12-threshold-0", 1e-12, [32])
    yield mask_vector("rate-2^-33-threshold-0", TINY, [32])
    yield mask_vector("rate-2^-32-threshold-1", 2 * TINY, [32])
    yield mask_vector("rate-3x2^-33-threshold-2", 3 * TINY, [32])
    yield mask_vector("rate-below-1-threshold-2^32", math.nextafter(1, 0), [32])
    yield mask_vector("rate-1", 1.0, [32])


def threshold_masks() -> Iterator[Vector]:
    """Yield masks with T next to the u of one element, so that each bit of u and T matters.

    A T halfway between two integers rounds to the even one: to u if u is even (kept), otherwise to
    u + 1 (dropped).
    """
    key = reference.fold_in(SEED, STEP)
    for i in (0, 6, 10, 1, 9, 13):  # the u of 9 and 10 are odd
        u, element = reference.u(key, i), f"{'odd' if i % 2 else 'even'}-{i}"
        yield mask_vector(f"threshold-equals-u-{element}", u * 2 * TINY, [16])
        yield mask_vector(f"threshold-is-u-plus-1-{element}", (u + 1) * 2 * TINY, [16])
        yield mask_vector(f"threshold-half-above-u-{element}", (2 * u + 1) * TINY, [16])


# At this step, the u of an even element is one less than the u of an odd one. A search found it.
ADJACENT = {"step": 2449780, "even": 52, "odd": 19}


def adjacent_masks() -> Iterator[Vector]:
    """Yield a mask with T equal to the u of an odd element, and to 1 plus the u of an even one."""
    step, even, odd = ADJACENT.values()
    key = reference.fold_in(SEED, step)
    u = reference.u(key, odd)
    assert reference.u(key, even) == u - 1
    name = f"threshold-between-even-{even}-and-odd-{odd}"
    yield mask_vector(name, u * 2 * TINY, [8, 8], step=step)


# Elements with an extreme u, for the key of SEED and STEP: {u: (even, odd)}. A search found them.
EXTREMES = {
    0: (1754467016, 1754467017),
    1: (435121000, 2149238215),
    2**32 - 1: (16648788522, 1652837015),
}


def extreme_masks() -> Iterator[Vector]:
    """Yield windows around elements with u = 0, 1 or 2**32 - 1, which test an extreme T."""
    rates = {
        0: {"2^-33-keeps": TINY, "2^-32-drops": 2 * TINY},
        1: {"2^-32-keeps": 2 * TINY, "3x2^-33-drops": 3 * TINY},
        2**32 - 1: {"1-2^-32-keeps": 1 - 2 * TINY, "1-2^-33-drops": 1 - TINY},
    }
    for u, by_parity in EXTREMES.items():
        for parity, i in zip(("even", "odd"), by_parity, strict=True):
            for rate, p in rates[u].items():
                name = f"{parity}-u-{'2^32-1' if u > 1 else u}-rate-{rate}"
                yield mask_vector(name, p, [5], global_shape=[2**35], start=[i - 2])


def key_masks() -> Iterator[Vector]:
    """Yield masks of seeds and steps around the boundaries of words."""
    seeds = {"0": 0, "42": 42, "2^32": 2**32, "2^63+5": 2**63 + 5, "2^64-1": 2**64 - 1}
    steps = {"0": 0, "7": 7, "2^32-1": 2**32 - 1, "2^32+3": 2**32 + 3, "2^40": 2**40}
    for (a, seed), (b, step) in product(seeds.items(), steps.items()):
        yield mask_vector(f"seed-{a}-step-{b}", 0.5, [24], seed=seed, step=step)


def broadcast_masks() -> Iterator[Vector]:
    """Yield masks with broadcast axes, which are numbered in the mask's own shape."""
    for name, shape, axes in (
        ("none", [3, 5], []),
        ("leading", [4, 19], [0]),
        ("trailing", [19, 4], [1]),
        ("middle", [3, 5, 7], [1]),
        ("all", [3, 5], [0, 1]),
        ("channel-dropout", [3, 9, 4, 5], [2, 3]),
        ("channel-dropout-channels-last", [3, 4, 5, 9], [1, 2]),
        ("locked-dropout", [6, 3, 11], [0]),
        ("drop-path", [13, 4, 2], [1, 2]),
        ("of-length-1", [17, 1], [1]),
        ("of-length-0", [3, 0], [1]),
        ("beside-length-0", [0, 3], [1]),
    ):
        yield mask_vector(f"broadcast-{name}", 0.5, shape, broadcast_axes=axes)


def window_masks() -> Iterator[Vector]:
    """Yield windows, which are blocks of a whole mask."""
    for name, shape, whole, start in (
        ("whole", [5, 7], [5, 7], [0, 0]),
        ("empty", [0, 4], [5, 7], [2, 1]),
        ("empty-at-the-end", [0], [5], [5]),
        ("0d", [], [], []),
        ("aligned", [16], [100], [8]),
        ("unaligned-1", [16], [100], [1]),
        ("unaligned-7", [2], [100], [7]),
        ("unaligned-13", [30], [100], [13]),
        ("to-the-end", [9], [100], [91]),
        ("rows-of-64", [2, 64], [6, 64], [3, 0]),
        ("columns-of-64", [6, 16], [6, 64], [0, 24]),
        ("inner-of-64", [3, 11], [6, 64], [2, 37]),
        ("rows-of-37", [2, 37], [6, 37], [3, 0]),
        ("columns-of-37", [6, 16], [6, 37], [0, 8]),
        ("inner-of-37", [3, 11], [6, 37], [2, 13]),
        ("one-column-of-64", [6, 1], [6, 64], [0, 21]),
        ("one-column-of-37", [6, 1], [6, 37], [0, 36]),
        ("one-column-of-1", [6, 1], [9, 1], [2, 0]),
        ("inner-3d", [2, 3, 5], [4, 7, 11], [1, 2, 3]),
        ("last-axis-1-3d", [2, 3, 1], [4, 7, 11], [1, 2, 10]),
        ("across-index-2^31", [24], [2**33], [2**31 - 11]),
        ("across-index-2^32", [24], [2**33], [2**32 - 11]),
        ("across-index-2^32-2d", [3, 9], [2**20, 2**13 - 1], [524351, 60]),
        ("across-index-2^35", [24], [2**36], [2**35 - 11]),
        ("across-index-2^35-2d", [2, 24], [2**20, 2**16], [2**19 - 1, 2**16 - 24]),
        ("from-index-2^35", [24], [2**36], [2**35]),
        ("across-index-2^53", [2, 12], [2**26, 2**28], [2**25 - 1, 2**28 - 12]),
        ("across-index-2^63", [2, 12], [2**32, 2**32], [2**31 - 1, 2**32 - 12]),
        ("to-index-2^64-1", [2, 12], [2**32, 2**32], [2**32 - 2, 2**32 - 12]),
        ("to-index-2^64-1-3d", [1, 2, 7], [2**21, 2**22, 2**21], [2**21 - 1, 2**22 - 2, 2**21 - 7]),
        ("rows-rounded-up-to-8", [5, 13], [5, 16], [0, 0]),
    ):
        yield mask_vector(f"window-{name}", 0.5, shape, global_shape=whole, start=start)


def broadcast_window_masks() -> Iterator[Vector]:
    """Yield windows of broadcast masks. ``start`` along a broadcast axis has no effect."""
    for name, shape, axes, whole, start in (
        ("channels", [2, 5, 4, 4], [2, 3], [6, 9, 8, 8], [3, 2, 4, 4]),
        ("middle", [3, 8, 4], [1], [6, 40, 5], [2, 17, 1]),
        ("trailing", [11, 3], [1], [40, 9], [13, 6]),
        ("leading", [3, 11], [0], [9, 40], [6, 13]),
        ("all", [3, 2], [0, 1], [9, 8], [6, 2]),
        ("across-index-2^35", [24, 2], [1], [2**36, 6], [2**35 - 11, 4]),
    ):
        yield mask_vector(
            f"window-broadcast-{name}",
            0.5,
            shape,
            broadcast_axes=axes,
            global_shape=whole,
            start=start,
        )


def mask_vectors() -> list[Vector]:
    """Return all masks."""
    return [
        *shape_masks(),
        *rate_masks(),
        *threshold_masks(),
        *adjacent_masks(),
        *extreme_masks(),
        *key_masks(),
        *broadcast_masks(),
        *window_masks(),
        *broadcast_window_masks(),
    ]


def components(dtype: str) -> int:
    """Return the number of patterns per element."""
    return 2 if dtype in reference.COMPONENTS else 1


def specials(dtype: str, p: float) -> list[int]:
    """Return the patterns that reveal errors in arithmetic."""
    fmt = reference.component_format(dtype)
    name = reference.COMPONENTS.get(dtype, dtype)
    one = fmt.encode(Fraction(1))
    rate = p if p < 1 else 0.5  # p = 1 forms no product
    overflows = bisect_left(
        range(fmt.infinity),
        fmt.infinity,
        key=lambda magnitude: reference.dropout_bits([magnitude], name, [1], rate)[0],
    )
    return [
        fmt.nan,
        fmt.infinity,
        fmt.sign | fmt.infinity,
        fmt.sign,  # -0
        2 * fmt.sign - 1,  # a NaN of all ones, which becomes 0 if a rounding adds to it
        fmt.infinity - 1,  # the largest finite number
        1,  # the smallest subnormal
        one,
        overflows,  # the smallest x whose product is infinite
        overflows - 1,
        fmt.sign | fmt.infinity - 1,
        fmt.normal,
        fmt.normal - 1,  # the largest subnormal
        fmt.sign | 1,
        fmt.sign | one,
        0,
    ]


def ordinary(fmt: Format, site: str) -> Iterator[int]:
    """Yield random patterns of finite normal numbers."""
    key = reference.fold_in(reference.fold_in(0, "golden inputs"), site)
    for n in count():
        pattern = (reference.u(key, 4 * n) << 32 | reference.u(key, 4 * n + 2)) % (2 * fmt.sign)
        if fmt.normal <= pattern % fmt.sign < fmt.infinity:
            yield pattern


def component_patterns(dtype: str, p: float, keep: Sequence[int], component: int) -> list[int]:
    """Return one pattern per element, with specials for dropped and, in turn, for kept elements.

    The two components of a complex number take turns, to reveal a product that mixes them.
    """
    fmt = reference.component_format(dtype)
    patterns = specials(dtype, p)
    dropped, kept = cycle(patterns), cycle(patterns[8:] + patterns[:8])
    plain = ordinary(fmt, f"{dtype} {component}")
    turn = component
    x = []
    for decision in keep:
        turn += decision
        x.append(next(plain if turn % 2 else kept) if decision else next(dropped))
    return x


def spread(dtype: str, size: int) -> list[int]:
    """Return the patterns of ordinary values spread evenly over [-8, 8]."""
    fmt = reference.FORMATS[dtype]
    key = reference.fold_in(0, "golden spread")
    values = [Fraction(reference.u(key, i) - 2**31, 2**28) for i in range(size)]
    return [(fmt.sign if value < 0 else 0) | fmt.encode(abs(value)) for value in values]


def output_keep(size: int, p: float) -> list[int]:
    """Return the decisions of an output of ``size`` elements."""
    return reference.keep_mask([size], p, reference.fold_in(SEED, STEP))


def output_vector(name: str, dtype: str, p: float, x: Sequence[int]) -> Vector:
    """Return one output, for the mask of SEED and STEP."""
    fmt = reference.component_format(dtype)
    digits = (fmt.exponent_bits + fmt.fraction_bits + 1) // 4
    size = len(x) // components(dtype)
    keep = output_keep(size, p)
    return {
        "name": name,
        "seed": f"{SEED:016x}",
        "step": STEP,
        "key": f"{reference.fold_in(SEED, STEP):016x}",
        "p": float(p),
        "dtype": dtype,
        "shape": [size],
        "x": hexes(x, digits),
        "keep": "".join(map(str, keep)),
        "y": hexes(reference.dropout_bits(x, dtype, keep, p), digits),
    }


def special_outputs() -> Iterator[Vector]:
    """Yield 64 elements for each dtype and rate, half of them special cases."""
    rates = RATES | {"0": 0.0, "1": 1.0, "0.4": 0.4}
    for dtype, (rate, p) in product([*reference.FORMATS, *reference.COMPONENTS], rates.items()):
        keep = output_keep(64, p)
        columns = [component_patterns(dtype, p, keep, c) for c in range(components(dtype))]
        x = list(chain.from_iterable(zip(*columns, strict=True)))
        yield output_vector(f"{dtype}-rate-{rate.replace('/', '-over-')}", dtype, p, x)


def rounding_outputs() -> Iterator[Vector]:
    """Yield outputs that reveal how a 16-bit product was rounded.

    Spread values reveal a scale that was rounded to x's dtype. The products of the other values
    are halfway between two numbers if scale and product are float32. At 1/3 they reveal a wider
    scale, and at 0.4 a wider product.
    """
    for dtype in ("float16", "bfloat16"):
        fmt = reference.FORMATS[dtype]
        yield output_vector(f"{dtype}-spread-over-8", dtype, 0.1, spread(dtype, 4096))
        one = fmt.encode(Fraction(1))
        binade = range(one, one + fmt.normal)
        first = {"float16": 209, "bfloat16": 37}[dtype]  # an exhaustive search found it
        halfway = list(islice(cycle(binade[first::12]), 64))
        yield output_vector(f"{dtype}-halfway-rate-0.4", dtype, 0.4, halfway)
        yield output_vector(f"{dtype}-halfway-rate-1-over-3", dtype, 1 / 3, binade[1::4][:64])


def digest_vectors() -> Iterator[Vector]:
    """Yield masks that are too long to write down: the number kept, and a digest of their bits.

    Each byte packs eight bits, the first one highest. Zeros fill up the last byte.
    """
    shape, p, seed, step = (3, 601, 601), 0.1, 42, 3
    keep = reference.keep_mask(shape, p, reference.fold_in(seed, step))
    bits = "".join(map(str, keep))
    bits += "0" * (-len(bits) % 8)
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    yield {
        "name": "a-million-elements",
        "seed": f"{seed:016x}",
        "step": step,
        "p": p,
        "shape": list(shape),
        "kept": sum(keep),
        "blake2b": hashlib.blake2b(packed, digest_size=8).hexdigest(),
    }


def attention_vectors() -> Iterator[Vector]:
    """Yield attention of few queries and keys. Its mask is an ordinary mask of its weights."""
    yield attention_vector("groups", (2, 4, 3, 5), 4, groups=2)
    yield attention_vector("causal", (1, 2, 7, 9), 4, groups=2, is_causal=True)


def attention_vector(
    name: str, shape: Sequence[int], features: int, *, groups: int, is_causal: bool = False
) -> Vector:
    """Return one attention, with inputs that every dtype holds and the output in double."""
    p = 0.4
    batch, heads, queries, keys = shape
    key = reference.fold_in(SEED, STEP)
    keep = reference.keep_mask(list(shape), p, key)
    q = small_numbers("queries", (batch * heads, queries, features))
    k, v = (small_numbers(site, (batch * groups, keys, features)) for site in ("keys", "values"))
    y = []
    for head, row in product(range(batch * heads), range(queries)):
        own = head * groups // heads  # the keys of a group serve successive heads
        seen = row + 1 if is_causal else keys
        first = (head * queries + row) * keys
        y += attend(q[head][row], k[own][:seen], v[own][:seen], keep[first : first + seen], p)
    return {
        "name": f"attention-{name}",
        "seed": f"{SEED:016x}",
        "step": STEP,
        "key": f"{key:016x}",
        "p": p,
        "is_causal": is_causal,
        "query_shape": [batch, heads, queries, features],
        "key_shape": [batch, groups, keys, features],
        "q": flatten(q),
        "k": flatten(k),
        "v": flatten(v),
        "mask_shape": list(shape),
        "keep": "".join(map(str, keep)),
        "y": y,
    }


def small_numbers(site: str, shape: tuple[int, int, int]) -> list[list[list[float]]]:
    """Return multiples of 1/4 in [-2, 2)."""
    key = reference.fold_in(reference.fold_in(0, "golden attention"), site)
    indices = count()
    heads, length, features = shape
    return [
        [
            [reference.u(key, next(indices)) // 2**28 / 4 - 2 for _ in range(features)]
            for _ in range(length)
        ]
        for _ in range(heads)
    ]


def flatten(heads: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """Return all numbers of nested lists in C order."""
    return [x for rows in heads for row in rows for x in row]


def attend(
    query: Sequence[float],
    keys: Sequence[Sequence[float]],
    values: Sequence[Sequence[float]],
    keep: Sequence[int],
    p: float,
) -> list[float]:
    """Return the output of one query, rounded once: decimals have the same digits everywhere."""
    with localcontext(prec=50):
        scale = 1 / Decimal(len(query)).sqrt()
        scores = [
            sum(Decimal(a) * Decimal(b) for a, b in zip(query, key, strict=True)) for key in keys
        ]
        weights = [(score * scale).exp() for score in scores]
        total = sum(weights) * (1 - Decimal(p))
        return [
            float(
                sum(
                    (w * Decimal(x) for w, x, k in zip(weights, column, keep, strict=True) if k),
                    Decimal(0),
                )
                / total
            )
            for column in zip(*values, strict=True)
        ]


# Members with the shapes and options of the matrix, so that compiled modes can compare them.
SHAPES = {"drop_block": (2, 2, 5, 6), "patch_dropout": (4, 9, 3)}
OPTIONS: dict[str, list[Vector]] = {
    "drop_path": [{"scale_by_keep": False}, {"scale_by_keep": True}],
    "drop_head": [{"axis": 1}, {"axis": 2}],
    "locked_dropout": [{"axis": 1}, {"axis": 0}],
    "drop_block": [{"block_size": 3, "axes": [2, 3]}, {"block_size": 2, "axes": [2, 3]}],
    "patch_dropout": [
        {"num_prefix_tokens": 1, "ordered": False},
        {"num_prefix_tokens": 1, "ordered": True},
        {"num_prefix_tokens": 0, "ordered": False},
    ],
}

# At these steps, the word of a normal deviate is in level 2 and in level 3 of the table. A search
# found them.
TAILS = (865, 1822179)

# At this step, two words of a permutation of 64 are equal. A search found it.
TIE = {"step": 3532259, "length": 64}


def member_vectors() -> Iterator[Vector]:
    """Yield outputs of members: each dtype with the first options, and single precision with all.

    At another parameter, formulas round otherwise. Noise has a standard deviation, not a rate.
    """
    for member in reference_family.MEMBERS:
        shape = SHAPES.get(member, (8, 3, 4))
        cases = OPTIONS.get(member, [{}])
        name = "stddev" if member == "gaussian_noise" else "p"
        for dtype in reference.FORMATS:
            yield member_vector(member, dtype, shape, {name: 0.4, **cases[0]})
        for options in cases[1:]:
            yield member_vector(member, "float32", shape, {name: 0.4, **options})
        another = 1.0 if name == "stddev" else 0.9
        yield member_vector(member, "float32", shape, {name: another, **cases[0]})
        for step in TAILS if member.startswith("gaussian") else ():
            yield member_vector(member, "float32", shape, {name: 0.4}, step=step)
    step, length = TIE.values()
    options = {"p": 0.01, "num_prefix_tokens": 0, "ordered": False}
    yield member_vector("patch_dropout", "float32", (1, length), options, step=step)


def member_vector(
    member: str, dtype: str, shape: tuple[int, ...], options: Vector, *, step: int = STEP
) -> Vector:
    """Return one output of a member."""
    fmt = reference.FORMATS[dtype]
    digits = (fmt.exponent_bits + fmt.fraction_bits + 1) // 4
    key = reference.fold_in(SEED, step)
    x = member_patterns(dtype, math.prod(shape))
    y = reference_family.MEMBERS[member](x, shape, dtype, key, **options)
    output_shape = list(shape)
    if member == "patch_dropout":
        output_shape = reference_family.patch_shape(
            shape, options["p"], options["num_prefix_tokens"]
        )
    described = ", ".join(f"{name} {value}" for name, value in options.items())
    return {
        "name": f"{member}-{dtype}: {described}" + f", step {step}" * (step != STEP),
        "member": member,
        "seed": f"{SEED:016x}",
        "step": step,
        "key": f"{key:016x}",
        "options": options,
        "dtype": dtype,
        "shape": list(shape),
        "x": hexes(x, digits),
        "output_shape": output_shape,
        "y": hexes(y, digits),
    }


def member_patterns(dtype: str, size: int) -> list[int]:
    """Return patterns of different ordinary numbers, and a special one for every seventh element.

    None is subnormal, because libraries may flush those.
    """
    fmt = reference.FORMATS[dtype]
    special = cycle([fmt.nan, fmt.infinity, fmt.sign, fmt.sign | fmt.infinity, fmt.infinity - 1, 0])
    return [next(special) if i % 7 == 6 else x for i, x in enumerate(spread(dtype, size))]


def permutation_vectors() -> Iterator[Vector]:
    """Yield permutations: of rows whose words start anywhere in a block, and of equal words."""
    tie = [1, TIE["length"]]
    shapes = ([2, 5], [3, 1], [1, 8], [7, 9])
    for step, shape in (*((STEP, shape) for shape in shapes), (TIE["step"], tie)):
        key = reference.fold_in(SEED, step)
        yield {
            "name": f"{'x'.join(map(str, shape))}-step-{step}",
            "seed": f"{SEED:016x}",
            "step": step,
            "key": f"{key:016x}",
            "shape": shape,
            "indices": list(chain.from_iterable(reference_family.permutations(shape, key))),
        }


def build() -> str:
    """Return the text of the file."""
    sections = {
        "generator": generator_vectors(),
        "keys": key_vectors(),
        "masks": mask_vectors(),
        "digests": digest_vectors(),
        "outputs": [*special_outputs(), *rounding_outputs()],
        "attention": list(attention_vectors()),
        "permutations": list(permutation_vectors()),
        "members": list(member_vectors()),
    }
    parts = [f'"stream": {reference.STREAM_VERSION}']
    for section, vectors in sections.items():
        parts.append(f'"{section}": [\n' + ",\n".join(map(json.dumps, vectors)) + "\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    """Write or check the file, and return the exit status."""
    parser = argparse.ArgumentParser(description="Build the golden vectors.")
    parser.add_argument("--check", action="store_true", help="compare the file, write nothing")
    text = build().encode("ascii")
    if parser.parse_args().check:
        if GOLDEN.is_file() and GOLDEN.read_bytes() == text:
            return 0
        print(f"{GOLDEN} is not what tools/make_golden.py builds: run it", file=sys.stderr)
        return 1
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_bytes(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
