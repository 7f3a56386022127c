"""Define the contracts of the generator and of keys."""

from unidrop.conformance.compare import ContractError, check_equal
from unidrop.conformance.contracts.contract import RATE, SHAPE, Cell, contract
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.conformance.golden import read_golden
from unidrop.philox import ROUNDS, philox


@contract("generator", "The generator returns its known answers.", ("words",))
def _generator(cell: Cell) -> None:
    for vector in read_golden()["generator"]:
        counter, key = ([int(word, 16) for word in vector[name]] for name in ("counter", "key"))
        actual = [f"{word:08x}" for word in cell.capable.words(counter, key, mode=cell.mode)]
        name = f"words of counter {' '.join(vector['counter'])} and key {' '.join(vector['key'])}:"
        try:
            check_equal(actual, vector["words"], name)
        except ContractError as error:
            raise error.with_causes(_find_causes(counter, key, actual)) from None


def _find_causes(counter: list[int], key: list[int], actual: list[str]) -> list[str]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    return [
        f"the generator runs {rounds} rounds instead of {ROUNDS}"
        for rounds in range(1, 17)
        if actual == [f"{word:08x}" for word in philox((c0, c1, c2, c3), (k0, k1), rounds=rounds)]
    ]


@contract("keys", "Folding in integers and strings returns the golden keys.", ("key",))
def _keys(cell: Cell) -> None:
    for vector in read_golden()["keys"]:
        data = [i["str"] if "str" in i else int(i["int"], 16) for i in vector["fold_in"]]
        actual = cell.capable.key(int(vector["seed"], 16), *data)
        check_equal(f"{actual:016x}", vector["key"], f"key of {vector['fold_in']}:")


@contract("traced-key", "Folding in an array equals folding in its value.", ("traced_key",))
def _traced_key(cell: Cell) -> None:
    for seed, step in ((0, 0), (42, 7), (2**64 - 1, 2**31 - 1)):
        actual = cell.capable.traced_key(seed, step, mode=cell.mode)
        expected = int(StreamModel(seed, (step,), RATE, SHAPE).key)
        check_equal(f"{actual:016x}", f"{expected:016x}", "key")
