"""``unidrop mask`` prints or draws a mask; ``unidrop diff`` says what is wrong with another's."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import unidrop
from unidrop.conformance import CONTRACTS, BackendNotRun, Cell, load_backends
from unidrop.conformance.backend import missing_capability
from unidrop.conformance.diagnosis.search import diagnose
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.conformance.process import error_text
from unidrop.rate import Rate
from unidrop.window import Window

__all__ = ["diff", "mask"]

# The longer side of a picture, about.
_PIXELS = 1024


class _Shape(click.ParamType[tuple[int, ...]]):
    name = "shape"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            shape = tuple(int(length) for length in str(value).split("x")) if value else ()
        except ValueError:
            self.fail(f"{value!r} is no shape such as 4x8", param, ctx)
        return shape


class _Word(click.ParamType[int]):
    name = "integer"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            number = int(str(value), 0)
        except ValueError:
            self.fail(f"{value!r} is no integer such as 42 or 0x2a", param, ctx)
        if not 0 <= number < 2**64:
            self.fail(f"{value!r} is not in [0, 2^64)", param, ctx)
        return number


class _Axes(click.ParamType[tuple[int, ...]]):
    name = "axes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            return tuple(int(axis) for axis in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of axes such as 2,3", param, ctx)


_Command = Callable[..., None]


def _key_options(required: bool) -> Callable[[_Command], _Command]:
    """Return what gives a command the options that say which mask is meant."""
    options = (
        click.option("--seed", type=_Word(), required=required, help="0 <= seed < 2^64."),
        click.option("--site", default=None, help="A string to fold in, such as encoder/0."),
        click.option("--step", type=_Word(), help="An integer to fold in, after the site."),
        click.option(
            "--p", type=float, required=required, help="The probability of dropping, in [0, 1]."
        ),
        click.option("--broadcast-axes", "axes", type=_Axes(), help="Such as 2,3."),
        click.option("--global-shape", type=_Shape(), help="Of the array this is a block of."),
        click.option("--start", type=_Shape(), help="Where in it the block begins, such as 4x0."),
    )

    def decorated(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


@click.command()
@_key_options(required=True)
@click.option("--shape", type=_Shape(), required=True, help="Such as 4x8.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the key.")
@click.option(
    "--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw it here, and print none."
)
def mask(shape: tuple[int, ...], p: float, as_json: bool, png: Path | None, **which: Any) -> None:
    """Print a mask: 1 where an element is kept, a row of the last axis a line.

    For anyone who checks a kernel of their own.
    """
    if as_json and png is not None:
        raise click.UsageError("--json prints a mask and --png draws one: give either")
    try:
        recipe = _recipe(shape=shape, p=p, **which)
        keep = unidrop.keep_mask(
            shape,
            p,
            recipe.key,
            broadcast_axes=recipe.broadcast_axes,
            global_shape=which["global_shape"],
            start=which["start"],
        )
    except (TypeError, ValueError, MemoryError) as error:
        raise click.UsageError(str(error)) from None
    rows = keep.reshape(math.prod(keep.shape[:-1]), *keep.shape[-1:])
    if png is not None:
        _draw(rows, png)
    elif as_json:
        described = {"stream": unidrop.STREAM_VERSION, "key": f"{int(recipe.key):016x}", "p": p}
        shown = {"shape": keep.shape, "keep": keep.astype(int).tolist()}
        click.echo(json.dumps(described | shown))
    else:
        for row in rows:
            click.echo("".join(map(str, row.astype(int).reshape(-1))))


def _recipe(
    seed: int,
    site: str | None,
    step: int | None,
    p: float,
    shape: tuple[int, ...],
    axes: tuple[int, ...] | None,
    global_shape: tuple[int, ...] | None,
    start: tuple[int, ...] | None,
) -> StreamModel:
    """Return what a mask's options say, or raise as the core does."""
    folded = tuple(data for data in (site, step) if data is not None)
    window = Window.from_args(shape, axes or (), global_shape, start)
    recipe = StreamModel(
        seed,
        folded,
        Rate.from_p(p).p,
        shape,
        window.broadcast_axes,
        window.global_shape,
        window.start,
    )
    int(recipe.key)
    return recipe


