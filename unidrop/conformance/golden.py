"""The golden vectors: what the specification says, computed without any of unidrop's own code."""

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.mask import STREAM_VERSION

__all__ = [
    "GoldenMask",
    "GoldenOutput",
    "golden_masks",
    "golden_outputs",
    "read_golden",
    "write_vectors",
]

_FILES = files("unidrop.conformance").joinpath("vectors")

_COMPONENTS = {
    "float16": (np.uint16, np.float16),
    "bfloat16": (np.uint16, ml_dtypes.bfloat16),
    "float32": (np.uint32, np.float32),
    "float64": (np.uint64, np.float64),
    "complex64": (np.uint32, np.complex64),
    "complex128": (np.uint64, np.complex128),
}


@dataclass(frozen=True, slots=True)
class GoldenMask:
    """A mask of the specification; ``keep`` has the mask's own shape."""

    name: str
    seed: int
    step: int
    p: float
    shape: tuple[int, ...]
    broadcast_axes: tuple[int, ...]
    global_shape: tuple[int, ...] | None
    start: tuple[int, ...] | None
    keep: NDArray[np.bool]

    @property
    def options(self) -> dict[str, Any]:
        """The options of dropout that this mask needs, only those."""
        options: dict[str, Any] = {}
        if self.broadcast_axes:
            options["broadcast_axes"] = self.broadcast_axes
        if self.global_shape is not None:
            options["global_shape"] = self.global_shape
            options["start"] = self.start
        return options

    @property
    def recipe(self) -> StreamModel:
        """How the mask is made."""
        window = self.global_shape, self.start
        return StreamModel(
            self.seed, (self.step,), self.p, self.shape, self.broadcast_axes, *window
        )

    @property
    def command(self) -> str:
        """The command that prints the mask."""
        return f"unidrop mask {self.recipe.arguments}"


@dataclass(frozen=True, slots=True)
class GoldenOutput:
    """An input, and the output of the specification for it."""

    name: str
    seed: int
    step: int
    p: float
    dtype: str
    x: NDArray[Any]
    y: NDArray[Any]

    def reshaped(self, shape: tuple[int, ...]) -> "GoldenOutput":
        """Return the same elements in another shape, in which their indices are the same."""
        return replace(self, x=self.x.reshape(shape), y=self.y.reshape(shape))

    @property
    def recipe(self) -> StreamModel:
        """How the mask is made."""
        return StreamModel(self.seed, (self.step,), self.p, self.x.shape)


@cache
def read_golden() -> dict[str, Any]:
    """Return the vectors as they stand in the file.

    Raises
    ------
    ValueError
        If the file names another version of the stream.
    """
    text = _FILES.joinpath("vectors.json").read_text(encoding="utf-8")
    vectors: dict[str, Any] = json.loads(text)
    if vectors.get("stream", 1) != STREAM_VERSION:
        raise ValueError(f"stream has to be {STREAM_VERSION}, but got {vectors['stream']}")
    return vectors


def write_vectors(folder: Path) -> list[Path]:
    """Write the vectors into a folder, with their schema and a README, and return the files.

    They are enough to check an implementation in any language.

    Raises
    ------
    OSError
        If a file can't be written.
    """
    written = []
    for name in ("README.md", "schema.json", "vectors.json"):
        path = folder / name
        path.write_text(_FILES.joinpath(name).read_text(encoding="utf-8"), encoding="utf-8")
        written.append(path)
    return written


@cache
def golden_masks() -> tuple[GoldenMask, ...]:
    """Return the golden masks."""
    return tuple(
        GoldenMask(
            name=v["name"],
            seed=int(v["seed"], 16),
            step=v["step"],
            p=v["p"],
            shape=tuple(v["shape"]),
            broadcast_axes=tuple(v["broadcast_axes"]),
            global_shape=None if v["global_shape"] is None else tuple(v["global_shape"]),
            start=None if v["start"] is None else tuple(v["start"]),
            keep=np.array([c == "1" for c in v["keep"]], dtype=bool).reshape(v["mask_shape"]),
        )
        for v in read_golden()["masks"]
    )


@cache
def golden_outputs() -> tuple[GoldenOutput, ...]:
    """Return the golden outputs."""
    return tuple(
        GoldenOutput(
            name=v["name"],
            seed=int(v["seed"], 16),
            step=v["step"],
            p=v["p"],
            dtype=v["dtype"],
            x=_from_bits(v["x"], v["dtype"]).reshape(v["shape"]),
            y=_from_bits(v["y"], v["dtype"]).reshape(v["shape"]),
        )
        for v in read_golden()["outputs"]
    )


def _from_bits(patterns: list[str], dtype: str) -> NDArray[Any]:
    unsigned, floating = _COMPONENTS[dtype]
    return np.array([int(pattern, 16) for pattern in patterns], dtype=unsigned).view(floating)
