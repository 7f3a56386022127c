"""``unidrop vectors`` writes the golden vectors for implementations in other languages."""

from pathlib import Path

import click

from unidrop.conformance.golden import write_vectors

__all__ = ["vectors"]


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder to write to; created if missing.",
)
def vectors(out: Path) -> None:
    """Write the golden vectors as JSON.

    The folder also gets a schema and a README that explains the fields. The vectors suffice to
    check an implementation in C++, Rust, Julia or a CUDA kernel.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = write_vectors(out)
    except OSError as error:
        raise click.BadParameter(str(error), param_hint="--out") from None
    for path in written:
        click.echo(path)
