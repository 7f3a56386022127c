"""``python -m unidrop.cli``, where the script is not on the path."""

from unidrop.cli import main

main(prog_name="unidrop")