def _draw(rows: NDArray[Any], path: Path) -> None:
    """Draw an element as a square, white where it is kept."""
    if rows.ndim == 1:
        rows = rows[None]
    if rows.size == 0:
        raise click.BadParameter("a mask without elements can't be drawn", param_hint="--png")
    side = max(1, _PIXELS // max(rows.shape))
    picture = Image.fromarray(np.where(rows, 255, 0).astype(np.uint8))
    size = rows.shape[1] * side, rows.shape[0] * side
    try:
        picture.resize(size, Image.Resampling.NEAREST).save(path, format="PNG")
    except (OSError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="--png") from None
    click.echo(path)


@click.command()
@click.argument("dumps", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--backend", help="Take what this backend of the matrix gives, and no dump.")
@click.option("--device", help="Of the backend's; its first if not given.")
@click.option("--dtype", help="Of the input; float32 if not given and there is that.")
@click.option("--mode", help="Of the backend's; its first if not given.")
@click.option("--shape", type=_Shape(), help="With --backend: of ones, if no --input is given.")
@_key_options(required=False)
@click.option(
    "--input",
    "x_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What was dropped from (.npy), to compare the output's bits too.",
)
def diff(
    dumps: tuple[Path, ...],
    backend: str | None,
    device: str | None,
    dtype: str | None,
    mode: str | None,
    shape: tuple[int, ...] | None,
    seed: int | None,
    p: float | None,
    x_path: Path | None,
    **which: Any,
) -> None:
    """Compare dumps (.npy) of somebody's masks or outputs with the specification, or with another.

    A mask is of bools or of integers 0 and 1; of an output, what is not 0 was kept. With --seed and
    --p, each dump is compared with the specification, and where it differs, the mistakes that
    people make are tried, one or two together. Without, two dumps are compared with each other.
    With --backend, what a backend of the matrix gives for --shape or --input is compared.

    Exits with 1 if something differs or the backend fails, and with 2 on bad arguments.
    """
    x = None if x_path is None else _read(x_path)
    if backend is not None:
        if dumps or seed is None or p is None or (shape is None) == (x is None):
            raise click.UsageError(
                "with --backend, give no dump, but --seed, --step and --p of the mask that is "
                "meant, and either --shape or --input"
            )
        cell = _cell(backend, device, dtype, mode, seed, x)
        shape = (shape or ()) if x is None else x.shape
        recipe = _checked_recipe(shape=shape, seed=seed, p=p, **which)
        sys.exit(_compare_backend(cell, _ones(cell, shape) if x is None else x, recipe))
    if not dumps or any(option is not None for option in (device, dtype, mode, shape)):
        raise click.UsageError(
            "give a dump; or --backend, with which --device, --dtype, --mode and --shape go"
        )
    arrays = [_read(path) for path in dumps]
    if seed is None or p is None:
        others = {"--seed": seed, "--p": p, "--input": x_path}
        others |= {f"--{name.replace('_', '-')}": value for name, value in which.items()}
        given = [name for name, value in others.items() if value is not None]
        if len(arrays) != 2 or given:
            but = f", but got only {', '.join(given)}" if given else ""
            raise click.UsageError(
                "give --seed and --p of the mask that is meant, as --seed 42 --step 7 --p 0.3; or "
                f"two dumps and no more, to compare them with each other{but}"
            )
        sys.exit(_compare_two(*arrays))
    differ = []
    for path, array in zip(dumps, arrays, strict=True):
        recipe = _checked_recipe(shape=array.shape, seed=seed, p=p, **which)
        differ.append(_compare(str(path), array, x, recipe))
    sys.exit(any(differ))


def _checked_recipe(**which: Any) -> StreamModel:
    try:
        return _recipe(**which)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None


def _cell(
    backend: str,
    device: str | None,
    dtype: str | None,
    mode: str | None,
    seed: int,
    x: NDArray[Any] | None,
) -> Cell:
    """Return where a backend of the matrix is run: what is not given is the first there is."""
    try:
        (loaded,) = load_backends([backend])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--backend") from None
    if isinstance(loaded, BackendNotRun):
        raise click.ClickException(f"backend {backend} could not be loaded: {loaded.error}")
    mode = _get_one(loaded.modes, mode, "--mode")
    device = _get_one(loaded.devices, device, "--device")
    # A contract that is run for one dtype is run for this one.
    dtypes = sorted(loaded.dtypes(mode), key=lambda name: name != "float32")
    taken = _get_one(dtypes, dtype, "--dtype")
    if x is not None:
        taken = _get_one(dtypes, x.dtype.name, "--input")
        if dtype not in (None, taken):
            raise click.BadParameter(
                f"{dtype!r} is not that of --input, {taken}", param_hint="--dtype"
            )
    return Cell(CONTRACTS["mask"], loaded, device, taken, mode, seed)


def _get_one(known: Sequence[str], given: str | None, option: str) -> str:
    if given is not None and given not in known:
        raise click.BadParameter(f"{given!r} is none of {', '.join(known)}", param_hint=option)
    return given or known[0]


def _ones(cell: Cell, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return cell.ones(shape)
    except (ValueError, MemoryError) as error:
        raise click.BadParameter(str(error), param_hint="--shape") from None


def _compare_backend(cell: Cell, x: NDArray[Any], recipe: StreamModel) -> bool:
    """Print how what a backend gives for a recipe differs, and return whether it does."""
    name = f"{cell.backend.name}, {cell.device}, {cell.dtype}, {cell.mode}"
    step, options = _call(cell, recipe)
    try:
        y = cell.dropout(x, recipe.p, step, **options)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # one that exits must not end this as if it conformed
        text = " ".join(error_text(error).split())
        raise click.ClickException(f"{cell.backend.name} raised {text}") from None
    unlike = _unlike(y, x)
    if unlike is None:
        return _compare(name, y, x, recipe)
    click.echo(f"{name}: {unlike}")
    return True


def _call(cell: Cell, recipe: StreamModel) -> tuple[int, dict[str, Any]]:
    """Return the step and the options of a call that a recipe means, if the backend takes them."""
    match recipe.folded:
        case (int(step),):
            pass
        case _:
            raise click.UsageError("a backend takes a --step and no --site")
    options: dict[str, Any] = {}
    if recipe.broadcast_axes:
        _check_able(cell, "broadcast_axes", "--broadcast-axes")
        options["broadcast_axes"] = recipe.broadcast_axes
    if recipe.global_shape is not None:
        _check_able(cell, "windows", "--global-shape")
        options |= {"global_shape": recipe.global_shape, "start": recipe.start}
    return step, options


def _check_able(cell: Cell, capability: str, option: str) -> None:
    lacking = missing_capability(cell.backend, capability, cell.mode)
    if lacking is not None:
        raise click.UsageError(
            f"{cell.backend.name} takes no {option} in mode {cell.mode}: {lacking}"
        )


def _unlike(y: object, x: NDArray[Any]) -> str | None:
    """Return why what a backend gave can't be an output for an array, or None if it can."""
    if not isinstance(y, np.ndarray | np.generic):
        return f"to_numpy gave {type(y).__name__}, and not a NumPy array"
    if y.shape != x.shape:
        return f"the shape is {y.shape}, and not {x.shape}"
    if y.dtype != x.dtype:
        return f"the dtype is {y.dtype}, and not {x.dtype}"
    return None


def _read(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        array = None
    if isinstance(array, np.ndarray) and array.dtype == np.dtype("V2"):
        # NumPy forgets what it does not know.
        array = array.view(ml_dtypes.bfloat16)
    is_bfloat16 = isinstance(array, np.ndarray) and array.dtype == ml_dtypes.bfloat16
    if not isinstance(array, np.ndarray) or not (is_bfloat16 or array.dtype.kind in "biufc"):
        raise click.BadParameter(
            f"{path} is no .npy file of numbers or bools, such as numpy.save writes"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _compare_two(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Print where one differs from another, and return whether it does."""
    if one.shape != other.shape:
        click.echo(f"shapes differ: {one.shape} and {other.shape}")
        return True
    differing = np.flatnonzero((one != 0) != (other != 0))
    if not differing.size:
        is_mask = one.dtype.kind in "biu" and other.dtype.kind in "biu"
        what = "the same" if is_mask else "alike in what is 0 and what is not"
        click.echo(f"{what}: {one.size} elements")
        return False
    index = int(differing[0])
    position = tuple(int(i) for i in np.unravel_index(index, one.shape))
    click.echo(
        f"{differing.size} of {one.size} elements differ, the first at {position}, "
        f"index {index}: block {index // 8}, word {index // 2 % 4}, "
        f"its {'odd' if index % 2 else 'even'} element"
    )
    return True


def _compare(name: str, array: NDArray[Any], x: NDArray[Any] | None, recipe: StreamModel) -> bool:
    """Print how an array differs from the specification, and why, and return whether it does."""
    if x is not None and (x.shape, x.dtype) != (array.shape, array.dtype):
        raise click.BadParameter(
            f"{x.dtype} of shape {x.shape} is not what {name} has: {array.dtype} of shape "
            f"{array.shape}",
            param_hint="--input",
        )
    try:
        diagnosis = diagnose(recipe, array, x)
    except TypeError as error:
        raise click.BadParameter(str(error), param_hint="--input") from None
    if diagnosis is None:
        if x is None and array.dtype.kind not in "biu":
            click.echo(
                f"{name}: what is 0 and what is not is as the specification says, all {array.size} "
                "elements; values are not compared without --input"
            )
        else:
            click.echo(f"{name}: as the specification says, all {array.size} elements")
        return False
    click.echo(f"{name}: {diagnosis.what}")
    for cause in diagnosis.causes:
        click.echo(f"this explains all of it: {cause}")
    if not diagnosis.causes:
        pairs = "" if diagnosis.is_small else ", nor two together,"
        click.echo(f"no mistake that is known here{pairs} explains it")
    elif len(diagnosis.causes) > 1:
        click.echo("what actual does not tell these apart")
    if diagnosis.is_small:
        click.echo(
            "so small a dump may fit a mistake by chance, and two together are not tried: "
            "a larger one tells more"
        )
    return True
