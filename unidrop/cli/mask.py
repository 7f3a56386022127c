"""``unidrop mask`` prints or draws a mask."""

import json
import math
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import unidrop
from unidrop.cli.mask_options import Shape, mask_options, stream_model

__all__ = ["mask"]

# The approximate length of a picture's longer side.
_PIXELS = 1024


@click.command()
@mask_options(required=True)
@click.option("--shape", type=Shape(), required=True, help="Such as 4x8.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the key.")
@click.option(
    "--png",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the mask to this file instead.",
)
def mask(shape: tuple[int, ...], p: float, as_json: bool, png: Path | None, **options: Any) -> None:
    """Print a mask, to compare with another implementation.

    Each line is a row of the last axis, with 1 for each kept element.
    """
    if as_json and png is not None:
        raise click.UsageError("--json and --png exclude each other")
    model = stream_model(shape=shape, p=p, **options)
    try:
        keep = unidrop.keep_mask(
            shape,
            p,
            model.key,
            broadcast_axes=model.broadcast_axes,
            global_shape=options["global_shape"],
            start=options["start"],
        )
    except (TypeError, ValueError, MemoryError) as error:
        raise click.UsageError(str(error)) from None
    if png is not None:  # a picture shows all elements that share a decision
        keep = np.broadcast_to(keep, shape)
    rows = keep.reshape(math.prod(keep.shape[:-1]), *keep.shape[-1:])
    if png is not None:
        _draw(rows, png)
    elif as_json:
        key = f"{int(model.key):016x}"
        fields = {"stream": unidrop.STREAM_VERSION, "key": key, "p": p, "shape": keep.shape}
        click.echo(json.dumps(fields | {"keep": keep.astype(int).tolist()}))
    else:
        for row in rows:
            click.echo("".join(map(str, row.astype(int).reshape(-1))))


def _draw(rows: NDArray[Any], path: Path) -> None:
    """Draw each element as a square, white if it is kept."""
    if rows.ndim == 1:
        rows = rows[None]
    if rows.size == 0:
        raise click.BadParameter("a mask without elements cannot be drawn", param_hint="--png")
    side = max(1, _PIXELS // max(rows.shape))
    picture = Image.fromarray(np.where(rows, 255, 0).astype(np.uint8))
    size = rows.shape[1] * side, rows.shape[0] * side
    try:
        picture.resize(size, Image.Resampling.NEAREST).save(path, format="PNG")
    except (OSError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="--png") from None
    click.echo(path)
