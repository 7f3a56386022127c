# ruff: noqa: N803 - Triton writes constants in capitals
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
"""Kernels of attention for a GPU, with dropout of its weights, in Triton.

Requirements this design meets:

* The mask is dropout's mask of the weights, of shape (batch, heads, queries, keys). A tile computes
  its part of the mask in registers, so the mask does not depend on the tiles, and is never stored.
* Rows of the mask may begin anywhere in a block. The decisions of a block are the bits of a number.
  A shift then moves them between two neighbors, and only numbers pass between threads.
* The backward pass recomputes weights and mask. The gradient of queries sums over keys, and
  the gradients of keys and values sum over queries. Two kernels do so, and no sum is atomic.

The *sizes* of a query are its highest score, and the logarithm of the total of exponentials of the
differences to it. Their sum would lose the second where a mask adds -1e9 to all scores of a query.
The weights of a query without keys are 0, and its second size is -inf.

T. Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning",
arXiv:2307.08691 (2023).
"""

import triton
import triton.language as tl

from unidrop.fused.triton.kernels import _get_key, _get_stride, _get_u, _philox_of_blocks

__all__ = ["attend", "differentiate_keys", "differentiate_queries"]

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# The maximum of no scores. Unlike -inf, it has a difference to a score of -inf.
_LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


# --- The mask -------------------------------------------------------------------------------------


