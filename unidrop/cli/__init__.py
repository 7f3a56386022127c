"""The command line: one module for each command."""

import sys
from typing import Any

try:
    import click

    import unidrop
    from unidrop.cli.conformance import conformance
    from unidrop.cli.diff import diff
    from unidrop.cli.mask import mask
    from unidrop.cli.vectors import vectors
except ModuleNotFoundError as error:
    raise SystemExit(
        f"the command line requires {error.name}, which is not installed: install unidrop with the "
        "extra 'cli', as in pip install '.[cli]'"
    ) from None

__all__ = ["main"]


class _Group(click.Group):
    """A group whose commands end with one line and status 2 if the system refuses something."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        if sys.stdout is None:  # Python sets it to None if the descriptor is closed
            raise click.UsageError("standard output must be open")
        try:
            return super().invoke(ctx)
        except MemoryError as error:
            raise click.UsageError(f"the arrays must fit in memory: {error}") from None
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # click handles it
                raise
            raise click.UsageError(f"the system refused an operation: {error}") from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    unidrop.__version__, message=f"unidrop %(version)s, stream {unidrop.STREAM_VERSION}"
)
def main() -> None:
    """One dropout that drops the same elements in every array library."""


for _command in (conformance, mask, diff, vectors):
    main.add_command(_command)
