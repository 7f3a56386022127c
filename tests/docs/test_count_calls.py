from count_calls import crossings, record

from unidrop import Key
from unidrop.adapters.numpy import dropout


def test_counts_calls_of_the_package_alone():
    calls = record(lambda: Key(sum(range(42))))
    assert calls[0][1].co_qualname == "Key.__init__"
    assert all("unidrop" in code.co_filename for _, code in calls)
    assert record(lambda: sum(range(42))) == []


def test_counts_crossings_where_the_file_of_the_caller_changes():
    calls = record(lambda: dropout([1.0, 2.0], 0.5, key=Key(42)))
    marked = [(code.co_qualname, crosses) for (_, code), crosses in crossings(calls)]
    assert ("dropout", True) in marked
    assert ("checked_integer", True) in marked
    assert ("_get_rate", False) in marked
