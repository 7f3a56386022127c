"""The options that name a mask, which ``unidrop mask`` and ``unidrop diff`` share."""

from collections.abc import Callable

import click

from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.rate import Rate
from unidrop.window import Window

__all__ = ["Shape", "mask_options", "stream_model"]


class Shape(click.ParamType[tuple[int, ...]]):
    """A shape, such as 4x8."""

    name = "shape"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the lengths."""
        try:
            return tuple(int(length) for length in str(value).split("x")) if value else ()
        except ValueError:
            self.fail(f"must be a shape such as 4x8, got {value!r}", param, ctx)


class _Uint64(click.ParamType[int]):
    name = "integer"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            number = int(str(value), 0)
        except ValueError:
            self.fail(f"must be an integer such as 42 or 0x2a, got {value!r}", param, ctx)
        if not 0 <= number < 2**64:
            self.fail(f"must be in [0, 2^64), got {value!r}", param, ctx)
        return number


class _Axes(click.ParamType[tuple[int, ...]]):
    name = "axes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            return tuple(int(axis) for axis in str(value).split(","))
        except ValueError:
            self.fail(f"must be axes such as 2,3, got {value!r}", param, ctx)


_Command = Callable[..., None]


def mask_options(required: bool) -> Callable[[_Command], _Command]:
    """Return a decorator that adds the options to a command."""
    options = (
        click.option("--seed", type=_Uint64(), required=required, help="In [0, 2^64)."),
        click.option("--site", default=None, help="String to fold in, such as encoder/0."),
        click.option("--step", type=_Uint64(), help="Integer to fold in, after the site."),
        click.option(
            "--p", type=float, required=required, help="Probability of dropping, in [0, 1]."
        ),
        click.option("--broadcast-axes", "axes", type=_Axes(), help="Such as 2,3."),
        click.option(
            "--global-shape", type=Shape(), help="Shape of the global mask, if this is a slice."
        ),
        click.option("--start", type=Shape(), help="Start of the slice, such as 4x0."),
    )

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def stream_model(
    seed: int,
    site: str | None,
    step: int | None,
    p: float,
    shape: tuple[int, ...],
    axes: tuple[int, ...] | None,
    global_shape: tuple[int, ...] | None,
    start: tuple[int, ...] | None,
) -> StreamModel:
    """Return the model of the mask that the options name.

    Raises
    ------
    click.UsageError
        If the core rejects an option.
    """
    folded = tuple(data for data in (site, step) if data is not None)
    try:
        window = Window.from_args(shape, axes or (), global_shape, start)
        model = StreamModel(
            seed,
            folded,
            Rate.from_p(p).p,
            shape,
            window.broadcast_axes,
            window.global_shape,
            window.start,
        )
        int(model.key)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    return model
