"""``python -m unidrop.cli``, where the script is not on the path."""

from unidrop.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main(prog_name="unidrop")
