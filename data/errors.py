"""The one error type of the data package, and how its commands report it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXIT_DATA_ERROR = 77
EXIT_NO_READER = 141  # what a shell reports of a program that SIGPIPE ended


class DataError(ValueError):
    """Something the user supplied (text, tokenizer, corpus folder, setting) cannot be used; one line says what."""


def complaint(error: BaseException) -> str:
    """One line that says what went wrong, with the file where the system named one."""
    if isinstance(error, OSError):
        return f"{error.filename or 'input/output'}: {error.strerror or error}"
    return str(error)


def one_line(error: BaseException) -> str:
    """First line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_command(command: Callable[[], None]) -> int:
    """Run a command body and return its exit code: 0, 77 after one `error:` line on stderr, or 141: nobody reads on."""
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        return EXIT_NO_READER
    except (DataError, OSError) as error:
        print(f"error: {complaint(error)}", file=sys.stderr)
        return EXIT_DATA_ERROR
    return 0
