"""``python -m unidrop.cli`` is the same as the script ``unidrop``."""

from unidrop.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main(prog_name="unidrop")
