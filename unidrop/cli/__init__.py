"""The command line: one module for each command."""

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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    unidrop.__version__, message=f"unidrop %(version)s, stream {unidrop.STREAM_VERSION}"
)
def main() -> None:
    """One dropout that drops the same elements in every array library."""


for _command in (conformance, mask, diff, vectors):
    main.add_command(_command)
