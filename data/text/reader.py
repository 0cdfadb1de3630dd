"""Read units: which of their rows can be trained on, with the blocks read last kept in memory."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.errors import DataError
from data.sources import Row, SourceSpec, Unit, check_unchanged, read_unit
from data.sources.units import is_split_by_bytes
from data.split import SPLIT_KEY, held_out_below, keyed_hash

if TYPE_CHECKING:
    from data.text.corpus import TextCorpus

CACHE_BYTES = 256 << 20
FEWEST_ROWS = 1000
_ROW_BYTES = 64

Texts = list[str | None]
"""The rows of a unit in order; None for those that are not trained on."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, `where` naming its file and place."""

    source: str
    where: str
    problem: str


class Reader:
    """The units of a corpus as texts.

    Args:
        on_file: told the url of every file before it is read.
        on_bad_row: told every bad row, each time it is read.
        cache_bytes: what the blocks kept in memory may take together.
    """

    def __init__(
        self,
        corpus: TextCorpus,
        on_file: Callable[[str], object] = lambda url: None,
        on_bad_row: Callable[[BadRow], object] = lambda row: None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._corpus = corpus
        self._on_file, self._on_bad_row = on_file, on_bad_row
        self._held_out_below = held_out_below(corpus.held_out)
        self._blocks: OrderedDict[tuple[int, Unit], tuple[int, Texts]] = OrderedDict()
        self._free = cache_bytes
        self._rows: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._first_bad: dict[str, BadRow] = {}
        self._checked: set[str] = set()

    def texts(self, source: int, number: int) -> Texts:
        """The rows of unit `number` of a source.

        Raises:
            DataError: the file is damaged, or not what it was when it was planned; too many bad rows; another language.
        """
        block, part = self._corpus.plan.block(source, number)
        key = (source, block)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key][1][part]
        size, texts = self._read(self._corpus.plan.sources[source], block)
        self._blocks[key] = size, texts
        self._free -= size
        while self._free < 0 and len(self._blocks) > 1:
            self._free += self._blocks.popitem(last=False)[1][0]
        return texts[part]

    def _read(self, spec: SourceSpec, block: Unit) -> tuple[int, Texts]:
        url = block.file.url
        self._on_file(url)
        if "://" not in url or url not in self._checked:  # a remote look-up takes long, once is enough
            check_unchanged(spec, block.file)
            self._checked.add(url)
        language = self._corpus.language_of[spec.name]
        texts: Texts = []
        size = 0
        for row in read_unit(spec, block):
            text = row.text
            if text is None:
                self._note(spec, block, row)
            elif row.language != language:
                where = row_place(spec, block, row.position)
                raise DataError(f"{where}: source {spec.name} has rows of {language} and {row.language}")
            elif not self._is_trained_on(text, language):
                text = None
            size += _ROW_BYTES if text is None else _ROW_BYTES + len(text)
            texts.append(text)
        self._rows[spec.name] += len(texts)
        self._check_bad(spec.name)
        return size, texts

    def _is_trained_on(self, text: str, language: str) -> bool:
        if keyed_hash(text, SPLIT_KEY) < self._held_out_below:
            return False
        return self._corpus.filters.reason(text, language) is None

    def _note(self, spec: SourceSpec, block: Unit, row: Row) -> None:
        bad = BadRow(spec.name, row_place(spec, block, row.position), str(row.problem))
        self._bad[spec.name] += 1
        self._first_bad.setdefault(spec.name, bad)
        self._on_bad_row(bad)

    def _check_bad(self, source: str) -> None:
        bad, rows, allowed = self._bad[source], self._rows[source], self._corpus.max_bad_rows
        if bad > allowed * max(rows, FEWEST_ROWS):
            first = self._first_bad[source]
            raise DataError(
                f"{first.where}: {first.problem}; {bad} of {rows} rows of source {source} are bad, "
                f"{allowed:.2%} are allowed"
            )


def row_place(spec: SourceSpec, block: Unit, position: int) -> str:
    """Where a row lies, for a reader to find: its number in the file, or behind which byte of it."""
    url = block.file.url
    if is_split_by_bytes(spec, block.file) and block.first:
        return f"{url}: row {position + 1} after byte {block.first}"
    first = block.first if block.file.format in ("parquet", "arrow") else 0
    return f"{url}:{first + position + 1}"
