"""What a source is: a named collection of documents of one language, and where its rows lie.

Configuration (`data.sources`), YAML files and the command line share the fields of `SourceSpec`.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from data.documents import LANGUAGE, require_file
from data.errors import DataError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
FORMATS = ("auto", "parquet", "jsonl", "text", "arrow", "hub", "megatron", "olmo")
TOKEN_FORMATS = ("megatron", "olmo")
SAMPLE_BY = ("line", "paragraph", "document")
TOKEN_TYPES = ("uint16", "uint32", "int32", "int64", "uint64")
MAX_OPTIONS = 1000
SECRET = re.compile(r"key|secret|token|password|passwd|credential|authorization", re.IGNORECASE)


@dataclass(frozen=True)
class SourceSpec:
    """A named collection of documents of one language.

    Attributes:
        name: lower-case letters, digits, `.`, `_`, `-`; at most 64; file names of a corpus contain it.
        path: file, folder, glob, http(s):// or s3:// address, `hf://datasets/OWNER/NAME`, or with `hub` a hub name.
        language: tag such as en or zh-hant; None: `language_field` of the rows says it, the same in all of them.
        weight: share of the training tokens, on any scale, unless a run says otherwise.
        format: one of FORMATS; `auto` goes by the file names.
        config, split, revision: of a hub data set; without a revision it is refused, for it could change.
        text_field, language_field: columns or keys of a row.
        sample_by: what a document is in a text file: line, paragraph or document (the whole file).
        dtype: type of the ids in an `olmo` file.
        storage_options: for fsspec, never secrets: credentials come from the environment.

    Raises:
        DataError: a field is out of range; the line names it.
    """

    name: str
    path: str
    language: str | None = None
    weight: float = 1.0
    format: str = "auto"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    language_field: str = "lang"
    sample_by: str = "line"
    dtype: str = "uint16"
    storage_options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise DataError(f"source {self.name!r:.80}: a name has a-z, 0-9, '.', '_', '-' only, 64 at most")
        where = f"source {self.name}"
        if not self.path or "\0" in self.path:
            raise DataError(f"{where}: path: {self.path!r:.80} is no path")
        if self.language is not None and not LANGUAGE.fullmatch(self.language):
            raise DataError(f"{where}: language: {self.language!r:.40} is no tag such as en, zh or zh-hant")
        if not 0 <= self.weight < math.inf:
            raise DataError(f"{where}: weight: {self.weight} is not a number of 0 or more")
        choices = {"format": FORMATS, "sample_by": SAMPLE_BY, "dtype": TOKEN_TYPES}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise DataError(f"{where}: {key}: {getattr(self, key)!r:.40} is unknown, allowed: {', '.join(allowed)}")
        if _is_large(self.storage_options):
            raise DataError(f"{where}: storage_options: more than {MAX_OPTIONS} entries, or one inside itself")
        if secret := _secret_key(self.storage_options) or _secret_in(self.path):
            raise DataError(f"{where}: {secret} looks like a secret, the environment holds those")


def spec_from_mapping(name: str, entry: object) -> SourceSpec:
    """A source from its entry in a configuration or YAML file: a path alone, or a mapping of fields.

    Raises:
        DataError: an unknown field, a wrong type, a value out of range.
    """
    if not NAME.fullmatch(name):
        raise DataError(f"source {name!r:.80}: a name has a-z, 0-9, '.', '_', '-' only, 64 at most")
    entry = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping):
        raise DataError(f"source {name}: must be a path or a mapping of fields, found {shown(entry)}")
    entry = dict(entry)
    weight = _weight(name, entry.pop("weight", 1.0))
    known = [field.name for field in fields(SourceSpec) if field.name != "name"]
    for key, value in entry.items():
        if key not in known:
            raise DataError(f"source {name}: {shown(key)} is unknown, allowed: {', '.join(known)}")
        expected = Mapping if key == "storage_options" else str
        if not isinstance(value, expected) and not (value is None and key in ("language", "config", "revision")):
            kind = "a mapping" if expected is Mapping else "a string"
            raise DataError(f"source {name}: {key}: must be {kind}, found {shown(value)}")
    if "path" not in entry:
        raise DataError(f"source {name}: path is missing")
    return SourceSpec(name=str(name), weight=weight, **entry)


def shown(value: object) -> str:
    """A value of any kind in at most 40 characters; YAML anchors can make a few lines stand for gigabytes."""
    return f"{reprlib.repr(value):.40}"


def _weight(name: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"source {name}: weight: {shown(value)} is not a number") from error


def read_sources_file(path: str | Path) -> list[SourceSpec]:
    """Sources of a YAML file, a mapping from name to entry.

    Raises:
        DataError: no such file, not YAML, not a mapping, or a bad entry.
    """
    path = Path(path)
    require_file(path)
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(f"{path}: not YAML: {(str(error).splitlines() or ['?'])[0]}") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: must map names to sources")
    return [spec_from_mapping(str(name), entry) for name, entry in content.items()]


def parse_source(text: str) -> SourceSpec:
    """A source from the command line: `[NAME=]PATH[,FIELD=VALUE...]`; the name defaults to that of the file.

    Raises:
        DataError: as `spec_from_mapping`.
    """
    known = {field.name for field in fields(SourceSpec)} - {"name", "path", "storage_options"}
    head, *rest = text.split(",")
    entry: dict[str, str] = {}
    while rest and rest[-1].partition("=")[0] in known:
        key, _, value = rest.pop().partition("=")
        entry[key] = value
    name, equals, path = head.partition("=")
    if not equals or not NAME.fullmatch(name):
        path = ",".join([head, *rest])
        return spec_from_mapping(source_of_path(path).name, {"path": path, **entry})
    return spec_from_mapping(name, {"path": ",".join([path, *rest]), **entry})


def source_of_path(path: str | Path) -> SourceSpec:
    """The source a bare path stands for; its name is that of the file without endings."""
    stem = Path(path).name.partition(".")[0].lower()
    return SourceSpec(name=re.sub(r"[^a-z0-9._-]", "-", stem).lstrip(".-_")[:64] or "source", path=str(path))


def _secret_key(options: Mapping[str, object]) -> str | None:
    for key, value in options.items():
        if SECRET.search(str(key)):
            return f"storage_options: {key!r:.40}"
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping) and (found := _secret_key(inner)):
                return found
    return None


def _secret_in(path: str) -> str | None:
    """A password in an address; the manifest and messages would show it."""
    authority = path.partition("://")[2].partition("/")[0]
    return "path: its password" if ":" in authority.rpartition("@")[0] else None


def _is_large(options: Mapping[str, object]) -> bool:
    """Whether there are more than MAX_OPTIONS entries, counted as often as YAML anchors repeat them."""
    left: list[object] = [options]
    for _ in range(MAX_OPTIONS):
        if not left:
            return False
        item = left.pop()
        left += item.values() if isinstance(item, Mapping) else item if isinstance(item, list) else []
    return True
