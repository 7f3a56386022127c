"""Who does what next in the matrix: each mode once, and help for a backend only where that pays."""

from threading import Thread

import pytest

from unidrop.conformance.schedule import Schedule, Work


def begun(schedule, *, modes, loading=1.0):
    work = schedule.next()
    schedule.plan(work, modes, loading)
    return work


def taken(schedule, work):
    return list(iter(lambda: schedule.take(work), ()))


def test_backends_are_begun_in_order_and_then_there_is_nothing_more_to_do():
    schedule = Schedule(["one", "other"])
    works = [begun(schedule, modes=[]) for _ in range(2)]
    assert [work.name for work in works] == ["one", "other"]
    assert schedule.next() is None


def test_each_mode_is_taken_once_whoever_takes_it():
    schedule = Schedule(["slow"])
    work = begun(schedule, modes=[range(3), range(3, 5)])
    assert list(schedule.take(work)) == [0, 1, 2]
    schedule.ran(work, 100.0)
    assert schedule.next() is work
    assert [list(cells) for cells in taken(schedule, work)] == [[3, 4]]
    assert schedule.next() is None


@pytest.mark.parametrize(
    ("seconds", "loading", "processes"),
    [(1.0, 2.1, 1), (1.0, 1.9, 2), (0.0, 0.1, 1)],
    ids=["loading takes half of what is left", "two share it", "nothing takes time"],
)
def test_no_process_is_loaded_that_would_save_nothing(seconds, loading, processes):
    work = Work("plain", modes=[range(4)], loading=loading, running=seconds, ran=1)
    work.processes = processes
    work.is_planned = True
    assert not work.pays
    work.loading = 0.01
    work.running = 1.0
    assert work.pays


def test_nothing_is_known_of_what_has_not_run():
    work = Work("plain", modes=[range(4)], processes=1, loading=1.0)
    assert work.left == 0
    assert not work.pays


def test_help_goes_where_most_is_left():
    schedule = Schedule(["short", "long"])
    for cells in (range(10), range(1000)):
        schedule.ran(begun(schedule, modes=[cells]), 5.0)
    assert schedule.next().name == "long"


def test_a_backend_that_can_not_be_loaded_twice_is_left_to_the_first():
    schedule = Schedule(["one"])
    work = begun(schedule, modes=[range(1000)])
    schedule.ran(work, 5.0)
    schedule.keep_to_one(schedule.next())
    assert not work.pays
    assert len(schedule.take(work)) == 1000


def test_the_last_process_of_a_backend_is_told_so():
    schedule = Schedule(["slow"])
    work = begun(schedule, modes=[range(1000)])
    schedule.ran(work, 5.0)
    assert schedule.next() is work
    assert [schedule.leave(work), schedule.leave(work)] == [False, True]


@pytest.mark.parametrize("end", ["give_up", "stop"])
def test_what_is_given_up_is_handed_out_no_more(end):
    schedule = Schedule(["one"])
    work = begun(schedule, modes=[range(1000)])
    schedule.ran(work, 5.0)
    if end == "stop":
        schedule.stop()
    else:
        schedule.give_up(work)
    assert schedule.next() is None
    assert not schedule.take(work)


def test_who_has_nothing_to_do_waits_for_a_backend_that_turns_out_to_take_long():
    schedule, actual = Schedule(["slow"]), []
    work = begun(schedule, modes=[range(1000)])
    waiting = Thread(target=lambda: actual.append(schedule.next()))
    waiting.start()
    schedule.ran(work, 5.0)
    waiting.join(timeout=60)
    assert actual == [work]
