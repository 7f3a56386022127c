"""The command line: the matrix, masks and dumps of them, and vectors for other languages."""

try:
    import click

    import unidrop
    from unidrop.cli.conformance import conformance
    from unidrop.cli.masks import diff, mask
    from unidrop.cli.vectors import vectors
except ModuleNotFoundError as error:
    raise SystemExit(
        f"the command line needs {error.name}, which is not installed: install unidrop with its "
        "extra 'cli', as in pip install '.[cli]'"
    ) from None

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    unidrop.__version__, message=f"unidrop %(version)s, stream {unidrop.STREAM_VERSION}"
)
def main() -> None:
    """One dropout that drops the very same elements in every array library."""


for _command in (conformance, mask, diff, vectors):
    main.add_command(_command)
