"""Contracts of the generator and of keys."""

import unidrop
from unidrop.conformance.compare import ContractError, check_equal
from unidrop.conformance.contracts.contract import Cell, contract
from unidrop.conformance.golden import read_golden
from unidrop.philox import ROUNDS, philox


@contract("generator", "The generator gives its known answers on the backend's arrays.", ("words",))
def _generator(cell: Cell) -> None:
    for vector in read_golden()["generator"]:
        counter, key = ([int(word, 16) for word in vector[name]] for name in ("counter", "key"))
        actual = [f"{word:08x}" for word in cell.able.words(counter, key, mode=cell.mode)]
        what = (
            f"words of counter {' '.join(vector['counter'])} under key {' '.join(vector['key'])}:"
        )
        try:
            check_equal(actual, vector["words"], what)
        except ContractError as error:
            raise error.explained(_causes(counter, key, actual)) from None


def _causes(counter: list[int], key: list[int], actual: list[str]) -> list[str]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    return [
        f"the generator makes {rounds} rounds instead of {ROUNDS}"
        for rounds in range(1, 17)
        if actual == [f"{word:08x}" for word in philox((c0, c1, c2, c3), (k0, k1), rounds=rounds)]
    ]


@contract("keys", "Integers and strings fold to the keys of the golden vectors.", ("key",))
def _keys(cell: Cell) -> None:
    for vector in read_golden()["keys"]:
        data = [i["str"] if "str" in i else int(i["int"], 16) for i in vector["fold_in"]]
        actual = cell.able.key(int(vector["seed"], 16), *data)
        check_equal(f"{actual:016x}", vector["key"], f"key of {vector['fold_in']}:")


@contract("traced-key", "A step that is an array folds to the key of its value.", ("traced_key",))
def _traced_key(cell: Cell) -> None:
    for seed, step in ((0, 0), (42, 7), (2**64 - 1, 2**31 - 1)):
        actual = cell.able.traced_key(seed, step, mode=cell.mode)
        check_equal(f"{actual:016x}", f"{int(unidrop.Key(seed).fold_in(step)):016x}", "key")
