"""The benchmarks compute their figures correctly from any measured values."""

import gc
import io
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import runner, timing
from benchmarks.config import DEFAULT, LARGE, MIDDLE, QUICK, SMALL, full
from benchmarks.markdown import format_markdown
from benchmarks.memory import OWN_ATTENTION
from benchmarks.report import Report
from benchmarks.rows import Outcome, Row, UnavailableError
from benchmarks.thresholds import at_most, at_most_more, below, faster
from benchmarks.timing import Candidate, interleaved, median_seconds

ROOT = Path(__file__).parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
MACHINE = {
    "processor": "abacus",
    "cpus": 2,
    "python": "3",
    "libraries": {},
    "unidrop": "0",
    "unidrop_path": "fused: for the test",
    "load": 0.0,
}


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    files = {"json": "figures.json", "markdown": "tables.md", "png": "figure.png"}
    paths = [text for name in files for text in (f"--{name}", str(folder / files[name]))]
    finished = python("-W", "error", "-m", "benchmarks", "--quick", "--only", "numpy", *paths)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads((folder / "figures.json").read_text()), folder


def make_report(*outcomes, skipped=()):
    return Report(MACHINE, QUICK, outcomes, skipped)


def get_rows(written, name, shape):
    return [row for row in written["rows"] if (row["name"], row["shape"]) == (name, list(shape))]


def render(report):
    console = Console(file=io.StringIO(), width=140)
    report.print(console)
    return console.file.getvalue()


def make_outcome(values, *targets, base="multiply", shape=(1000,), own=None):
    row = Row("group", "task", shape, lambda config: values, base=base, own=own, targets=targets)
    return Outcome(row, [values])


