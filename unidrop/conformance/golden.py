"""Read the golden vectors, which separate integer code computed from the specification."""

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
    "GoldenAttention",
    "GoldenMask",
    "GoldenMember",
    "GoldenOutput",
    "GoldenPermutation",
    "golden_attention",
    "golden_masks",
    "golden_members",
    "golden_outputs",
    "golden_permutations",
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
    """A mask computed from the specification; ``keep`` has length 1 along broadcast axes."""

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
        """The options of dropout that this mask requires."""
        options: dict[str, Any] = {}
        if self.broadcast_axes:
            options["broadcast_axes"] = self.broadcast_axes
        if self.global_shape is not None:
            options["global_shape"] = self.global_shape
            options["start"] = self.start
        return options

    @property
    def model(self) -> StreamModel:
        """The model that computes the mask."""
        window = self.global_shape, self.start
        return StreamModel(
            self.seed, (self.step,), self.p, self.shape, self.broadcast_axes, *window
        )

    @property
    def command(self) -> str:
        """The command that prints the mask."""
        return f"unidrop mask {self.model.cli_arguments}"


@dataclass(frozen=True, slots=True)
class GoldenOutput:
    """An input and its output, computed from the specification."""

    name: str
    seed: int
    step: int
    p: float
    dtype: str
    x: NDArray[Any]
    y: NDArray[Any]

    def reshaped(self, shape: tuple[int, ...]) -> "GoldenOutput":
        """Return the same elements in another shape; each keeps its flat index."""
        return replace(self, x=self.x.reshape(shape), y=self.y.reshape(shape))

    @property
    def model(self) -> StreamModel:
        """The model that computes the mask."""
        return StreamModel(self.seed, (self.step,), self.p, self.x.shape)


@dataclass(frozen=True, slots=True)
class GoldenAttention:
    """Queries, keys, values and the output of attention, computed from the specification.

    Axes are batch, head, position and feature.
    """

    name: str
    seed: int
    step: int
    p: float
    is_causal: bool
    query: NDArray[np.float64]
    key: NDArray[np.float64]
    value: NDArray[np.float64]
    y: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GoldenMember:
    """An input and the output of a member of the family, computed from the specification.

    ``p`` is the second argument of the member's function, and ``options`` are the others.
    """

    name: str
    member: str
    seed: int
    step: int
    p: float
    options: dict[str, Any]
    dtype: str
    x: NDArray[Any]
    y: NDArray[Any]


@dataclass(frozen=True, slots=True)
class GoldenPermutation:
    """Permutations of rows, computed from the specification."""

    name: str
    seed: int
    step: int
    indices: NDArray[np.int64]


@cache
def read_golden() -> dict[str, Any]:
    """Return the parsed file of vectors.

    Raises
    ------
    ValueError
        If the file contains vectors of another stream version.
    """
    text = _FILES.joinpath("vectors.json").read_text(encoding="utf-8")
    vectors: dict[str, Any] = json.loads(text)
    if vectors.get("stream", 1) != STREAM_VERSION:
        raise ValueError(f"stream must be {STREAM_VERSION}, got {vectors['stream']!r}")
    return vectors


def write_vectors(folder: Path) -> list[Path]:
    """Write the vectors, their schema and a README to a folder, and return the paths.

    The files suffice to check an implementation in any language.

    Raises
    ------
    OSError
        If a file cannot be written.
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
            x=_decode(v["x"], v["dtype"]).reshape(v["shape"]),
            y=_decode(v["y"], v["dtype"]).reshape(v["shape"]),
        )
        for v in read_golden()["outputs"]
    )


@cache
def golden_attention() -> tuple[GoldenAttention, ...]:
    """Return the golden vectors of attention."""
    return tuple(
        GoldenAttention(
            name=v["name"],
            seed=int(v["seed"], 16),
            step=v["step"],
            p=v["p"],
            is_causal=v["is_causal"],
            query=np.array(v["q"]).reshape(v["query_shape"]),
            key=np.array(v["k"]).reshape(v["key_shape"]),
            value=np.array(v["v"]).reshape(v["key_shape"]),
            y=np.array(v["y"]).reshape(v["query_shape"]),
        )
        for v in read_golden()["attention"]
    )


@cache
def golden_permutations() -> tuple[GoldenPermutation, ...]:
    """Return the golden permutations."""
    return tuple(
        GoldenPermutation(
            name=v["name"],
            seed=int(v["seed"], 16),
            step=v["step"],
            indices=np.array(v["indices"]).reshape(v["shape"]),
        )
        for v in read_golden()["permutations"]
    )


@cache
def golden_members() -> tuple[GoldenMember, ...]:
    """Return the golden outputs of members of the family."""
    members = []
    for v in read_golden()["members"]:
        options: dict[str, Any] = {
            k: tuple(o) if isinstance(o, list) else o for k, o in v["options"].items()
        }
        members.append(
            GoldenMember(
                name=v["name"],
                member=v["member"],
                seed=int(v["seed"], 16),
                step=v["step"],
                p=options.pop("stddev" if "stddev" in options else "p"),
                options=options,
                dtype=v["dtype"],
                x=_decode(v["x"], v["dtype"]).reshape(v["shape"]),
                y=_decode(v["y"], v["dtype"]).reshape(v["output_shape"]),
            )
        )
    return tuple(members)


def _decode(patterns: list[str], dtype: str) -> NDArray[Any]:
    """Return the array with hexadecimal bit patterns."""
    unsigned, floating = _COMPONENTS[dtype]
    return np.array([int(pattern, 16) for pattern in patterns], dtype=unsigned).view(floating)
