"""What a preparation has to do, fixed as it begins and kept in its work folder, so that another run can go on with it.

The work folder lies beside the corpus to be and is named by what makes tokens out of text: sources, tokenizer, filters.
Seed, de-duplication and the like come later, so a run that changes only those finds the tokens ready.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from data.errors import DataError
from data.files import write_whole
from data.prepare.filters import Filters, scripts_of
from data.sources import SourceFile, SourceSpec, Unit, plan_units, resolve
from data.sources.spec import TOKEN_FORMATS

PLAN_VERSION = 1
PLAN = "plan.json"
UNIT_BYTES = 4 << 20
UNIT_ROWS = 1 << 15
MOST_UNITS = 1 << 14


@dataclass(frozen=True)
class PlannedUnit:
    """A unit, the number of its source, and about how many bytes of its file it is."""

    source: int
    unit: Unit
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """Sources sorted by name, their files, and their units in the order of sources, files and rows."""

    tokenizer_xxh3: str
    filters: Filters
    sources: tuple[SourceSpec, ...]
    files: tuple[tuple[SourceFile, ...], ...]
    units: tuple[PlannedUnit, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for files in self.files for file in files)


def sorted_sources(sources: Sequence[SourceSpec]) -> tuple[SourceSpec, ...]:
    """`sources` by name. DataError: none, or two of one name."""
    if not sources:
        raise DataError("no sources given")
    for name, count in Counter(spec.name for spec in sources).items():
        if count > 1:
            raise DataError(f"source {name}: is given {count} times, every source needs a name of its own")
    return tuple(sorted(sources, key=lambda spec: spec.name))


def resolve_all(sources: Sequence[SourceSpec]) -> tuple[tuple[SourceFile, ...], ...]:
    """Files of every source. DataError: an empty source, a file that two sources share, and as `resolve`."""
    owner: dict[tuple[str, str], str] = {}
    found = []
    for spec in sources:
        files = _files_of(spec)
        for file in files:
            path = file.url if "://" in file.url else os.path.realpath(file.url)
            other = owner.setdefault((path, spec.text_field), spec.name)
            if other != spec.name:
                raise DataError(f"{file.url}: belongs to sources {other} and {spec.name}, give it once")
        if not any(file.size for file in files):
            raise DataError(f"source {spec.name}: {files[0].url}: is empty")
        found.append(files)
    return tuple(found)


def _files_of(spec: SourceSpec) -> tuple[SourceFile, ...]:
    try:
        return tuple(resolve(spec))
    except DataError as error:
        raise DataError(f"source {spec.name}: {error}") from error


def work_folder(out: Path, sources: Sequence[SourceSpec], tokenizer_xxh3: str, filters: Filters) -> Path:
    """Where the tokens of these sources are kept until the corpus `out` is whole."""
    unweighted = [asdict(replace(spec, weight=1.0)) for spec in sources]
    inputs = (PLAN_VERSION, unweighted, tokenizer_xxh3, asdict(filters))
    digest = xxhash.xxh3_64_hexdigest(json.dumps(inputs, sort_keys=True, default=str).encode())
    return out.parent / f".{out.name}.work-{digest}"


def open_plan(work: Path, sources: Sequence[SourceSpec], tokenizer_xxh3: str, filters: Filters) -> Plan:
    """The plan in `work`, made now if there is none.

    Raises:
        DataError: a source cannot be used, or its files are not those of the plan any more.
    """
    files = resolve_all(sources)
    path = work / PLAN
    if path.exists():
        plan = read_plan(work)
        _require_same(plan, files, work)
        return replace(plan, sources=tuple(sources))  # their weights may be others
    for spec in sources:
        if filters.check_language and spec.language is not None:
            scripts_of(spec.language)
    limit = max(UNIT_BYTES, sum(file.size for group in files for file in group) // MOST_UNITS)
    units = [
        unit
        for number, spec in enumerate(sources)
        for file in files[number]
        for unit in _units(number, spec, file, limit)
    ]
    plan = Plan(tokenizer_xxh3, filters, tuple(sources), files, tuple(units))
    write_whole(path, json.dumps(asdict(plan)).encode())
    return plan


def read_plan(work: Path) -> Plan:
    """The plan that `open_plan` wrote into `work`. DataError: it is damaged."""
    try:
        return _parse(json.loads((work / PLAN).read_bytes()))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{work / PLAN}: is damaged; remove {work} to begin anew") from error


def _parse(content: Mapping[str, Any]) -> Plan:
    return Plan(
        tokenizer_xxh3=content["tokenizer_xxh3"],
        filters=Filters(**content["filters"]),
        sources=tuple(SourceSpec(**entry) for entry in content["sources"]),
        files=tuple(tuple(SourceFile(**entry) for entry in group) for group in content["files"]),
        units=tuple(_planned(entry) for entry in content["units"]),
    )


def _planned(entry: dict) -> PlannedUnit:
    unit = entry["unit"]
    file = SourceFile(**unit["file"])
    return PlannedUnit(entry["source"], Unit(file, unit["first"], unit["count"]), entry["num_bytes"])


def _units(number: int, spec: SourceSpec, file: SourceFile, limit: int) -> list[PlannedUnit]:
    rows = limit if file.format in TOKEN_FORMATS else UNIT_ROWS
    units = plan_units(spec, [file], rows=rows, num_bytes=limit)
    total = sum(unit.count for unit in units)
    return [PlannedUnit(number, unit, file.size * unit.count // total) for unit in units]


def _require_same(plan: Plan, files: Sequence[Sequence[SourceFile]], work: Path) -> None:
    before = {file.url: file for group in plan.files for file in group}
    now = {file.url: file for group in files for file in group}
    for url in sorted(before.keys() | now.keys()):
        if before.get(url) != now.get(url):
            change = "has gone" if url not in now else "is new" if url not in before else "has changed"
            raise DataError(f"{url}: {change} since this preparation began; remove {work} to begin anew")