class Clock:
    """A clock that only advances when a candidate spends time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    return clock


def test_prints_and_writes_every_candidate(quick):
    shown, written, _ = quick
    (forward,) = get_rows(written, "forward", SMALL)
    names = [candidate["name"] for candidate in forward["candidates"]]
    assert names == ["unidrop", "unidrop, no key", "multiply", "hand-written"]
    for name in names:
        assert name in shown
    assert "targets reached" in shown
    assert written["skipped"] == []


def test_writes_the_machine_and_libraries_to_json(quick):
    machine = quick[1]["machine"]
    assert machine["cpus"] >= 1
    assert machine["unidrop_threads"] >= 1
    assert machine["unidrop_path"].partition(":")[0] in ("fused", "portable")
    assert "numpy" in machine["libraries"]
    assert machine["python"].startswith(f"{sys.version_info.major}.")


def test_derives_json_ratios_and_verdicts_from_times(quick):
    rows = quick[1]["rows"]
    assert any(row["targets"] for row in rows)
    for row in rows:
        values = {candidate["name"]: candidate["value"] for candidate in row["candidates"]}
        elements = 1
        for length in row["shape"]:
            elements *= length
        for candidate in row["candidates"]:
            assert candidate["value"] > 0
            assert candidate["runs"] == [candidate["value"]]
            assert candidate["ratio"] == pytest.approx(candidate["value"] / values[row["base"]])
            assert candidate["ns_per_element"] == pytest.approx(candidate["value"] / elements * 1e9)
        for target in row["targets"]:
            bound, _, reference = target["target"].partition(" x ")
            assert bound == f"≤ {target['bound']:g}"
            assert target["figure"] == pytest.approx(
                values[target["candidate"]] / values[reference]
            )
            assert target["reached"] == (target["figure"] <= target["bound"])


def test_writes_ratios_and_times_to_markdown(quick):
    _, written, folder = quick
    lines = (folder / "tables.md").read_text(encoding="utf-8").splitlines()
    (forward,) = get_rows(written, "forward", SMALL)
    ours, _, _, own = (candidate["value"] for candidate in forward["candidates"])
    ratios, times = (line.split(" | ") for line in lines if line.startswith("| NumPy, forward |"))
    assert ratios[2].rstrip(" |") == f"{ours / own:.2f}"
    assert times[1].count(" / ") == 2


def test_lists_missed_targets_in_markdown():
    values = {"unidrop": 2.0, "multiply": 1.0, "own": 2.5}
    targets = (at_most(1, "unidrop", "own"), at_most(1.5, "unidrop", "multiply"))
    text = format_markdown(make_report(make_outcome(values, *targets, shape=SMALL, own="own")))
    assert "| group, task | 0.80 |" in text
    assert "| group, task | 2 s / 1 s / 2.5 s |" in text
    assert "1 targets reached, 1 not reached:" in text
    assert "- group, task, (32, 128), unidrop: 2 (≤ 1.5 x multiply)" in text
    assert text.count("\n- ") == 1


@pytest.mark.parametrize(
    ("shape", "text"), [((10**8,), "10^8"), (LARGE, "16M"), (SMALL, "(32, 128)"), ((7,), "7")]
)
def test_names_sizes_in_markdown(shape, text):
    values = {"unidrop": 2.0, "multiply": 1.0, "own": 2.5}
    table = format_markdown(make_report(make_outcome(values, shape=shape, own="own")))
    assert f"the framework's own | {text} |" in table


def test_writes_a_png(quick):
    assert (quick[2] / "figure.png").read_bytes().startswith(PNG_SIGNATURE)


def test_reports_a_missing_library():
    code = (
        "import sys; sys.modules['torch'] = None; from benchmarks.__main__ import main; "
        "main(['--quick', '--only', 'torch'])"
    )
    finished = python("-c", code)
    assert finished.returncode == 0, finished.stderr
    assert "torch: not measured, torch is not installed" in finished.stdout


def test_raises_if_an_own_module_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks.groups.numpy", None)
    with pytest.raises(ModuleNotFoundError, match="benchmarks"):
        runner.load(["numpy"], QUICK)


def test_reports_an_unavailable_row_and_measures_others():
    def nowhere(config):
        raise UnavailableError("not on this machine")

    rows = [
        Row("group", "first", None, nowhere),
        Row("group", "second", None, lambda config: {"multiply": 1.0}),
    ]
    outcomes, skipped = runner.run(rows, QUICK, 2, lambda row: None)
    assert [outcome.row.name for outcome in outcomes] == ["second"]
    text = render(make_report(*outcomes, skipped=skipped))
    assert text.count("group, first: not measured, not on this machine") == 1


@pytest.mark.slow
def test_runs_only_rows_of_a_name():
    arguments = ("--quick", "--rounds", "1", "--only", "numpy", "--row", "ward, out=")
    finished = python("-m", "benchmarks", *arguments)
    assert finished.returncode == 0, finished.stderr
    names = re.findall(r"^│ (\w.*?) +│", finished.stdout, re.MULTILINE)
    assert len(names) == 4
    assert all(name.startswith("forward, out=") for name in names)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rounds", "0"),
        ("--only", "abacus"),
        ("--repeat", "0"),
        ("--only", "numpy", "--row", "abacus"),
    ],
)
def test_exits_with_2_on_bad_arguments(arguments):
    assert python("-m", "benchmarks", *arguments).returncode == 2


def test_rejects_a_missing_folder_before_measuring(tmp_path):
    finished = python("-m", "benchmarks", "--json", str(tmp_path / "none" / "figures.json"))
    assert finished.returncode == 2
    assert "is not a folder" in finished.stderr


def test_rotates_the_order_of_candidates_each_round():
    order = []
    samples = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    interleaved(samples, 4)
    assert "".join(order) == "abcbcacababc"


def test_returns_the_median_over_rounds():
    taken = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 4.0, 100.0])}
    samples = {name: values.__next__ for name, values in taken.items()}
    assert interleaved(samples, 3) == {"a": 2.0, "b": 5.0}


def test_repeats_small_candidates_until_a_block_is_long(clock):
    calls = []
    candidates = [
        Candidate("small", lambda number: calls.append(number) or clock.spend(1e-5)),
        Candidate("large", lambda number: clock.spend(3e-3)),
    ]
    seconds = median_seconds(candidates, rounds=5, block=1e-3)
    assert seconds == pytest.approx({"small": 1e-5, "large": 3e-3})
    assert len(calls) >= 5 * 100


def test_never_repeats_a_call_number(clock):
    numbers = []
    candidate = Candidate("a", lambda number: numbers.append(number) or clock.spend(1e-4))
    median_seconds([candidate], rounds=3, block=1e-3)
    assert numbers == list(range(len(numbers)))


def test_excludes_the_first_call_from_timing(clock):
    candidate = Candidate("a", lambda number: clock.spend(1e-3 if number else 60.0))
    assert median_seconds([candidate], rounds=1, block=1e-3)["a"] == pytest.approx(1e-3)


def test_disables_garbage_collection_while_timing(clock):
    seen = set()
    candidate = Candidate("a", lambda number: seen.add(gc.isenabled()) or clock.spend(1.0))
    assert gc.isenabled()
    median_seconds([candidate], rounds=2, block=1.0)
    assert seen == {False}
    assert gc.isenabled()


def test_excludes_the_context_of_a_candidate_from_timing(clock):
    inside = []

    @contextmanager
    def slow():
        clock.spend(100.0)
        inside.append(True)
        yield
        inside.clear()

    def call(number):
        assert inside
        clock.spend(1.0)

    assert median_seconds([Candidate("a", call, slow)], rounds=3, block=1.0)["a"] == 1.0


@pytest.mark.parametrize(
    ("target", "seconds", "figure", "reached"),
    [
        (at_most(1.5, "unidrop", "multiply"), 1.5, 1.5, True),
        (at_most(1.5, "unidrop", "multiply"), 1.75, 1.75, False),
        (faster(8, "unidrop", "naive"), 2.0, 8.0, True),
        (faster(8, "unidrop", "naive"), 4.0, 4.0, False),
        (at_most_more(0.5, "unidrop", "multiply", "a little more"), 1.5, 0.5, True),
        (at_most_more(0.5, "unidrop", "multiply", "a little more"), 1.75, 0.75, False),
        (below(0, "unidrop", "nothing"), 0.0, 0.0, True),
        (below(0, "unidrop", "nothing"), 1.0, 1.0, False),
    ],
)
def test_judges_a_figure_by_its_target(target, seconds, figure, reached):
    outcome = make_outcome({"unidrop": seconds, "multiply": 1.0, "naive": 16.0}, target)
    (verdict,) = outcome.verdicts
    assert (verdict.figure, verdict.reached) == (figure, reached)
    word = "reached" if reached else "not reached"
    assert f"{target.text}: {figure:.3g}, {word}" in render(make_report(outcome))


def test_counts_missed_targets_in_the_last_line():
    values = {"unidrop": 2.0, "multiply": 1.0}
    targets = (at_most(1.5, "unidrop", "multiply"), at_most(3, "unidrop", "multiply"))
    report = make_report(make_outcome(values, *targets))
    assert report.summary() == "1 targets reached, 1 not reached"


def test_computes_ratios_within_each_run():
    runs = iter(
        [
            {"unidrop": 1.0, "multiply": 1.0},
            {"unidrop": 30.0, "multiply": 10.0},
            {"unidrop": 4.0, "multiply": 2.0},
        ]
    )
    target = at_most(1.5, "unidrop", "multiply")
    row = Row("group", "task", None, lambda config: next(runs), targets=(target,))
    (outcome,), _ = runner.run([row], QUICK, 3, lambda row: None)
    assert outcome.value("unidrop") == 4.0
    assert outcome.ratio("unidrop") == 2.0
    assert [verdict.figure for verdict in outcome.verdicts] == [2.0]
    (written,) = json.loads(make_report(outcome).to_json())["rows"]
    assert written["candidates"][0]["runs"] == [1.0, 30.0, 4.0]


def test_omits_ratios_if_the_base_is_0():
    outcome = make_outcome({"unidrop": 0.0, "multiply": 0.0})
    assert outcome.ratio("unidrop") is None
    assert "group" in render(make_report(outcome))


@pytest.mark.parametrize(("load", "warns"), [(0.1, False), (1.9, True), (None, False)])
def test_warns_of_a_busy_machine(load, warns):
    report = Report(MACHINE | {"load": load}, QUICK, [], [])
    assert ("other processes were busy" in render(report)) == warns


def test_adds_the_largest_shape_in_full():
    assert full(DEFAULT) == replace(DEFAULT, shapes=(*DEFAULT.shapes, (10**8,)))


@pytest.mark.parametrize(
    ("group", "name", "shape", "texts"),
    [
        ("numpy", "forward", (100,), {"≤ 1 x hand-written"}),
        ("numpy", "forward, out=", LARGE, {"≤ 1.3 x multiply"}),
        ("numpy", "forward, out=, 1 thread", MIDDLE, {"≤ 2.2 x multiply"}),
        ("torch", "forward", SMALL, {"≤ 1 x F.dropout"}),
        ("torch", "forward", LARGE, {"≤ 1 x F.dropout", "≤ 0.6 x multiply"}),
        ("torch", "forward + backward", LARGE, {"≤ 1 x F.dropout", "≤ 1.3 x multiply"}),
        ("torch", "forward + backward, 1 thread", MIDDLE, {"≤ 2.2 x multiply"}),
        ("torch", "compiled forward", SMALL, {"≤ 1.3 x F.dropout"}),
        *(
            ("torch", name, DEFAULT.attention, {f"≤ 1.3 x {OWN_ATTENTION}"})
            for name in ("attention forward", "attention forward + backward")
        ),
        pytest.param(
            "memory",
            "torch attention peak, forward + backward",
            DEFAULT.attention,
            {f"≤ 0.333 x {OWN_ATTENTION}"},
            marks=needs_linux,
        ),
        ("tensorflow", "forward + backward", SMALL, {"≤ 1 x tf.nn.dropout"}),
        (
            "tensorflow",
            "tf.function forward + backward",
            LARGE,
            {"≥ 2.5 x faster than tf.nn.dropout"},
        ),
        ("keras", "forward", LARGE, {"≤ 1 x keras.layers.Dropout"}),
        ("jax", "jit forward", LARGE, {"≤ 1 x bernoulli + where", "≤ 1.3 x multiply"}),
        ("startup", "first call", None, {"< 0.5 s"}),
    ],
)
def test_has_the_documented_targets(group, name, shape, texts):
    rows, skipped = runner.load([group], DEFAULT)
    assert not skipped
    (row,) = (row for row in rows if (row.name, row.shape) == (name, shape))
    assert texts <= {target.text for target in row.targets}


@needs_linux
def test_includes_allocations_of_call_in_peak():
    def peak(candidate):
        finished = python("-m", "benchmarks.memory", "numpy", candidate, str(1 << 22))
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout)["peak"]

    # A multiply allocates a float32 output. The naive dropout also needs random numbers and a mask.
    assert 3.9 < peak("multiply") < 5
    assert peak("naive") > 7
