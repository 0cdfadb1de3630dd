"""The one error type of the data package, and how its commands report it."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_DATA_ERROR = 77


class DataError(ValueError):
    """Something the user supplied (text, tokenizer, corpus folder, setting) cannot be used; one line says what."""


def run_command(command: Callable[[], None]) -> int:
    """Run a command body and return its exit code: 0, or 77 after one `error:` line on stderr."""
    try:
        command()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DATA_ERROR
    except OSError as error:
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return EXIT_DATA_ERROR
    return 0
