"""The one kind of complaint about a configuration: a line that names the key, what it may be and what it is."""

from __future__ import annotations

import os
import re
from collections.abc import Collection

SECRET_NAME = re.compile(
    r"token(?!i[sz])|secret|passw(or)?d|passphrase|api[_-]?key|access[_-]?key|private[_-]?key|credential|authorization",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 4


class ConfigError(ValueError):
    """A configuration that cannot be run; its message is one line that names the key, and never shows a secret."""

    def __init__(self, message: str) -> None:
        super().__init__(hide_environment(message))


def hide_environment(message: str) -> str:
    """`message` with the values of environment variables named like secrets, which `${oc.env:NAME}` brings into keys,
    replaced by $NAME."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and SECRET_NAME.search(name):
            message = message.replace(value, f"${name}")
    return message


def require(holds: bool, key: str, allowed: str, value: object) -> None:
    """Raise ConfigError unless `holds`: "model.granularity must be at least 1, not 0"."""
    if not holds:
        raise ConfigError(f"{key} must be {allowed}, not {value}")


def choice(key: str, value: str, allowed: Collection[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    require(value in allowed, key, "one of " + ", ".join(sorted(allowed)), value)
