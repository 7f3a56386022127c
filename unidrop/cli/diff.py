"""``unidrop diff`` finds where a mask or an output is wrong, and which mistake explains it."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from unidrop.cli.mask_options import Shape, mask_options, stream_model
from unidrop.conformance import CONTRACTS, BackendNotRun, Cell, load_backends
from unidrop.conformance.backend import missing_capability
from unidrop.conformance.diagnosis.search import diagnose
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.conformance.error_text import error_text
from unidrop.conformance.subprocess_backend import needs_own_process

__all__ = ["diff"]

# Where a context keeps the arguments of the command.
_ARGUMENTS = "unidrop.cli.diff.arguments"


class _Command(click.Command):
    """A command that another process can repeat."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments, and parse them."""
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


@click.command(cls=_Command)
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--backend", help="Run this backend instead of reading files.")
@click.option("--device", help="Device of the backend; defaults to its first.")
@click.option("--dtype", help="Dtype of the input; defaults to float32, or the first.")
@click.option("--mode", help="Mode of the backend; defaults to its first.")
@click.option("--shape", type=Shape(), help="Shape of an input of ones, with --backend.")
@mask_options(required=False)
@click.option(
    "--input",
    "x_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Input of dropout (.npy), to compare the output bit for bit.",
)
def diff(
    files: tuple[Path, ...],
    backend: str | None,
    device: str | None,
    dtype: str | None,
    mode: str | None,
    shape: tuple[int, ...] | None,
    seed: int | None,
    p: float | None,
    x_path: Path | None,
    **options: Any,
) -> None:
    """Compare masks or outputs with the specification.

    A file (.npy) has a mask of bools or of integers 0 and 1, or an output, whose elements other
    than 0 were kept. --seed and --p name the expected mask. If a file differs from it, common
    mistakes are tried, one or two together. Without these options, two files are compared with
    each other. With --backend, a backend of the matrix runs on --input, or on ones of --shape.

    Exits with 1 if something differs or the backend fails, and with 2 on bad arguments.
    """
    x = None if x_path is None else _read(x_path)
    if backend is not None:
        if files or seed is None or p is None or (shape is None) == (x is None):
            raise click.UsageError(
                "--backend requires --seed, --step, --p and either --shape or --input, "
                "and accepts no files"
            )
        entry_point = needs_own_process(backend)
        if entry_point is not None:
            arguments = click.get_current_context().meta[_ARGUMENTS]
            command = [sys.executable, "-P", "-m", "unidrop.cli", "diff", *arguments]
            sys.exit(subprocess.run(command, env=entry_point.full_environment()).returncode)
        cell = _cell(backend, device, dtype, mode, seed, x)
        shape = (shape or ()) if x is None else x.shape
        model = stream_model(shape=shape, seed=seed, p=p, **options)
        sys.exit(_compare_backend(cell, _ones(cell, shape) if x is None else x, model))
    if not files or any(option is not None for option in (device, dtype, mode, shape)):
        raise click.UsageError(
            "pass files, or --backend, which --device, --dtype, --mode and --shape require"
        )
    arrays = [_read(path) for path in files]
    if seed is None or p is None:
        others = {"--seed": seed, "--p": p, "--input": x_path}
        others |= {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        passed = [name for name, value in others.items() if value is not None]
        if len(arrays) != 2 or passed:
            but = f", got only {', '.join(passed)}" if passed else ""
            raise click.UsageError(
                "pass --seed and --p of the expected mask, as --seed 42 --step 7 --p 0.3, or just "
                f"two files to compare with each other{but}"
            )
        sys.exit(_compare_two(*arrays))
    differ = []
    for path, array in zip(files, arrays, strict=True):
        model = stream_model(shape=array.shape, seed=seed, p=p, **options)
        differ.append(_compare(str(path), array, x, model))
    sys.exit(any(differ))


def _cell(
    backend: str,
    device: str | None,
    dtype: str | None,
    mode: str | None,
    seed: int,
    x: NDArray[Any] | None,
) -> Cell:
    """Return the backend's cell to run; the first mode, device and dtype by default."""
    try:
        (loaded,) = load_backends([backend])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--backend") from None
    if isinstance(loaded, BackendNotRun):
        raise click.ClickException(f"backend {backend} could not be loaded: {loaded.error}")
    mode = _get_one(loaded.modes, mode, "--mode")
    device = _get_one(loaded.devices, device, "--device")
    # Contracts that run for one dtype run for this one, too.
    dtypes = sorted(loaded.dtypes(mode), key=lambda name: name != "float32")
    taken = _get_one(dtypes, dtype, "--dtype")
    if x is not None:
        taken = _get_one(dtypes, x.dtype.name, "--input")
        if dtype not in (None, taken):
            raise click.BadParameter(
                f"must match --input, {taken}, got {dtype!r}", param_hint="--dtype"
            )
    return Cell(CONTRACTS["mask"], loaded, device, taken, mode, seed)


def _get_one(known: Sequence[str], name: str | None, option: str) -> str:
    """Return a name, or the first known one by default."""
    if name is not None and name not in known:
        raise click.BadParameter(
            f"must be one of {', '.join(known)}, got {name!r}", param_hint=option
        )
    return name or known[0]


def _ones(cell: Cell, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return cell.ones(shape)
    except (ValueError, MemoryError) as error:
        raise click.BadParameter(str(error), param_hint="--shape") from None


def _compare_backend(cell: Cell, x: NDArray[Any], model: StreamModel) -> bool:
    """Print how a backend's output differs from the model's, and return whether it does."""
    name = f"{cell.backend.name}, {cell.device}, {cell.dtype}, {cell.mode}"
    step, options = _call(cell, model)
    try:
        y = cell.dropout(x, model.p, step, **options)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # otherwise an exit of the backend would look like success
        text = " ".join(error_text(error).split())
        raise click.ClickException(f"{cell.backend.name} raised {text}") from None
    mismatch = _mismatch(y, x)
    if mismatch is None:
        return _compare(name, y, x, model)
    click.echo(f"{name}: {mismatch}")
    return True


def _call(cell: Cell, model: StreamModel) -> tuple[int, dict[str, Any]]:
    """Return the step and the options of the backend's call, if the backend supports them."""
    match model.folded:
        case (int(step),):
            pass
        case _:
            raise click.UsageError("--backend requires --step and does not support --site")
    options: dict[str, Any] = {}
    if model.broadcast_axes:
        _check_capability(cell, "broadcast_axes", "--broadcast-axes")
        options["broadcast_axes"] = model.broadcast_axes
    if model.global_shape is not None:
        _check_capability(cell, "windows", "--global-shape")
        options |= {"global_shape": model.global_shape, "start": model.start}
    return step, options


def _check_capability(cell: Cell, capability: str, option: str) -> None:
    lacking = missing_capability(cell.backend, capability, cell.mode)
    if lacking is not None:
        raise click.UsageError(
            f"{cell.backend.name} does not support {option} in mode {cell.mode}: {lacking}"
        )


def _mismatch(y: object, x: NDArray[Any]) -> str | None:
    """Return why y is not an output for x, or None if it may be one."""
    if not isinstance(y, np.ndarray | np.generic):
        return f"to_numpy must return a NumPy array, got {type(y).__name__}"
    if y.shape != x.shape:
        return f"shape must be {x.shape}, got {y.shape}"
    if y.dtype != x.dtype:
        return f"dtype must be {x.dtype}, got {y.dtype}"
    return None


def _read(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except Exception:  # NumPy raises any error for a damaged file, such as one of its tokenizer
        array = None
    if isinstance(array, np.ndarray) and array.dtype == np.dtype("V2"):
        # A file does not name the dtypes that NumPy does not know.
        array = array.view(ml_dtypes.bfloat16)
    is_bfloat16 = isinstance(array, np.ndarray) and array.dtype == ml_dtypes.bfloat16
    if not isinstance(array, np.ndarray) or not (is_bfloat16 or array.dtype.kind in "biufc"):
        raise click.BadParameter(
            f"{path} must be a .npy file of numbers or bools, as numpy.save writes it"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _compare_two(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Print where two arrays differ, and return whether they do."""
    if one.shape != other.shape:
        click.echo(f"shapes differ: {one.shape} and {other.shape}")
        return True
    differing = np.flatnonzero((one != 0) != (other != 0))
    if not differing.size:
        is_mask = one.dtype.kind in "biu" and other.dtype.kind in "biu"
        what = "masks" if is_mask else "zeros"
        click.echo(f"{what} are equal, all {one.size} elements")
        return False
    index = int(differing[0])
    position = tuple(int(i) for i in np.unravel_index(index, one.shape))
    click.echo(
        f"{differing.size} of {one.size} elements differ, the first at {position}, "
        f"index {index}: block {index // 8}, word {index // 2 % 4}, "
        f"its {'odd' if index % 2 else 'even'} element"
    )
    return True


def _compare(name: str, array: NDArray[Any], x: NDArray[Any] | None, model: StreamModel) -> bool:
    """Print how an array differs from the specification and why, and return whether it does."""
    if x is not None and (x.shape, x.dtype) != (array.shape, array.dtype):
        raise click.BadParameter(
            f"must have the dtype and shape of {name}, {array.dtype} and {array.shape}, "
            f"got {x.dtype} and {x.shape}",
            param_hint="--input",
        )
    try:
        diagnosis = diagnose(model, array, x)
    except TypeError as error:
        raise click.BadParameter(str(error), param_hint="--input") from None
    if diagnosis is None:
        if x is None and array.dtype.kind not in "biu":
            click.echo(
                f"{name}: zeros conform, all {array.size} elements; "
                "pass --input to compare the values"
            )
        else:
            click.echo(f"{name}: conforms, all {array.size} elements")
        return False
    click.echo(f"{name}: {diagnosis.description}")
    for cause in diagnosis.causes:
        click.echo(f"this explains all of it: {cause}")
    if not diagnosis.causes:
        pairs = "" if diagnosis.is_small else ", alone or with another,"
        click.echo(f"no known mistake{pairs} explains it")
    elif len(diagnosis.causes) > 1:
        click.echo("this array cannot distinguish these mistakes")
    if diagnosis.is_small:
        click.echo(
            "an array this small may fit a mistake by chance, so only single mistakes were tried: "
            "use a larger one"
        )
    return True
