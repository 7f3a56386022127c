"""Huge pages: dropout asks the system for them in large new arrays, and nowhere else."""

import ctypes
import mmap
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

import unidrop
from unidrop.fused import memory

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = 64 << 20

pytestmark = pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="this system does not leave huge pages to those that ask for them",
)


def is_advised(address):
    """Return whether the process has asked for huge pages at an address."""
    mapping = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            mapping = range(*(int(bound, 16) for bound in found.groups()))
        elif line.startswith("VmFlags:") and mapping and address in mapping:
            return "hg" in line.split()
    raise AssertionError("the address is not mapped")


@pytest.fixture
def pages():
    """Return the address of new memory."""
    with mmap.mmap(-1, LARGE) as mapped:
        buffer = ctypes.c_char.from_buffer(mapped)
        yield ctypes.addressof(buffer)
        del buffer


def test_asks_for_huge_pages_inside_of_memory_alone(pages):
    memory.advise_huge_pages(pages + 100, LARGE - 200)
    assert not is_advised(pages)
    assert is_advised(pages + mmap.PAGESIZE)
    assert is_advised(pages + LARGE - 2 * mmap.PAGESIZE)
    assert not is_advised(pages + LARGE - mmap.PAGESIZE)


def test_asks_for_no_huge_pages_in_small_memory(pages):
    memory.advise_huge_pages(pages, (32 << 20) - 1)
    assert not is_advised(pages + mmap.PAGESIZE)


@pytest.mark.parametrize("text", [None, "always [never] madvise"])
def test_asks_no_system_that_decides_alone(pages, monkeypatch, text):
    def read_text(path):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    memory._get_advise.cache_clear()
    memory.advise_huge_pages(pages, LARGE)
    memory._get_advise.cache_clear()
    monkeypatch.undo()
    assert not is_advised(pages + mmap.PAGESIZE)


@pytest.mark.parametrize("path", ["plain", "fused"])
def test_asks_for_huge_pages_in_large_outputs(path):
    torch = pytest.importorskip("torch")
    from unidrop.adapters.torch import dropout

    x = torch.ones(LARGE // 4)
    with unidrop.force_path(path) if path == "fused" else nullcontext():
        y = dropout(x, 0.5, key=unidrop.Key(1))
    assert is_advised(y.data_ptr() + LARGE // 2)
    assert not is_advised(x.data_ptr() + LARGE // 2)
