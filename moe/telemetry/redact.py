"""Keep secrets out of everything that leaves the process: loggers, reports, printed commands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moe.config.errors import SECRET_NAME

REDACTED = "[redacted]"

URL_USER_INFO = re.compile(r"(?<=://)[^/?#\s]+@")
ASSIGNMENT = re.compile(r"(?P<name>[\w.\-+]+)(?P<sign>\s*[=:]\s*)(?P<value>\"[^\"]*\"|'[^']*'|[^\s&,;]+)")
# Shapes of issued keys: Hugging Face, GitHub, AWS key ids, OpenAI-like. Plain hexadecimal stays: it may be a revision.
ISSUED_KEY = re.compile(r"\b(hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|A[KS]IA[0-9A-Z]{16}|sk-[\w-]{16,})")


def redact(value: Any, name: str = "") -> Any:
    """A copy of nested mappings, lists and strings in which no secret is left.

    Everything textual under a key named like a secret (`hf_token`, `api_key`, ...) is replaced; so are user-info in
    URLs, `name=value` pairs with such a name, and strings shaped like issued keys, wherever they stand. Numbers under
    `...token...` keys are counts and stay.
    """
    if isinstance(value, Mapping):
        return {key: redact(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if _is_secret(name, value):
        return REDACTED
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """`text` without URL user-info, `secret_name=value` values and issued keys."""
    text = URL_USER_INFO.sub(f"{REDACTED}@", text)
    text = ASSIGNMENT.sub(_redact_assignment, text)
    return ISSUED_KEY.sub(REDACTED, text)


def _is_secret(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    matches = {match.group(0).lower() for match in SECRET_NAME.finditer(name)}
    if matches <= {"token"} and _is_number(value):
        return False
    return bool(matches)


def _redact_assignment(match: re.Match[str]) -> str:
    if not _is_secret(match["name"], match["value"]):
        return match[0]
    return f"{match['name']}{match['sign']}{REDACTED}"


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
