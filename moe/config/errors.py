"""The one kind of complaint about a configuration: a line that names the key, what it may be and what it is."""

from __future__ import annotations

from collections.abc import Collection


class ConfigError(ValueError):
    """A configuration that cannot be run; its message is one line that names the key."""


def require(holds: bool, key: str, allowed: str, value: object) -> None:
    """Raise ConfigError unless `holds`: "model.granularity must be at least 1, not 0"."""
    if not holds:
        raise ConfigError(f"{key} must be {allowed}, not {value}")


def choice(key: str, value: str, allowed: Collection[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    require(value in allowed, key, "one of " + ", ".join(sorted(allowed)), value)
