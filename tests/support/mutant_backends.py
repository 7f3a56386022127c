"""A correct backend in plain NumPy, and mutants of it with one defect each.

The correct backend follows the specification and shares no code with the core, except for members
without a mutant. test_mutants.py names the contract that must catch each mutant.
"""

import itertools
import json
import math
from functools import reduce
from hashlib import blake2b
from statistics import NormalDist
from types import MappingProxyType

import numpy as np

from unidrop import Key
from unidrop.conformance import CAPABILITIES, MEMBERS, BaseBackend

MASK32 = np.uint64(0xFFFFFFFF)

# The members with code here, and so with mutants. Others have the formula of the matrix.
OWN_MEMBERS = (
    *("drop_path", "alpha_dropout", "feature_alpha_dropout", "drop_key", "locked_dropout"),
    *("drop_block", "patch_dropout", "gaussian_dropout", "gaussian_noise"),
)


class Correct(BaseBackend):
    """Every capability; the compiled mode runs eagerly and counts the traces it would need."""

    name = "correct"
    modes = ("eager", "compiled")
    compiled_modes = ("compiled",)
    capabilities = MappingProxyType(dict.fromkeys(CAPABILITIES))
    members = MappingProxyType(dict.fromkeys(MEMBERS))
    rounds = 10
    odd_multiplier = 0x6C078965
    word_order = (0, 1, 2, 3)
    mask_dtype = bool

    def __init__(self):
        self.programs = set()

    def dtypes(self, mode):
        return ("float16", "float32", "float64")

    def from_numpy(self, x, device, mode):
        return x

    def to_numpy(self, y):
        return y

    # The generator and keys.

    def philox(self, counter, key):
        x0, x1, x2, x3 = (np.asarray(word, dtype=np.uint64) for word in counter)
        k0, k1 = key
        for _ in range(self.rounds):
            p0, p1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
            x0, x1 = p1 >> np.uint64(32) ^ x1 ^ np.uint64(k0), p1 & MASK32
            x2, x3 = p0 >> np.uint64(32) ^ x3 ^ np.uint64(k1), p0 & MASK32
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        return x0, x1, x2, x3

    def words(self, counter, key, *, mode):
        return [int(word) for word in self.philox(counter, key)]

    def fold_in(self, key, data):
        tag = 1
        if isinstance(data, str):
            tag, data = 2, int.from_bytes(blake2b(data.encode(), digest_size=8).digest(), "little")
        counter, key = (data % 2**32, data >> 32, 0, tag), (key % 2**32, key >> 32)
        lo, hi, _, _ = map(int, self.philox(counter, key))
        return hi << 32 | lo

    def key(self, seed, *data):
        return reduce(self.fold_in, data, seed)

    def traced_key(self, seed, step, *, mode):
        return self.key(seed, int(np.asarray(step)))

    # The mask.

    def call_key(self, seed, step):
        return self.key(seed, step)

    def indices(self, x, axes, global_shape, start):
        index = np.zeros((), dtype=np.uint64)
        for axis, (part, length, first) in enumerate(
            zip(x.shape, global_shape, start, strict=True)
        ):
            part, length, first = (1, 1, 0) if axis in axes else (part, length, first)
            along = np.arange(part, dtype=np.uint64) + np.uint64(first)
            index = index[..., None] * np.uint64(length) + along
        return index

    def u(self, index, key):
        block, place = index >> np.uint64(3), (index % np.uint64(8)).astype(int)
        counter = (block & MASK32, block >> np.uint64(32), 0 * block, 0 * block)
        words = self.philox(counter, (key % 2**32, key >> 32))
        word = np.choose(np.array(self.word_order)[place // 2], words)
        return np.where(place % 2, word * np.uint64(self.odd_multiplier) & MASK32, word)

    def keep_flags(self, u, p):
        return u >= np.uint64(round(p * 2**32))

    # The output.

    def validate(self, x, p):
        if x.dtype.kind != "f":
            raise TypeError(f"x must have a floating-point dtype, got {x.dtype}")
        if isinstance(p, bool) or not isinstance(p, int | float):
            raise TypeError(f"p must be a number, got {p!r}")
        if not 0 <= p <= 1:
            raise ValueError(f"p must be in [0, 1], got {p}")

    def scale(self, x, p):
        compute = np.promote_types(x.dtype, np.float32).type
        return (x.astype(compute) * compute(1 / (1 - p))).astype(x.dtype)

    def select(self, keep, products):
        return np.where(keep, products, np.zeros_like(products))

    def static_arguments(self, x, p, step, options):
        return x.shape, x.dtype, p, *map(repr, options.items())

    def dropout(self, x, p, seed, step, *, mode, return_mask=False, **options):
        self.validate(x, p)
        if mode == "compiled":
            self.programs.add(self.static_arguments(x, p, step, {"mask": return_mask, **options}))
        if "member" in options:
            return self.drop_member(x, p, seed, step, **options)
        y, keep = self.drop(x, p, seed, step, **options)
        return (y, keep.astype(self.mask_dtype)) if return_mask else y

    def drop(
        self,
        x,
        p,
        seed,
        step,
        *,
        training=True,
        broadcast_axes=(),
        global_shape=None,
        start=None,
    ):
        global_shape, start = global_shape or x.shape, start or (0,) * x.ndim
        index = self.indices(x, broadcast_axes, global_shape, start)
        if not training or p == 0:
            return x, np.ones(index.shape, dtype=bool)
        keep = self.keep_flags(self.u(index, self.call_key(seed, step)), p)
        products = self.scale(x, p) if p < 1 else np.zeros_like(x)
        return self.select(keep, products), keep

    def gradient(self, x, upstream, p, seed, step, *, mode, **options):
        if "member" in options:
            options |= {"is_gradient": True, "shape": x.shape}
        return self.dropout(upstream, p, seed, step, mode=mode, **options)

    # Members of the family.

    def member_axes(self, x, member, axis=None):
        if member == "locked_dropout":
            return (axis,)
        first = {"drop_path": 1, "feature_alpha_dropout": 2}.get(member, x.ndim)
        return tuple(range(first, x.ndim))

    def constants(self, p, member, scale_by_keep):
        """Return what a member adds to kept elements, multiplies them by, and fills others with."""
        if member in ("drop_path", "locked_dropout"):
            return 0, 1 / (1 - p) if scale_by_keep else 1, 0
        if member == "drop_key":
            return 0, 1, -math.inf
        limit = 1.6732632423543772 * 1.0507009873554805
        a = 1 / math.sqrt((1 - p) * (1 + p * limit**2))
        return limit * p, a, -limit * (1 - p) * a

    def drop_member(self, x, p, seed, step, *, member, is_gradient=False, shape=None, **own):
        key = self.call_key(seed, step)
        if member not in OWN_MEMBERS:
            y, pullback = MEMBERS[member].formula(
                np.zeros(shape) if shape else x, p, Key(key), **own
            )
            return pullback(x) if is_gradient else y
        if member == "patch_dropout":
            columns = self.kept_columns(shape or x.shape, p, key, **own)
            return self.scatter(x, shape, columns) if is_gradient else self.gather(x, columns)
        if member.startswith("gaussian"):
            return self.drop_normally(x, p, key, member, is_gradient)
        if member == "drop_block":
            keep = self.keep_blocks(x.shape, p, key, **own)
            return self.fill(x, keep, 0, self.block_scale(keep, p, x.dtype), 0)
        scale_by_keep = own.pop("scale_by_keep", True)
        index = self.indices(x, self.member_axes(x, member, **own), x.shape, (0,) * x.ndim)
        keep = self.keep_flags(self.u(index, key), p)
        shift, scale, fill = self.constants(p, member, scale_by_keep)
        shift, fill = (0, 0) if is_gradient else (shift, fill)
        return self.fill(x, keep, shift, scale, fill)

    def fill(self, x, keep, shift, scale, fill):
        compute = np.promote_types(x.dtype, np.float32).type
        kept = (x.astype(compute) + compute(shift)) * compute(scale)
        if fill:
            kept = kept + 0
        elif not shift:  # no sum, which would turn -0 into +0
            kept = x.astype(compute) * compute(scale)
        return np.where(keep, kept, compute(fill)).astype(x.dtype)

    def keep_blocks(self, shape, p, key, block_size, axes):
        corners = [n - block_size + 1 if a in axes else n for a, n in enumerate(shape)]
        area, places = (math.prod(s[a] for a in axes) for s in (shape, corners))
        gamma = p * area / (block_size ** len(axes) * places)
        keep = self.keep_flags(self.u(np.arange(math.prod(corners), dtype=np.uint64), key), gamma)
        whole = np.ones(shape, dtype=bool)
        for first in itertools.product(*self.block_ranges(shape, block_size, axes)):
            at = tuple(slice(i, i + n) for i, n in zip(first, corners, strict=True))
            whole[at] &= keep.reshape(corners)
        return whole

    def block_ranges(self, shape, block_size, axes):
        return [range(block_size if axis in axes else 1) for axis in range(len(shape))]

    def block_scale(self, keep, p, dtype):
        compute = np.promote_types(dtype, np.float32).type
        return compute(keep.size) / compute(keep.sum())

    def numbered_words(self, size, key, tag):
        block = np.arange(-(-size // 4), dtype=np.uint64)
        words = self.philox(
            (block, 0 * block, 0 * block, 0 * block + tag), (key % 2**32, key >> 32)
        )
        return np.stack(words, axis=-1).ravel()[:size].astype(np.int64)

    def kept_columns(self, shape, p, key, num_prefix_tokens=1, ordered=False):
        rows, others = shape[0], shape[1] - num_prefix_tokens
        words = self.numbered_words(rows * others, key, 4).reshape(rows, others)
        order = self.order(words)[:, : max(1, int(others * (1 - p)))]
        order = np.sort(order, axis=1) if ordered else order
        prefix = np.arange(num_prefix_tokens)[None].repeat(rows, 0)
        return np.concatenate([prefix, order + num_prefix_tokens], axis=1)

    def order(self, words):
        return np.argsort(words, axis=1, kind="stable")

    def gather(self, x, columns):
        return x[np.arange(len(x))[:, None], columns]

    def scatter(self, upstream, shape, columns):
        y = np.zeros(shape, upstream.dtype)
        y[np.arange(len(y))[:, None], columns] = upstream
        return y

    def normal_words(self, size, key, member):
        return self.numbered_words(size, key, 3)

    def drop_normally(self, x, p, key, member, is_gradient):
        stddev = p if member == "gaussian_noise" else math.sqrt(p / (1 - p))
        words = self.normal_words(x.size, key, member)
        compute = np.promote_types(x.dtype, np.float32).type
        deviates = np.array([deviate(int(word), stddev) for word in words], compute)
        wide, deviates = x.astype(compute), deviates.reshape(x.shape)
        if member == "gaussian_noise":
            return x if is_gradient else (wide + deviates).astype(x.dtype)
        return (wide * (1 + deviates)).astype(x.dtype)

    # Attention.

    def attention_keep(self, shape, p, key, global_shape, start):
        index = self.indices(np.empty(shape), (), global_shape, start)
        return self.keep_flags(self.u(index, key), p)

    def weigh(self, query, key, p, seed, step, mask=None, is_causal=False, **window):
        """Return the weights, and what each is multiplied by: 0 or the scale."""
        scores = query @ key.swapaxes(2, 3) / math.sqrt(query.shape[3])
        whole = window.get("global_shape", scores.shape)
        start = window.get("start", (0,) * 4)
        attends = np.ones(scores.shape, dtype=bool) if mask is None else mask
        if is_causal:
            positions = (np.arange(n) + first for n, first in zip(scores.shape, start, strict=True))
            *_, queries, keys = positions
            attends = attends & (queries[:, None] >= keys)
        keep = self.attention_keep(scores.shape, p, self.call_key(seed, step), whole, start)
        return self.drop_weights(np.where(attends, scores, -np.inf), keep, p)

    def softmax(self, scores):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def drop_weights(self, scores, keep, p):
        return self.softmax(scores), keep / (1 - p)

    def widen(self, query, *of_keys):
        groups = query.shape[1] // of_keys[0].shape[1]
        return [
            query.astype(np.float64),
            *(x.astype(np.float64).repeat(groups, 1) for x in of_keys),
        ]

    def attention(self, query, key, value, p, seed, step, *, mode, **options):
        q, k, v = self.widen(query, key, value)
        weights, scale = self.weigh(q, k, p, seed, step, **options)
        return ((weights * scale) @ v).astype(query.dtype)

    def attention_gradient(self, query, key, value, upstream, p, seed, step, *, mode, **options):
        q, k, v = self.widen(query, key, value)
        weights, scale = self.weigh(q, k, p, seed, step, **options)
        of_weights = upstream @ v.swapaxes(2, 3) * scale
        mean = (of_weights * weights).sum(axis=-1, keepdims=True)
        of_scores = weights * (of_weights - mean) / math.sqrt(query.shape[3])
        gradients = (
            of_scores @ k,
            of_scores.swapaxes(2, 3) @ q,
            (weights * scale).swapaxes(2, 3) @ upstream,
        )
        groups = (q.shape[1], key.shape[1], key.shape[1])
        return tuple(
            x.reshape(len(x), n, -1, *x.shape[2:]).sum(axis=2).astype(query.dtype)
            for x, n in zip(gradients, groups, strict=True)
        )

    def layouts(self, x):
        doubled = np.repeat(x, 2, axis=-1)
        return {"Fortran": np.asfortranarray(x), "every second element": doubled[..., ::2]}

    def traces(self, mode):
        return len(self.programs)

    def layer(self, p, seed, *, dtype, device, mode):
        return Layer(self, p, seed, mode)


def deviate(word, stddev):
    """Return the normal deviate of a word: interpolate between entries of a table of integers."""
    rank = word if word < 2**31 else 2**32 - 1 - word
    level = sum(rank < 2**bits for bits in (23, 15, 7))
    k, f = divmod(rank << 8 * level, 2**19)
    near, far = (
        round(
            abs(NormalDist().inv_cdf(min((n * 2 ** (19 - 8 * level) + 0.5) / 2**32, 0.5))) * 2**21
        )
        for n in (k, k + 1)
    )
    fraction, exponent = math.frexp(stddev)
    size = (near - ((near - far) * (f // 8) >> 16)) * int(fraction * 2**32) >> 32
    return math.copysign(size * 2.0 ** (exponent - 21), word - 2**31 + 0.5)


class Layer:
    """A layer that counts its training calls."""

    def __init__(self, backend, p, seed, mode):
        self.backend, self.p, self.seed, self.mode = backend, p, seed, mode
        self.calls = 0

    def __call__(self, x, *, training):
        y = self.backend.dropout(
            x, self.p, self.seed, self.calls, mode=self.mode, training=training
        )
        self.calls += training and self.p > 0
        return y

    def save(self):
        return json.dumps({"calls": self.calls}).encode()

    def load(self, state):
        self.calls = json.loads(state)["calls"]

    def vjp(self, x):
        call = self.calls
        y = self(x, training=True)
        p, seed, mode = self.p, self.seed, self.mode
        return y, lambda upstream: self.backend.gradient(x, upstream, p, seed, call, mode=mode)


class SevenRounds(Correct):
    rounds = 7


class OddElementsNotMultiplied(Correct):
    odd_multiplier = 1


class WordsReversed(Correct):
    word_order = (3, 2, 1, 0)


class GreaterInsteadOfGreaterOrEqual(Correct):
    def keep_flags(self, u, p):
        return u > np.uint64(round(p * 2**32))


class ThresholdWith24Bits(Correct):
    def keep_flags(self, u, p):
        return u >> np.uint64(8) >= np.uint64(round(p * 2**24))


class ScaleRoundedToFloat16(Correct):
    def scale(self, x, p):
        compute = np.promote_types(x.dtype, np.float32)
        return (x.astype(compute) * x.dtype.type(1 / (1 - p)).astype(compute)).astype(x.dtype)


class MultiplyInsteadOfSelect(Correct):
    def select(self, keep, products):
        return products * keep


class StepNotFoldedIn(Correct):
    def call_key(self, seed, step):
        return seed


class StepRoundedToFloat32(Correct):
    step_limit = 1 << 31

    def call_key(self, seed, step):
        return super().call_key(seed, int(np.float32(step)))


class MaskInMemoryOrder(Correct):
    def indices(self, x, axes, global_shape, start):
        if x.flags.c_contiguous or not x.flags.f_contiguous:
            return super().indices(x, axes, global_shape, start)
        return np.arange(math.prod(x.shape), dtype=np.uint64).reshape(x.shape, order="F")


class FloatMask(Correct):
    mask_dtype = np.float32


class StateLostOnLoad(Correct):
    def layer(self, p, seed, *, dtype, device, mode):
        layer = super().layer(p, seed, dtype=dtype, device=device, mode=mode)
        layer.load = lambda state: None
        return layer


class GradientWithFreshMask(Correct):
    def gradient(self, x, upstream, p, seed, step, *, mode):
        return super().gradient(x, upstream, p, seed, step + 1, mode=mode)


class LayerActiveInEvaluation(Correct):
    def layer(self, p, seed, *, dtype, device, mode):
        class Active(Layer):
            def __call__(self, x, *, training):
                return super().__call__(x, training=True)

        return Active(self, p, seed, mode)


class LayerFreezesTraining(Correct):
    def layer(self, p, seed, *, dtype, device, mode):
        class Traced(Layer):
            training = None

            def __call__(self, x, *, training):
                self.training = training if self.training is None else self.training
                return super().__call__(x, training=self.training)

        return Traced(self, p, seed, mode)


class CompiledGradientWithFloat16Scale(Correct):
    def gradient(self, x, upstream, p, seed, step, *, mode):
        if mode == "eager":
            return super().gradient(x, upstream, p, seed, step, mode=mode)
        return ScaleRoundedToFloat16().gradient(x, upstream, p, seed, step, mode=mode)


class CompiledOnceForAllRates(Correct):
    def __init__(self):
        super().__init__()
        self.rates = {}

    def drop(self, x, p, seed, step, **options):
        if self.mode == "compiled" and 0 < p < 1:
            p = self.rates.setdefault((x.shape, x.dtype, *map(repr, options.items())), p)
        return super().drop(x, p, seed, step, **options)

    def dropout(self, x, p, seed, step, *, mode, **options):
        self.mode = mode
        return super().dropout(x, p, seed, step, mode=mode, **options)


class CompiledFloat32Comparison(CompiledOnceForAllRates):
    def drop(self, x, p, seed, step, **options):
        return Correct.drop(self, x, p, seed, step, **options)

    def keep_flags(self, u, p):
        if self.mode == "eager":
            return super().keep_flags(u, p)
        return u.astype(np.float32) >= np.float32(round(p * 2**32))


class ProductRoundedOnce(Correct):
    def scale(self, x, p):
        if x.dtype.itemsize > 2:
            return super().scale(x, p)
        # The product is exact in float64.
        return (x.astype(np.float64) * np.float64(np.float32(1 / (1 - p)))).astype(x.dtype)


class CompiledProductRoundedOnce(CompiledOnceForAllRates, ProductRoundedOnce):
    def drop(self, x, p, seed, step, **options):
        return Correct.drop(self, x, p, seed, step, **options)

    def scale(self, x, p):
        return super().scale(x, p) if self.mode == "compiled" else Correct.scale(self, x, p)


class TracesNotCounted(Correct):
    def traces(self, mode):
        return 1


class CompiledWindowRowsPadded(CompiledOnceForAllRates):
    def drop(self, x, p, seed, step, **options):
        return Correct.drop(self, x, p, seed, step, **options)

    def indices(self, x, axes, global_shape, start):
        if self.mode == "compiled" and x.shape != global_shape:
            global_shape = (*global_shape[:-1], -(-global_shape[-1] // 8) * 8)
        return super().indices(x, axes, global_shape, start)


class FunctionActiveInEvaluation(Correct):
    def drop(self, x, p, seed, step, *, training=True, **options):
        return super().drop(x, p, seed, step, **options)


class Float64Output(Correct):
    def select(self, keep, products):
        return super().select(keep, products).astype(np.float64)


class RateNotValidated(Correct):
    def validate(self, x, p):
        super().validate(x, p if isinstance(p, bool) or not isinstance(p, float) else 0.5)

    def keep_flags(self, u, p):
        return super().keep_flags(u, min(max(p, 0), 1) if p == p else 0)


class WindowIndexedLocally(Correct):
    def indices(self, x, axes, global_shape, start):
        return super().indices(x, axes, x.shape, (0,) * x.ndim)


class BroadcastAxesIgnored(Correct):
    def indices(self, x, axes, global_shape, start):
        return super().indices(x, (), global_shape, start)


class RetracedEveryStep(Correct):
    def static_arguments(self, x, p, step, options):
        return step, *super().static_arguments(x, p, step, options)


class StringsFoldedAsIntegers(Correct):
    def fold_in(self, key, data):
        if isinstance(data, str):
            digest = blake2b(data.encode(), digest_size=8).digest()
            data = int.from_bytes(digest, "little")
        return super().fold_in(key, data)


class TracedStepSignExtended(Correct):
    def traced_key(self, seed, step, *, mode):
        return self.key(seed, step | 0xFFFFFFFF << 32 if step >> 30 & 1 else step)


class ThresholdClippedBelow2To32(Correct):
    def keep_flags(self, u, p):
        return (u >= np.uint64(min(round(p * 2**32), 2**32 - 1))) & (p < 1)


class ReturnedMaskInverted(Correct):
    def dropout(self, x, p, seed, step, *, return_mask=False, **options):
        y = super().dropout(x, p, seed, step, return_mask=return_mask, **options)
        return (y[0], ~y[1]) if return_mask else y


class IntegersAccepted(Correct):
    def validate(self, x, p):
        super().validate(x if x.dtype.kind == "f" else x.astype(np.float32), p)


class RaisingCallCounted(Correct):
    def layer(self, p, seed, *, dtype, device, mode):
        class Eager(Layer):
            def __call__(self, x, *, training):
                self.calls += x.dtype.kind != "f"
                return super().__call__(x, training=training)

        return Eager(self, p, seed, mode)


class GradientUsesLatestCall(Correct):
    def layer(self, p, seed, *, dtype, device, mode):
        class Forgetful(Layer):
            def vjp(self, x):
                y, _ = super().vjp(x)
                return y, lambda upstream: self.backend.gradient(
                    upstream, upstream, self.p, self.seed, self.calls - 1, mode=self.mode
                )

        return Forgetful(self, p, seed, mode)


class PathsDroppedByElement(Correct):
    def member_axes(self, x, member, **own):
        return () if member == "drop_path" else super().member_axes(x, member, **own)


class ChannelsDroppedByElement(Correct):
    def member_axes(self, x, member, **own):
        return () if member == "feature_alpha_dropout" else super().member_axes(x, member, **own)


class LockedAlongWrongAxis(Correct):
    def member_axes(self, x, member, **own):
        return (0,) if member == "locked_dropout" else super().member_axes(x, member, **own)


class ScoresFilledWithNan(Correct):
    def constants(self, p, member, scale_by_keep):
        shift, scale, fill = super().constants(p, member, scale_by_keep)
        return shift, scale, math.nan if member == "drop_key" else fill


class BlocksTooSmall(Correct):
    def block_ranges(self, shape, block_size, axes):
        return super().block_ranges(shape, block_size - 1, axes)


class BlocksScaledByRate(Correct):
    def block_scale(self, keep, p, dtype):
        return 1 / (1 - p)


class PermutationsDescending(Correct):
    def order(self, words):
        return np.argsort(-words, axis=1, kind="stable")


class PermutationsReverseTies(Correct):
    def order(self, words):
        return words.shape[1] - 1 - np.argsort(words[:, ::-1], axis=1, kind="stable")


class GaussianDropoutOfWordsOfMasks(Correct):
    def normal_words(self, size, key, member):
        if member == "gaussian_noise":
            return super().normal_words(size, key, member)
        return self.u(np.arange(size, dtype=np.uint64), key)


class NoiseNegated(Correct):
    def normal_words(self, size, key, member):
        words = super().normal_words(size, key, member)
        return 2**32 - 1 - words if member == "gaussian_noise" else words


class GradientOfGaussianDropoutIsUpstream(Correct):
    def drop_normally(self, x, p, key, member, is_gradient):
        return x if is_gradient else super().drop_normally(x, p, key, member, is_gradient)


class GradientOfPatchesUnsorted(Correct):
    def scatter(self, upstream, shape, columns):
        return super().scatter(upstream, shape, np.sort(columns, axis=1))


class PathsScaledAlways(Correct):
    def constants(self, p, member, scale_by_keep):
        return super().constants(p, member, True)


class AlphaFilledWithZero(Correct):
    def constants(self, p, member, scale_by_keep):
        shift, scale, fill = super().constants(p, member, scale_by_keep)
        return shift, scale, 0 if "alpha" in member else fill


class AlphaWithOneProductAndSum(Correct):
    def drop_member(self, x, p, seed, step, *, member, is_gradient=False, **options):
        y = super().drop_member(x, p, seed, step, member=member, is_gradient=is_gradient, **options)
        if is_gradient or "alpha" not in member or x.dtype == np.float64:
            return y
        shift, scale, fill = self.constants(p, member, True)
        products = (x * np.float32(scale) + np.float32(shift * scale)).astype(x.dtype)
        return np.where(y == x.dtype.type(np.float32(fill)), y, products)


class MemberGradientWithoutScale(Correct):
    def drop_member(self, x, *arguments, member, is_gradient=False, **options):
        options |= {"member": member, "is_gradient": is_gradient}
        y = super().drop_member(x, *arguments, **options)
        return np.where(y == 0, y, x) if is_gradient and member == "alpha_dropout" else y


class AttentionQueriesAndKeysSwapped(Correct):
    def attention_keep(self, shape, p, key, global_shape, start):
        *whole, queries, keys = global_shape
        *first, row, column = start
        other = (*shape[:2], shape[3], shape[2])
        whole, first = (*whole, keys, queries), (*first, column, row)
        return super().attention_keep(other, p, key, whole, first).swapaxes(2, 3)


class AttentionHeadsBeforeBatch(Correct):
    def attention_keep(self, shape, p, key, global_shape, start):
        swapped = [(n[1], n[0], *n[2:]) for n in (shape, global_shape, start)]
        return super().attention_keep(swapped[0], p, key, *swapped[1:]).swapaxes(0, 1)


class AttentionScoresDropped(Correct):
    def drop_weights(self, scores, keep, p):
        return self.softmax(np.where(keep, scores / (1 - p), 0)), np.ones(())


class AttentionScoresMasked(Correct):
    def drop_weights(self, scores, keep, p):
        kept = np.where(keep, scores, -np.inf)
        weights = np.exp(kept - np.maximum(kept.max(axis=-1, keepdims=True), -1e300))
        return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300), np.ones(())


class AttentionMultipliedByRate(Correct):
    def drop_weights(self, scores, keep, p):
        return self.softmax(scores), keep * (1 - p)


class AttentionKeepsRate(Correct):
    def attention_keep(self, shape, p, key, global_shape, start):
        return super().attention_keep(shape, 1 - p, key, global_shape, start)


class AttentionKeysPadded(Correct):
    def attention_keep(self, shape, p, key, global_shape, start):
        padded = (*global_shape[:-1], -(-global_shape[-1] // 8) * 8)
        return super().attention_keep(shape, p, key, padded, start)


class AttentionTilesRestart(Correct):
    def attention_keep(self, shape, p, key, global_shape, start):
        def keep_tile(first):
            tile = (*shape[:-1], min(16, shape[-1] - first))
            return super(AttentionTilesRestart, self).attention_keep(tile, p, key, tile, (0,) * 4)

        return np.concatenate([keep_tile(first) for first in range(0, shape[-1], 16)], axis=-1)


class AttentionWindowIndexedLocally(Correct):
    def attention_keep(self, shape, p, key, global_shape, start):
        return super().attention_keep(shape, p, key, shape, (0,) * 4)


class AttentionGradientWithFreshMask(Correct):
    def attention_gradient(self, query, key, value, upstream, p, seed, step, **options):
        return super().attention_gradient(query, key, value, upstream, p, seed, step + 1, **options)
