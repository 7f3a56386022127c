"""Test that `unidrop diff` finds the differences of a dump and the mutation that explains them."""

import hashlib
import sys
from pathlib import Path

import ml_dtypes
import mutant_backends
import numpy as np
import pytest
import reference
from click.testing import CliRunner
from PIL import Image

import unidrop
from unidrop import Key
from unidrop.cli import main
from unidrop.conformance.compare import numpy_dtype
from unidrop.conformance.diagnosis.search import diagnose
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.conformance.golden import golden_masks, golden_outputs

SHAPE = (6, 50)
SIZE = 300
P = 0.3
KEY = reference.fold_in(reference.fold_in(42, "encoder/0"), 7)
OPTIONS = ("--seed", "42", "--site", "encoder/0", "--step", "7", "--p", "0.3")
MODEL = StreamModel(42, ("encoder/0", 7), P, SHAPE)
T = reference.threshold(P)


def philox(counter, key, rounds=10):
    """Run another number of rounds of the generator."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = divmod(0xD2511F53 * c0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def fold(
    key, data, tag=None, *, digest=8, order="little", counter=lambda *c: c, words=lambda w: w[:2]
):
    """Fold data into a key, with one choice changed."""
    number = data
    if isinstance(data, str):
        hashed = hashlib.blake2b(data.encode(), digest_size=digest).digest()[:8]
        number = int.from_bytes(hashed, order)
    if tag is None:
        tag = 2 if isinstance(data, str) else 1
    changed = counter(number % 2**32, number >> 32, 0, tag)
    lo, hi = words(philox(changed, (key % 2**32, key >> 32)))
    return lo + 2**32 * hi


def word(i, key=KEY):
    return reference.u(key, i - i % 2)


def keep_where(keeps, numbers=range(SIZE)):
    return np.array([keeps(i) for i in numbers], dtype=bool).reshape(SHAPE)


def mask_of_key(*folded, seed=42):
    key = seed
    for data in folded:
        key = reference.fold_in(key, data)
    return keep_where(lambda i: reference.u(key, i) >= T)


def mask_of_folds(*, site=fold, step=fold):
    """Return the mask with another way to fold in the site or the step."""
    key = step(site(42, "encoder/0"), 7)
    return keep_where(lambda i: reference.u(key, i) >= T)


def changed_fold(*args, **options):
    return lambda key, data: fold(key, data, *args, **options)


def mask_of_changed_folds(*args, **options):
    return mask_of_folds(site=changed_fold(*args, **options), step=changed_fold(*args, **options))


def mask_of_words(words):
    return keep_where(
        lambda i: words(i // 8)[i // 2 % 4] * (0x6C078965 if i % 2 else 1) % 2**32 >= T
    )


def backend_source(name, backend, more=""):
    """Return a module with a backend of mutant_backends.py under another name."""
    made = f"class make({backend}):\n    name = {name!r}\n{more}"
    return f"{Path(mutant_backends.__file__).read_text()}\n\n{made}"


LO, HI = KEY % 2**32, KEY >> 32
SITE = reference.fold_in(42, "encoder/0")
SITE_WORDS = SITE % 2**32, SITE >> 32

MUTATIONS = {
    "the generator runs 7 rounds instead of 10": mask_of_words(
        lambda block: philox((block, 0, 0, 0), (LO, HI), rounds=7)
    ),
    "the key's words are swapped": mask_of_words(lambda block: philox((block, 0, 0, 0), (HI, LO))),
    "the block number's words are swapped": mask_of_words(
        lambda block: philox((0, block, 0, 0), (LO, HI))
    ),
    "the block number is in the counter's upper half": mask_of_words(
        lambda block: philox((0, 0, block, 0), (LO, HI))
    ),
    "the block number is one too high": mask_of_words(
        lambda block: philox((block + 1, 0, 0, 0), (LO, HI))
    ),
    "the words of a block are in reverse order": mask_of_words(
        lambda block: philox((block, 0, 0, 0), (LO, HI))[::-1]
    ),
    "the words of a block are in the order (1, 0, 3, 2)": mask_of_words(
        lambda block: [philox((block, 0, 0, 0), (LO, HI))[j] for j in (1, 0, 3, 2)]
    ),
    "odd elements use the word itself instead of its product with 0x6C078965": keep_where(
        lambda i: word(i) >= T
    ),
    "even elements use the product and odd ones the word": keep_where(
        lambda i: reference.u(KEY, i ^ 1) >= T
    ),
    "each word decides one element instead of two": keep_where(lambda i: word(2 * i) >= T),
    "the mask is inverted: 1 means dropped": keep_where(lambda i: reference.u(KEY, i) < T),
    "the comparison is u < 2^32 - T instead of u >= T": keep_where(
        lambda i: reference.u(KEY, i) < 2**32 - T
    ),
    "u and T are compared as signed integers": keep_where(
        lambda i: (reference.u(KEY, i) ^ 2**31) >= (T ^ 2**31)
    ),
    "p is used as the probability of keeping": keep_where(
        lambda i: reference.u(KEY, i) >= reference.threshold(1 - P)
    ),
    "the step 7 is not folded in": mask_of_key("encoder/0"),
    "the site 'encoder/0' is not folded in": mask_of_key(7),
    "the step is 6 instead of 7": mask_of_key("encoder/0", 6),
    "the step 7 is folded in as a string": mask_of_key("encoder/0", "7"),
    "the site and the step are swapped": mask_of_key(7, "encoder/0"),
    "the step is 0 instead of 7": mask_of_key("encoder/0", 0),
    "0 is also folded in, before the step 7": mask_of_key("encoder/0", 0, 7),
    "1 is also folded in, before the step 7": mask_of_key("encoder/0", 1, 7),
    "0 is also folded in, before the site 'encoder/0'": mask_of_key(0, "encoder/0", 7),
    "'' is also folded in, at the end": mask_of_key("encoder/0", 7, ""),
    "the step 7 is added to the block number instead of being folded in": mask_of_words(
        lambda block: philox((block + 7, 0, 0, 0), SITE_WORDS)
    ),
    "the step 7 is the counter's third word instead of being folded in": mask_of_words(
        lambda block: philox((block, 0, 7, 0), SITE_WORDS)
    ),
    "the step 7 is the counter's last word instead of being folded in": mask_of_words(
        lambda block: philox((block, 0, 0, 7), SITE_WORDS)
    ),
    "the counter of a mask has tag 1, the tag of integers": mask_of_words(
        lambda block: philox((block, 0, 0, 1), (LO, HI))
    ),
    "the counter of fold_in has no tag": mask_of_changed_folds(0),
    "the counter of fold_in has its tag in the third word": mask_of_changed_folds(
        counter=lambda lo, hi, zero, tag: (lo, hi, tag, zero)
    ),
    "the words of the folded data are swapped": mask_of_changed_folds(
        counter=lambda lo, hi, zero, tag: (hi, lo, zero, tag)
    ),
    "the folded data loses its upper 32 bits": mask_of_changed_folds(
        counter=lambda lo, hi, zero, tag: (lo, zero, zero, tag)
    ),
    "the words of a folded key are swapped": mask_of_changed_folds(
        words=lambda words: words[1::-1]
    ),
    "a folded key has the generator's words 2 and 3": mask_of_changed_folds(
        words=lambda words: words[2:]
    ),
    "a folded key loses its upper 32 bits": mask_of_changed_folds(
        words=lambda words: (words[0], 0)
    ),
    "strings are folded in with tag 1, the tag of integers": mask_of_folds(site=changed_fold(1)),
    "integers are folded in with tag 2, the tag of strings": mask_of_folds(step=changed_fold(2)),
    "the digest of a string is read big-endian": mask_of_folds(site=changed_fold(order="big")),
    "the digest of a string has 64 bytes and is truncated to 8": mask_of_folds(
        site=changed_fold(digest=64)
    ),
    "integers are added to the key instead of being folded in": mask_of_folds(
        step=lambda key, n: key + n
    ),
    "integers are xored with the key instead of being folded in": mask_of_folds(
        step=lambda key, n: key ^ n
    ),
    "integers are added to the upper word of the key instead of being folded in": mask_of_folds(
        step=lambda key, n: (key + (n << 32)) % 2**64
    ),
    "elements are numbered in Fortran order": keep_where(
        lambda i: reference.u(KEY, i) >= T, np.arange(SIZE).reshape(SHAPE, order="F").reshape(-1)
    ),
    "rows are padded to a multiple of 8 elements": keep_where(
        lambda i: reference.u(KEY, i // 50 * 56 + i % 50) >= T
    ),
}


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in ("diff", *arguments)])


@pytest.fixture
def dump(tmp_path):
    def write(array, name="theirs.npy"):
        np.save(tmp_path / name, array)
        return tmp_path / name

    return write


@pytest.mark.parametrize("golden", golden_masks(), ids=lambda golden: golden.name)
def test_equals_the_specification_by_default_model(golden):
    axes = tuple(axis % len(golden.shape) for axis in golden.broadcast_axes)
    window = golden.global_shape, golden.start
    model = StreamModel(golden.seed, (golden.step,), golden.p, golden.shape, axes, *window)
    assert diagnose(model, np.broadcast_to(golden.keep, golden.shape)) is None


@pytest.mark.parametrize(("what", "mask"), MUTATIONS.items(), ids=MUTATIONS)
def test_finds_each_mutation_of_a_mask_and_no_other(what, mask):
    diagnosis = diagnose(MODEL, mask)
    assert diagnosis is not None
    assert diagnosis.causes == (what,)


@pytest.mark.parametrize(
    ("relation", "what"),
    [
        (lambda u, t: u > t, "the comparison is u > T instead of u >= T"),
        (lambda u, t: np.float32(u) >= np.float32(t), "u is rounded to float32"),
        (lambda u, t: u >> 8 >= round(t / 256), "the threshold has 24 bits instead of 32"),
    ],
)
def test_finds_a_subtly_wrong_comparison_if_an_element_shows_it(relation, what):
    # Rates whose T equals the u of an element, or nearly does.
    us = [reference.u(KEY, i) for i in range(SIZE)]
    found = set()
    for t in (us[5], us[5] + 1, us[5] + 100):
        mask = keep_where(lambda i, t=t: relation(us[i], t))
        diagnosis = diagnose(StreamModel(42, ("encoder/0", 7), t / 2**32, SHAPE), mask)
        found.update(diagnosis.causes if diagnosis else ())
    assert any(cause.startswith(what) for cause in found)


@pytest.mark.parametrize(
    ("mask", "options", "what"),
    [
        (
            reference.keep_mask((6, 8), P, KEY, global_shape=(20, 30), start=(0, 0)),
            {"global_shape": (20, 30), "start": (3, 5)},
            "the window's start is ignored",
        ),
        (
            reference.keep_mask((6, 8), P, KEY),
            {"global_shape": (20, 30), "start": (3, 5)},
            "the window is ignored",
        ),
        (reference.keep_mask((6, 8), P, KEY), {"broadcast_axes": (1,)}, "the broadcast axes are"),
        (
            reference.keep_mask((6, 8), P, KEY, global_shape=(20, 30), start=(0, 0)),
            {"global_shape": (2**32 + 20, 2**32), "start": (2**32, 0)},
            "",
        ),
    ],
    ids=["start", "window", "broadcast", "none"],
)
def test_finds_mutations_of_windows_and_broadcast_axes(mask, options, what):
    model = StreamModel(42, ("encoder/0", 7), P, (6, 8), **options)
    diagnosis = diagnose(model, np.array(mask, dtype=bool).reshape(6, 8))
    assert [cause[: len(what)] for cause in diagnosis.causes] == [what] * bool(what)


def test_finds_a_wrong_number_of_rounds_for_keys_too(monkeypatch):
    monkeypatch.setattr(reference, "philox", lambda counter, key: philox(counter, key, rounds=7))
    key = reference.fold_in(reference.fold_in(42, "encoder/0"), 7)
    mask = np.array(reference.keep_mask(SHAPE, P, key), dtype=bool).reshape(SHAPE)
    assert diagnose(MODEL, mask).causes == (
        "the generator runs 7 rounds instead of 10, for keys too",
    )


def test_finds_a_step_added_to_the_seed_as_a_pair_of_mutations():
    (cause,) = diagnose(MODEL, mask_of_key("encoder/0", seed=42 + 7)).causes
    assert "integers are added to the key instead of being folded in" in cause
    assert "the site and the step are swapped" in cause


def test_finds_a_call_number_that_is_also_folded_in():
    model = StreamModel(42, (), P, SHAPE)
    assert diagnose(model, mask_of_key(0)).causes == ("0 is also folded in, at the end",)


def test_names_all_mutations_that_give_the_same_mask():
    added = keep_where(lambda i: reference.u(42 + 1, i) >= T)
    assert diagnose(StreamModel(42, (1,), P, SHAPE), added).causes == (
        "integers are added to the key instead of being folded in",
        "integers are xored with the key instead of being folded in",
    )


@pytest.mark.parametrize("size", [16, 22, 23, 40])
def test_tries_no_pairs_on_a_dump_that_may_fit_by_chance(dump, size):
    mask = np.random.default_rng(2).random(size) >= 0.5
    output = run(dump(mask), *OPTIONS[:-1], "0.5").output
    assert "no known mistake" in output
    assert ("an array this small may fit a mistake by chance" in output) == (size < 23)
    assert ("alone or with another" in output) == (size >= 23)


def test_finds_a_pair_of_mutations():
    mask = mask_of_words(lambda block: philox((block, 0, 0, 0), (LO, HI), rounds=7)[::-1])
    (cause,) = diagnose(MODEL, mask).causes
    assert "the generator runs 7 rounds instead of 10" in cause
    assert "the words of a block are in reverse order" in cause


def test_names_no_mutation_for_an_unrelated_mask(dump):
    other = np.random.default_rng(0).random(SHAPE) >= P
    result = run(dump(other), *OPTIONS)
    assert result.exit_code == 1
    assert "no known mistake" in result.output
    assert "independent masks agree in 58.00%" in result.output


def test_locates_the_first_difference_to_the_word(dump):
    mask = np.array(reference.keep_mask(SHAPE, P, KEY), dtype=bool)
    mask[[77, 90]] ^= True
    result = run(dump(mask.reshape(SHAPE)), *OPTIONS)
    assert result.exit_code == 1
    u = reference.u(KEY, 77)
    assert "2 of 300 elements differ, the first at (1, 27), index 77" in result.output
    assert "block 9, word 2, its odd element" in result.output
    assert f"u = {u:08x}, T = {T:08x}" in result.output


def test_accepts_a_conforming_mask(dump):
    mask = np.array(reference.keep_mask(SHAPE, P, KEY), dtype=np.uint8).reshape(SHAPE)
    result = run(dump(mask), *OPTIONS)
    assert result.exit_code == 0, result.output
    assert "conforms, all 300 elements" in result.output


@pytest.mark.parametrize("golden", golden_outputs(), ids=lambda golden: golden.name)
def test_accepts_golden_outputs(golden, dump):
    x, y = dump(golden.x, "x.npy"), dump(golden.y)
    key = ("--seed", golden.seed, "--step", golden.step, "--p", golden.p)
    result = run(y, "--input", x, *key)
    assert result.exit_code == 0, result.output


ORDINARY = np.linspace(-2, 2, 2 * SIZE + 2)[1::2][:SIZE].reshape(SHAPE)
KEPT = np.array(reference.keep_mask(SHAPE, P, KEY), dtype=bool).reshape(SHAPE)


def scaled(x, dtype, s):
    return np.where(KEPT, (x.astype(dtype) * dtype(s)).astype(x.dtype), x.dtype.type(0))


S, S32 = 1 / (1 - P), np.float32(1 / (1 - P))

# Maps a defect to the dtype, the function that makes the output, and the expected causes.
WRONG_OUTPUTS = {
    "unscaled": ("float32", lambda x: np.where(KEPT, x, 0), "kept elements are not scaled"),
    "1-p": (
        "float32",
        lambda x: scaled(x, np.float32, 1 - P),
        "kept elements are multiplied by 1 - p",
    ),
    "twice": (
        "float32",
        lambda x: scaled(scaled(x, np.float32, S), np.float32, S),
        "kept elements are scaled twice",
    ),
    "in float64": (
        "float32",
        lambda x: scaled(x, np.float64, S),
        "the product is computed in float64 and rounded once",
        "x is divided by 1 - p in float64",
    ),
    "divided in float64": (
        "float32",
        lambda x: np.where(KEPT, x.astype(np.float64) / (1 - P), 0),
        "the product is computed in float64 and rounded once",
        "x is divided by 1 - p in float64",
    ),
    "float64 divided": (
        "float64",
        lambda x: np.where(KEPT, x / (1 - P), 0),
        "x is divided by 1 - p in float64",
    ),
    "divided": (
        "float32",
        lambda x: np.where(KEPT, x / np.float32(1 - P), 0),
        "x is divided by 1 - p in float32",
    ),
    "float16 divided": (
        "float16",
        lambda x: np.where(KEPT, x / np.float16(1 - P), 0),
        "x is divided by 1 - p in float16",
    ),
    "multiplied": (
        "float32",
        lambda x: x * S32 * KEPT,
        "products are multiplied by the mask instead of selected: -0 and NaN remain",
    ),
    "float16": (
        "float16",
        lambda x: scaled(x, np.float32, np.float16(S)),
        "the scale is rounded to float16 before the product",
    ),
    "bfloat16": (
        ml_dtypes.bfloat16,
        lambda x: scaled(x, np.float32, ml_dtypes.bfloat16(S)),
        "the scale is rounded to bfloat16 before the product",
    ),
    "float32 by float16": (
        "float32",
        lambda x: scaled(x, np.float32, np.float16(S)),
        "the scale is rounded to float16 before the product",
    ),
    "float64 by float32": (
        "float64",
        lambda x: scaled(x, np.float64, S32),
        "the scale is rounded to float32 before the product",
        "the scale is computed in float32",
    ),
    "p of float32": (
        "float64",
        lambda x: scaled(x, np.float64, 1 / (1 - float(np.float32(P)))),
        "p is rounded to float32 before the scale is computed",
    ),
}


@pytest.mark.parametrize(
    ("dtype", "wrong", "what"), [(*w[:2], w[2:]) for w in WRONG_OUTPUTS.values()], ids=WRONG_OUTPUTS
)
def test_finds_each_mutation_of_an_output_and_no_other(dump, dtype, wrong, what):
    x = ORDINARY.astype(dtype)
    y = wrong(x).astype(dtype)
    result = run(dump(y), "--input", dump(x, "x.npy"), *OPTIONS)
    assert result.exit_code == 1
    assert "the mask is right, the output is wrong" in result.output
    explained = [line.partition(" of it: ") for line in result.output.splitlines()]
    assert [cause for _, is_one, cause in explained if is_one] == list(what)


def test_finds_a_scale_computed_in_float32():
    p, x = 0.15, ORDINARY.astype(np.float32)
    mask = np.array(reference.keep_mask(SHAPE, p, KEY), dtype=bool).reshape(SHAPE)
    s = np.float32(1) / (np.float32(1) - np.float32(p))
    diagnosis = diagnose(StreamModel(42, ("encoder/0", 7), p, SHAPE), np.where(mask, x * s, 0), x)
    assert diagnosis.causes == ("the scale is computed in float32",)


def test_compares_the_output_with_the_input_at_rate_0(dump):
    x = ORDINARY.astype(np.float32)
    at_0 = (*OPTIONS[:-1], "0")
    assert run(dump(3 * x), "--input", dump(x, "x.npy"), *at_0).exit_code == 1
    assert run(dump(x), "--input", dump(x, "x.npy"), *at_0).exit_code == 0


def test_accepts_zeros_for_subnormal_numbers(dump):
    x = np.full(SHAPE, 1e-40, dtype=np.float32)
    assert run(dump(x * 0), "--input", dump(x, "x.npy"), *OPTIONS).exit_code == 0


def test_finds_multiplication_by_the_mask_from_nans(dump):
    x = np.abs(ORDINARY).astype(np.float32)
    x[:, ::7] = np.nan
    with np.errstate(invalid="ignore"):
        y = x * np.float32(1 / (1 - P)) * KEPT
    result = run(dump(y), "--input", dump(x, "x.npy"), *OPTIONS)
    assert "products are multiplied by the mask" in result.output


def test_finds_an_inverted_mask_with_another_mutation():
    (cause,) = diagnose(
        MODEL, ~keep_where(lambda i: (reference.u(KEY, i) ^ 2**31) >= (T ^ 2**31))
    ).causes
    assert "inverted" in cause
    assert "signed" in cause


def test_ignores_the_mask_of_zeros_in_the_input(dump):
    x = ORDINARY.astype(np.float32)
    x[2] = 0
    y = unidrop.dropout(x, P, Key(42).fold_in("encoder/0").fold_in(7))
    assert run(dump(y), *OPTIONS).exit_code == 1
    assert run(dump(y), "--input", dump(x, "x.npy"), *OPTIONS).exit_code == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_finds_a_mutation_with_zeros_and_nans_in_the_input(dtype):
    x = ORDINARY.astype(dtype)
    x[:, ::5], x[:, 1::5] = 0, np.nan
    mask = MUTATIONS["the words of a block are in reverse order"]
    diagnosis = diagnose(MODEL, np.where(mask, x, 0).astype(dtype), x)
    assert diagnosis.causes == ("the words of a block are in reverse order",)
    assert diagnosis.is_mask_wrong


def test_compares_only_zeros_without_an_input_and_says_so(dump):
    result = run(dump(KEPT * 0.37), *OPTIONS)
    assert result.exit_code == 0
    assert "zeros conform, all 300 elements; pass --input to compare the values" in result.output
    x = ORDINARY.astype(np.float32) * (ORDINARY > 0)
    y = unidrop.dropout(x, P, Key(42).fold_in("encoder/0").fold_in(7))
    assert "pass the input too, with --input" in run(dump(y), *OPTIONS).output


def test_accepts_hexadecimal_seeds(dump):
    hexadecimal = ("--seed", "0x2a", *OPTIONS[2:])
    assert run(dump(KEPT), *hexadecimal).exit_code == 0


def test_compares_two_dumps(dump):
    one, other = KEPT.copy(), KEPT.copy()
    other[3, 4] ^= True
    paths = dump(one, "one.npy"), dump(other, "other.npy")
    result = run(*paths)
    assert result.exit_code == 1
    assert "1 of 300 elements differ, the first at (3, 4), index 154" in result.output
    assert "block 19, word 1, its even element" in result.output
    assert run(paths[0], paths[0]).exit_code == 0
    assert run(paths[0], dump(KEPT[:3], "half.npy")).exit_code == 1


BACKEND = ("--seed", "42", "--step", "7", "--p", "0.3")


@pytest.fixture
def theirs(install, monkeypatch):
    """Install a backend of mutant_backends.py as ``theirs``."""

    def install_theirs(backend, more=""):
        monkeypatch.delitem(sys.modules, "theirs", raising=False)
        install("theirs", backend_source("theirs", backend, more))

    return install_theirs


def test_compares_a_backend_instead_of_a_dump(theirs):
    theirs("WordsReversed")
    result = run("--backend", "theirs", *BACKEND, "--shape", "4x50")
    assert result.exit_code == 1
    assert result.output.startswith("theirs, cpu, float32, eager: ")
    assert "this explains all of it: the words of a block are in reverse order" in result.output


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_compares_the_output_of_a_backend_for_an_input(dump, dtype):
    result = run("--backend", "numpy", *BACKEND, "--input", dump(ORDINARY.astype(dtype)))
    assert result.exit_code == 0, result.output
    where = f"numpy, cpu, {np.dtype(dtype)}, eager"
    assert result.output == f"{where}: conforms, all 300 elements\n"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("dropout(self, *a, **o): raise SystemExit(0)", "theirs raised SystemExit: 0"),
        ("dropout(self, *a, **o): raise GeneratorExit", "theirs raised GeneratorExit:"),
        ("to_numpy(self, y): raise OSError('no\\n device')", "theirs raised OSError: no device"),
        ("to_numpy(self, y): return None", "to_numpy must return a NumPy array, got NoneType"),
        ("to_numpy(self, y): return y.tolist()", "to_numpy must return a NumPy array, got list"),
        ("to_numpy(self, y): return y.T", "shape must be (4, 50), got (50, 4)"),
        ("to_numpy(self, y): return y.astype(float)", "dtype must be float32, got float64"),
    ],
    ids=["exit", "no exception", "lines", "None", "list", "shape", "dtype"],
)
def test_reports_a_failing_backend_in_one_line(theirs, method, said):
    theirs("Correct", f"    def {method}\n")
    result = run("--backend", "theirs", *BACKEND, "--shape", "4x50")
    assert result.exit_code == 1
    assert said in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("shape", "mention"),
    [
        ("-1x5", "lengths of 0 or more"),
        ("99999999x99999999", "Unable to allocate"),
        (f"{10**23}", "at most 2**64 elements"),
        (f"0x{10**23}", "--shape: Maximum allowed dimension exceeded"),
    ],
    ids=["negative", "memory", "elements", "axis"],
)
def test_rejects_an_impossible_shape(shape, mention):
    result = run("--backend", "numpy", *BACKEND, f"--shape={shape}")
    assert result.exit_code == 2
    assert mention in result.output


@pytest.mark.parametrize(
    ("of_input", "arguments", "mention"),
    [
        ("float32", ["--dtype", "float16"], "must match --input, float32, got 'float16'"),
        ("int32", [], "complex128, got 'int32'"),
    ],
)
def test_rejects_a_dtype_that_differs_from_the_input(dump, of_input, arguments, mention):
    x = dump(np.ones(SHAPE, dtype=of_input))
    result = run("--backend", "numpy", *BACKEND, "--input", x, *arguments)
    assert result.exit_code == 2
    assert mention in result.output


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--broadcast-axes", "1"], "--broadcast-axes in mode eager: masks are elementwise there"),
        (["--global-shape", "9x9", "--start", "0x0"], "--global-shape in mode eager: no windows"),
    ],
    ids=["axes", "window"],
)
def test_rejects_undeclared_capabilities_with_the_reason(theirs, arguments, mention):
    lacking = (
        "    capabilities = {'broadcast_axes': 'masks are elementwise there', 'windows': None}\n"
        "    mode_exclusions = {'eager': {'windows': 'no windows'}}\n"
    )
    theirs("Correct", lacking)
    result = run("--backend", "theirs", *BACKEND, "--shape", "4x5", *arguments)
    assert result.exit_code == 2
    assert mention in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "mention"),
    [
        (["--backend", "numpi"], 2, "got 'numpi'"),
        (["--backend", "numpy", "--mode", "graph"], 2, "fused-general, got 'graph'"),
        (["--backend", "numpy", "--device", "gpu"], 2, "must be one of cpu, got 'gpu'"),
        (["--backend", "numpy", "--dtype", "int8"], 2, "complex128, got 'int8'"),
        (["--backend", "numpy", "--site", "encoder/0"], 2, "does not support --site"),
        (["--backend", "numpy", "--input", "{dump}"], 2, "either --shape or --input"),
        (["--backend", "numpy", "{dump}"], 2, "accepts no files"),
        (["--mode", "eager"], 2, "pass files, or --backend"),
        (["--backend", "raising"], 1, "raising raised ZeroDivisionError"),
        (["--backend", "absent"], 1, "absent could not be loaded"),
    ],
    ids=["name", "mode", "device", "dtype", "site", "both", "dump", "none", "raises", "absent"],
)
def test_names_invalid_arguments_with_a_backend(install, dump, arguments, code, mention):
    raising = "    def dropout(self, *arguments, **options):\n        1 / 0\n"
    install("raising", backend_source("raising", "Correct", raising))
    install("absent", "import no_such_library")
    chosen = (argument.format(dump=dump(KEPT)) for argument in arguments)
    result = run(*chosen, *BACKEND, "--shape", "4x50")
    assert result.exit_code == code
    assert mention in result.output


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["{dump}"], "pass --seed and --p"),
        (["no-such-file.npy"], "no-such-file.npy"),
        (["{text}", *OPTIONS], "must be a .npy file"),
        (["{empty}", *OPTIONS], "must be a .npy file"),
        (["{words}", *OPTIONS], "must be a .npy file of numbers"),
        (["{dump}", "{dump}", "--seed", "42"], "each other, got only --seed"),
        (
            ["{dump}", "--seed", "42", "--step", "-1", "--p", "0.3"],
            "must be in [0, 2^64), got '-1'",
        ),
        (["{dump}", *OPTIONS[:-1], "1.5"], "1.5"),
        (["{dump}", "--input", "{half}", *OPTIONS], "(3, 50)"),
        (["{dump}", *OPTIONS, "--start", "0x0"], "global_shape and start go together"),
        (["{dump}", *OPTIONS, "--broadcast-axes", "two"], "must be axes such as 2,3"),
    ],
    ids=[
        *("no key", "no file", "no npy", "empty", "words", "half a key", "step", "rate", "input"),
        *("window", "axes"),
    ],
)
def test_names_invalid_arguments_and_exits_with_2(dump, tmp_path, arguments, mention):
    (tmp_path / "text.npy").write_text("text")
    (tmp_path / "empty.npy").touch()
    paths = {name: tmp_path / f"{name}.npy" for name in ("text", "empty")}
    paths |= {"dump": dump(KEPT), "half": dump(KEPT[:3], "half.npy")}
    paths["words"] = dump(np.array(["a", "b"]), "words.npy")
    result = run(*(str(argument).format(**paths) for argument in arguments))
    assert result.exit_code == 2
    assert mention in result.output


def test_draws_a_mask_with_one_square_per_element(tmp_path):
    path = tmp_path / "mask.png"
    arguments = ["mask", *OPTIONS[:-1], "0.5", "--shape", "3x8", "--png", str(path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    with Image.open(path) as picture:
        side = picture.width // 8
        assert picture.size == (8 * side, 3 * side)
        pixels = np.asarray(picture)
    centres = pixels[side // 2 :: side, side // 2 :: side]
    rows = ["".join(str(int(pixel > 0)) for pixel in row) for row in centres]
    assert rows == ["10011001", "10001011", "01101100"]


def test_rejects_drawing_an_empty_mask(tmp_path):
    arguments = ["mask", *OPTIONS, "--shape", "0x8", "--png", str(tmp_path / "mask.png")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "without elements" in result.output


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (1, "nothing is dropped, as in evaluation or at p = 0"),
        (0, "everything is dropped, as at p = 1"),
    ],
)
def test_names_a_constant_mask_at_any_rate(p, value, cause):
    kept = np.full((20, 30), value, dtype=bool)
    assert diagnose(StreamModel(42, (7,), p, kept.shape), kept).causes == (cause,)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_accepts_the_mask_of_overflowing_products(dtype):
    of = numpy_dtype(dtype)
    x = np.full((20, 30), ml_dtypes.finfo(of).max, dtype=of)
    model = StreamModel(42, (7,), 0.3, x.shape)
    keep = model.keep(np.arange(x.size)).reshape(x.shape)
    with np.errstate(all="ignore"):
        y = ((x * of.type(1 / 0.7)).astype(of) * keep).astype(of)
        diagnosis = diagnose(model, y, x)
    assert "the mask is right, the output is wrong" in diagnosis.description
