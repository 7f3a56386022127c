"""What tests share: backends that are installed as a third party's, and the order of files."""

import os
import sys
import textwrap
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec

import pytest

# PyTorch's compiler imports Triton, which crashes a process that has imported TensorFlow before.
with suppress(ImportError):
    import triton  # noqa: F401

HAS_TRITON = find_spec("triton") is not None

pytest.register_assert_rewrite("fused_arrays")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Skip tests that need Triton, and begin with the files that have the most slow tests."""
    for item in items:
        if item.get_closest_marker("triton") and not HAS_TRITON:
            item.add_marker(pytest.mark.skip(reason="the extra triton is not installed"))
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a module, and register its ``make`` as a backend, here and in new processes."""
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, code):
        # Another test may have installed and imported other code under this name.
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[unidrop.backends]\n{name} = {name}:make\n")

    return install