@triton.jit
def _get_keep(first, least, k0, k1, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              ALIGNED: tl.constexpr):  # fmt: skip
    """Return which weights of a tile are kept; ``first`` numbers the first one of each row.

    ALIGNED: rows begin with a block.
    """
    block = (first >> 3)[:, None] + tl.arange(0, COLUMNS // 8).to(tl.uint64)[None, :]
    bits = _get_bits(block, least, k0, k1, ROWS, COLUMNS // 8)
    if not ALIGNED:
        bits |= _get_bits(block + 1, least, k0, k1, ROWS, COLUMNS // 8) << 8
        bits >>= (first & 7).to(tl.uint32)[:, None]
    each = bits[:, :, None] >> tl.arange(0, 8).to(tl.uint32)[None, None, :]
    return tl.reshape((each & 1) != 0, [ROWS, COLUMNS])


@triton.jit
def _get_bits(block, least, k0, k1, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the decisions of blocks of the mask: bit i of a number is 1 if element i is kept.

    Without the sum, the compiler would compute each block in every thread that has an element.
    """
    w0, w1, w2, w3 = _philox_of_blocks(block, k0, k1)
    keep = tl.reshape(_get_u(w0, w1, w2, w3, 0, 1) >= least, [ROWS, BLOCKS, 8])
    return tl.sum(keep.to(tl.uint32) << tl.arange(0, 8).to(tl.uint32)[None, None, :], 2)


@triton.jit
def _drop(x, first, least, k0, k1, ALIGNED: tl.constexpr, KEEPS: tl.constexpr):
    """Return the elements of a tile that the mask keeps, and 0 for the others."""
    if KEEPS == "all":
        return x
    elif KEEPS == "none":  # noqa: RET505 - Triton compares the types of returns
        return tl.zeros_like(x)
    else:
        keep = _get_keep(first, least, k0, k1, x.shape[0], x.shape[1], ALIGNED)
        return tl.where(keep, x, 0.0)


# --- Tiles ----------------------------------------------------------------------------------------


@triton.jit
def _locate(x_ptr, batch, head, x_batch, x_head, UNIT: tl.constexpr):
    """Return a pointer to the first element of a head; UNIT divides the strides."""
    return x_ptr + tl.multiple_of(batch * x_batch.to(tl.int64) + head * x_head.to(tl.int64), UNIT)


@triton.jit
def _get_place(row, x_row, feature, UNIT: tl.constexpr):
    """Return the places of rows of a head, from its first element."""
    stride = _get_stride(x_row, False, UNIT, tl.int64)
    return row[:, None].to(tl.int64) * stride + feature[None, :]


@triton.jit
def _is_inside(row, rows, feature, FEATURES: tl.constexpr):
    """Return which elements of a padded tile exist."""
    inside = (row < rows)[:, None]
    if feature.shape[0] == FEATURES:
        return inside
    else:  # noqa: RET505
        return inside & (feature < FEATURES)[None, :]


@triton.jit
def _load(first, row, x_row, rows, feature, FEATURES: tl.constexpr, UNIT: tl.constexpr):
    inside = _is_inside(row, rows, feature, FEATURES)
    return tl.load(first + _get_place(row, x_row, feature, UNIT), mask=inside, other=0.0)


@triton.jit
def _store(first, x, row, x_row, rows, feature, FEATURES: tl.constexpr, UNIT: tl.constexpr):
    inside = _is_inside(row, rows, feature, FEATURES)
    place = _get_place(row, x_row, feature, UNIT)
    tl.store(first + place, x.to(first.dtype.element_ty), mask=inside)


@triton.jit
def _exp(x):
    """Return the exponential; `tl.exp` takes three instructions more, for subnormal results."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _get_place_in_whole(place_ptr, base, diagonal, queries, keys):
    """Return the number of the first weight in the mask, and the diagonal, of 32 bits."""
    if place_ptr is not None:
        base = tl.load(place_ptr)
        wide = tl.load(place_ptr + 1)
        diagonal = tl.minimum(tl.maximum(wide, -queries.to(tl.int64)), keys.to(tl.int64))
    return base.to(tl.uint64), diagonal.to(tl.int32)


@triton.jit
def _get_scores(
    first, second, bias_ptr, scale, row, column, rows, columns, bias_row, diagonal,
    CAUSAL: tl.constexpr, BIAS_STEP: tl.constexpr,
):  # fmt: skip
    """Return the products of rows of two matrices as scores, -inf for pairs that do not attend.

    One matrix has queries, and their numbers ``row`` have an axis of length 1 for the other one.

    ``bias_ptr`` points to a number that is added, or to a bool that is true for pairs that attend.
    A query attends to keys up to its own number plus the diagonal if CAUSAL.
    """
    scores = tl.dot(first, tl.trans(second), input_precision="ieee") * scale
    attends = column < columns
    if CAUSAL:
        attends = attends & (column <= row + diagonal)
    if bias_ptr is not None:
        inside = (row < rows) & (column < columns)
        place = row.to(tl.int64) * bias_row + column * BIAS_STEP
        bias = tl.load(bias_ptr + place, mask=inside, other=0)
        if bias.dtype == tl.int1:
            attends = attends & bias
        else:
            scores += bias.to(tl.float32)
    return tl.where(attends, scores, float("-inf"))


# --- The output -----------------------------------------------------------------------------------


_NUMBERS = [
    *("key_ptr", "place_ptr", "sizes_ptr", "delta_ptr", "upstream_lse_ptr"),
    *("key", "base", "threshold", "keep_scale", "scale"),
    *("mask_batch", "mask_head", "mask_row"),
    *("heads", "group", "queries", "keys", "diagonal"),
    *(f"{x}_{axis}" for x in ("q", "k", "v", "bias") for axis in ("batch", "head", "row")),
    *(f"{x}_{axis}" for x in ("o", "do", "dq", "dk", "dv") for axis in ("batch", "head", "row")),
]


@triton.jit(do_not_specialize=_NUMBERS)
def attend(
    q_ptr, k_ptr, v_ptr, bias_ptr, o_ptr, sizes_ptr, key_ptr, place_ptr,
    key: tl.int64, base: tl.int64, threshold: tl.int32, keep_scale: tl.float32, scale: tl.float32,
    mask_batch: tl.int64, mask_head: tl.int64, mask_row: tl.int64,
    heads: tl.int32, group: tl.int32, queries: tl.int32, keys: tl.int32, diagonal: tl.int32,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    bias_batch: tl.int64, bias_head: tl.int64, bias_row: tl.int64,
    o_batch: tl.int64, o_head: tl.int64, o_row: tl.int64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
    V_FEATURES: tl.constexpr, V_WIDTH: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    KEEPS: tl.constexpr, UNIT: tl.constexpr, BIAS_STEP: tl.constexpr,
):  # fmt: skip
    """Compute ROWS of the output, and the sizes of these queries.

    ``place_ptr`` points to the numbers that replace ``base`` and ``diagonal``, as int64.
    ALIGNED: every row of the mask begins with a block. KEEPS: "all", "some" or "none" of the
    weights. UNIT: a number that divides strides. WIDTH: FEATURES, rounded up to a power of 2.
    BIAS_STEP: the distance between keys in ``bias_ptr``, 0 or 1.
    """
    k0, k1 = _get_key(key_ptr, key)
    base, diagonal = _get_place_in_whole(place_ptr, base, diagonal, queries, keys)
    least = threshold.to(tl.uint32)
    tiles = tl.cdiv(queries, ROWS)
    number = tl.program_id(0) // tiles
    batch, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    first_row = tl.program_id(0) % tiles * ROWS
    row = first_row + tl.arange(0, ROWS)
    feature, v_feature = tl.arange(0, WIDTH), tl.arange(0, V_WIDTH)
    q_first = _locate(q_ptr, batch, head, q_batch, q_head, UNIT)
    k_first = _locate(k_ptr, batch, head // group, k_batch, k_head, UNIT)
    v_first = _locate(v_ptr, batch, head // group, v_batch, v_head, UNIT)
    if bias_ptr is not None:
        bias_ptr = _locate(bias_ptr, batch, head, bias_batch, bias_head, 1)
    index = base + (batch * mask_batch + head * mask_head).to(tl.uint64)
    index = index + row.to(tl.uint64) * mask_row.to(tl.uint64)

    q = _load(q_first, row, q_row, queries, feature, FEATURES, UNIT)
    top = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, V_WIDTH], tl.float32)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, tl.maximum(first_row + ROWS + diagonal, 0))
    for first_column in range(0, stop, COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)
        k = _load(k_first, column, k_row, keys, feature, FEATURES, UNIT)
        v = _load(v_first, column, v_row, keys, v_feature, V_FEATURES, UNIT)
        scores = _get_scores(
            q, k, bias_ptr, scale, row[:, None], column[None, :], queries, keys, bias_row,
            diagonal, CAUSAL, BIAS_STEP,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = _exp(scores - higher[:, None])
        shrink = _exp(top - higher)
        top = higher
        total = total * shrink + tl.sum(weights, 1)
        weights = _drop(weights, index + first_column, least, k0, k1, ALIGNED, KEEPS)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision="ieee")
    # The total of a query without keys is 0, and all others are at least 1.
    sums *= (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    o_first = _locate(o_ptr, batch, head, o_batch, o_head, UNIT)
    _store(o_first, sums, row, o_row, queries, v_feature, V_FEATURES, UNIT)
    sizes = sizes_ptr + (number.to(tl.int64) * queries + row) * 2
    tl.store(sizes, top, mask=row < queries)
    tl.store(sizes + 1, tl.log(total), mask=row < queries)


# --- The gradients --------------------------------------------------------------------------------


@triton.jit
def _load_sizes(sizes_ptr, of_head, row, rows):
    """Return the sizes of queries; a second one of inf makes all weights of a query 0."""
    sizes = sizes_ptr + (of_head + row) * 2
    top = tl.load(sizes, mask=row < rows, other=0.0)
    log_total = tl.load(sizes + 1, mask=row < rows, other=float("-inf"))
    return top, tl.where(log_total == float("-inf"), float("inf"), log_total)


@triton.jit
def _get_weights(scores, top, log_total):
    """Return the weights of scores; the product of a logarithm takes no instruction per weight."""
    return tl.exp2((scores - top) * _LOG2_E - log_total * _LOG2_E)


@triton.jit(do_not_specialize=_NUMBERS)
def differentiate_queries(
    q_ptr, k_ptr, v_ptr, bias_ptr, o_ptr, sizes_ptr, key_ptr, place_ptr, do_ptr, upstream_lse_ptr,
    delta_ptr, dq_ptr,
    key: tl.int64, base: tl.int64, threshold: tl.int32, keep_scale: tl.float32, scale: tl.float32,
    mask_batch: tl.int64, mask_head: tl.int64, mask_row: tl.int64,
    heads: tl.int32, group: tl.int32, queries: tl.int32, keys: tl.int32, diagonal: tl.int32,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    bias_batch: tl.int64, bias_head: tl.int64, bias_row: tl.int64,
    o_batch: tl.int64, o_head: tl.int64, o_row: tl.int64,
    do_batch: tl.int64, do_head: tl.int64, do_row: tl.int64,
    dq_batch: tl.int64, dq_head: tl.int64, dq_row: tl.int64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
    V_FEATURES: tl.constexpr, V_WIDTH: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    KEEPS: tl.constexpr, UNIT: tl.constexpr, BIAS_STEP: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of ROWS of queries, and what the gradients of their scores subtract.

    Arguments are as in `attend`. The gradient of a score is its weight times the difference of two
    numbers: the gradient of the weight, and the sum of these over all weights, times the weights.
    """
    k0, k1 = _get_key(key_ptr, key)
    base, diagonal = _get_place_in_whole(place_ptr, base, diagonal, queries, keys)
    least = threshold.to(tl.uint32)
    tiles = tl.cdiv(queries, ROWS)
    number = tl.program_id(0) // tiles
    batch, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    first_row = tl.program_id(0) % tiles * ROWS
    row = first_row + tl.arange(0, ROWS)
    feature, v_feature = tl.arange(0, WIDTH), tl.arange(0, V_WIDTH)
    q_first = _locate(q_ptr, batch, head, q_batch, q_head, UNIT)
    k_first = _locate(k_ptr, batch, head // group, k_batch, k_head, UNIT)
    v_first = _locate(v_ptr, batch, head // group, v_batch, v_head, UNIT)
    o_first = _locate(o_ptr, batch, head, o_batch, o_head, UNIT)
    do_first = _locate(do_ptr, batch, head, do_batch, do_head, UNIT)
    if bias_ptr is not None:
        bias_ptr = _locate(bias_ptr, batch, head, bias_batch, bias_head, 1)
    index = base + (batch * mask_batch + head * mask_head).to(tl.uint64)
    index = index + row.to(tl.uint64) * mask_row.to(tl.uint64)

    of_head = number.to(tl.int64) * queries
    o = _load(o_first, row, o_row, queries, v_feature, V_FEATURES, UNIT)
    do = _load(do_first, row, do_row, queries, v_feature, V_FEATURES, UNIT)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if upstream_lse_ptr is not None:
        delta -= tl.load(upstream_lse_ptr + of_head + row, mask=row < queries, other=0.0)
    tl.store(delta_ptr + of_head + row, delta, mask=row < queries)
    top, log_total = _load_sizes(sizes_ptr, of_head, row, queries)
    q = _load(q_first, row, q_row, queries, feature, FEATURES, UNIT)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, tl.maximum(first_row + ROWS + diagonal, 0))
    for first_column in range(0, stop, COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)
        k = _load(k_first, column, k_row, keys, feature, FEATURES, UNIT)
        v = _load(v_first, column, v_row, keys, v_feature, V_FEATURES, UNIT)
        scores = _get_scores(
            q, k, bias_ptr, scale, row[:, None], column[None, :], queries, keys, bias_row,
            diagonal, CAUSAL, BIAS_STEP,
        )  # fmt: skip
        weights = _get_weights(scores, top[:, None], log_total[:, None])
        upstream = tl.dot(do, tl.trans(v), input_precision="ieee")
        at = index + first_column
        upstream = _drop(upstream, at, least, k0, k1, ALIGNED, KEEPS) * keep_scale
        of_scores = weights * (upstream - delta[:, None])
        dq = tl.dot(of_scores.to(k.dtype), k, dq, input_precision="ieee")
    dq_first = _locate(dq_ptr, batch, head, dq_batch, dq_head, UNIT)
    _store(dq_first, dq * scale, row, dq_row, queries, feature, FEATURES, UNIT)


@triton.jit(do_not_specialize=_NUMBERS)
def differentiate_keys(
    q_ptr, k_ptr, v_ptr, bias_ptr, sizes_ptr, key_ptr, place_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr,
    key: tl.int64, base: tl.int64, threshold: tl.int32, keep_scale: tl.float32, scale: tl.float32,
    mask_batch: tl.int64, mask_head: tl.int64, mask_row: tl.int64,
    heads: tl.int32, group: tl.int32, queries: tl.int32, keys: tl.int32, diagonal: tl.int32,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    bias_batch: tl.int64, bias_head: tl.int64, bias_row: tl.int64,
    do_batch: tl.int64, do_head: tl.int64, do_row: tl.int64,
    dk_batch: tl.int64, dk_head: tl.int64, dk_row: tl.int64,
    dv_batch: tl.int64, dv_head: tl.int64, dv_row: tl.int64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
    V_FEATURES: tl.constexpr, V_WIDTH: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    KEEPS: tl.constexpr, UNIT: tl.constexpr, BIAS_STEP: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of COLUMNS keys and values of a head, from its group of query heads.

    Arguments are as in `attend`; the programs of `differentiate_queries` have stored ``delta``.
    """
    k0, k1 = _get_key(key_ptr, key)
    base, diagonal = _get_place_in_whole(place_ptr, base, diagonal, queries, keys)
    least = threshold.to(tl.uint32)
    tiles = tl.cdiv(keys, COLUMNS)
    number = tl.program_id(0) // tiles
    key_heads = heads // group
    batch, key_head = (number // key_heads).to(tl.int64), (number % key_heads).to(tl.int64)
    first_column = tl.program_id(0) % tiles * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    feature, v_feature = tl.arange(0, WIDTH), tl.arange(0, V_WIDTH)
    k_first = _locate(k_ptr, batch, key_head, k_batch, k_head, UNIT)
    v_first = _locate(v_ptr, batch, key_head, v_batch, v_head, UNIT)
    k = _load(k_first, column, k_row, keys, feature, FEATURES, UNIT)
    v = _load(v_first, column, v_row, keys, v_feature, V_FEATURES, UNIT)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, V_WIDTH], tl.float32)
    start = 0
    if CAUSAL:
        start = tl.maximum(first_column - diagonal, 0) // ROWS * ROWS
    # One loop over all tiles of the group: nested ones take more registers.
    row_tiles = tl.maximum(tl.cdiv(queries - start, ROWS), 0)
    for step in range(0, group * row_tiles):
        head = key_head * group + step // row_tiles
        first_row = start + step % row_tiles * ROWS
        q_first = _locate(q_ptr, batch, head, q_batch, q_head, UNIT)
        do_first = _locate(do_ptr, batch, head, do_batch, do_head, UNIT)
        bias_first = bias_ptr
        if bias_ptr is not None:
            bias_first = _locate(bias_ptr, batch, head, bias_batch, bias_head, 1)
        of_head = (batch * heads + head) * queries
        index = base + (batch * mask_batch + head * mask_head).to(tl.uint64)
        index = index + first_column.to(tl.uint64)
        row = first_row + tl.arange(0, ROWS)
        q = _load(q_first, row, q_row, queries, feature, FEATURES, UNIT)
        do = _load(do_first, row, do_row, queries, v_feature, V_FEATURES, UNIT)
        top, log_total = _load_sizes(sizes_ptr, of_head, row, queries)
        delta = tl.load(delta_ptr + of_head + row, mask=row < queries, other=0.0)
        scores = _get_scores(
            k, q, bias_first, scale, row[None, :], column[:, None], queries, keys, bias_row,
            diagonal, CAUSAL, BIAS_STEP,
        )  # fmt: skip
        weights = _get_weights(scores, top[None, :], log_total[None, :])
        at = index + row.to(tl.uint64) * mask_row.to(tl.uint64)
        # The sign of a weight keeps the decision, which then takes no other register.
        signed = weights
        if KEEPS == "some":
            keep = tl.trans(_get_keep(at, least, k0, k1, ROWS, COLUMNS, ALIGNED))
            signed = tl.where(keep, weights, -weights)
        elif KEEPS == "none":
            signed = -weights
        kept = tl.where(signed < 0.0, 0.0, signed)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")
        upstream = tl.dot(v, tl.trans(do), input_precision="ieee")
        upstream = tl.where(signed < 0.0, 0.0, upstream * keep_scale)
        of_scores = tl.abs(signed) * (upstream - delta[None, :])
        dk = tl.dot(of_scores.to(q.dtype), q, dk, input_precision="ieee")
    dk_first = _locate(dk_ptr, batch, key_head, dk_batch, dk_head, UNIT)
    dv_first = _locate(dv_ptr, batch, key_head, dv_batch, dv_head, UNIT)
    _store(dk_first, dk * scale, column, dk_row, keys, feature, FEATURES, UNIT)
    _store(dv_first, dv * keep_scale, column, dv_row, keys, v_feature, V_FEATURES, UNIT)
