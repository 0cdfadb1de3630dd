"""Sources of text that are tokenised while training: what they are, in what units, and their held-out documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.errors import DataError
from data.prepare.filters import Filters, scripts_of
from data.prepare.selection import MAX_BAD_ROWS
from data.shards import CorpusSplit
from data.sources import SourceSpec
from data.split import HELD_OUT
from data.text.heldout import HeldOut, open_held_out
from data.text.plan import Plan, make_plan, read_plan
from data.text.reader import Reader
from data.tokenizer import Tokenizer

VALIDATION_TOKENS = 1 << 20


class TextCorpus:
    """Sources that are read and tokenised while training.

    Attributes:
        sources: names, sorted; a source's place here is its id everywhere else.
        language_of: language of every source.
        languages: sorted; a language's place here is its id everywhere else.
        plan: files and units.
        streams: V, the virtual streams that the units are dealt to.
        digest: xxh3-128 (hex) of everything training can see.
        tokenizer, tokenizer_path, vocab_size, bos_id, eos_id: as loaded.
        baselines: empty, a prepared corpus has some.
    """

    def __init__(self, plan: Plan, tokenizer: Path, filters: Filters, held_out: Fraction, max_bad_rows: float) -> None:
        self.plan = plan
        self.filters, self.held_out, self.max_bad_rows = filters, held_out, max_bad_rows
        self.sources = tuple(spec.name for spec in plan.sources)
        self.streams = plan.streams
        self.tokenizer_path = tokenizer
        self.tokenizer = Tokenizer.load(tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        self.bos_id, self.eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        self.token_type = self.tokenizer.token_type
        seen = [plan.digest(), self.tokenizer.digest, str(held_out), asdict(filters)]
        self.digest = xxhash.xxh3_128_hexdigest(json.dumps(seen).encode())
        self.language_of: dict[str, str] = {}
        self.languages: tuple[str, ...] = ()
        self.baselines: Mapping[str, Any] = {}
        self._held_out: HeldOut | None = None

    @classmethod
    def open(
        cls,
        sources: Sequence[SourceSpec],
        tokenizer: str | Path,
        *,
        streams: int = 64,
        held_out: Fraction = HELD_OUT,
        validation_tokens: int = VALIDATION_TOKENS,
        cache_dir: str | Path,
        filters: Filters | None = None,
        max_bad_rows: float = MAX_BAD_ROWS,
    ) -> TextCorpus:
        """Look up the files, plan their units, and tokenise documents to validate on; both are kept in `cache_dir`.

        Validation takes the held-out documents of a source in order until they have `validation_tokens` tokens. The
        others are left out of training all the same. `max_bad_rows` is the share of bad rows, of those a process has
        read of a source, that is put up with.

        Raises:
            DataError: a source, the tokenizer or a setting cannot be used.
        """
        if not 0 <= held_out < 1:
            raise DataError(f"held_out: {held_out} is outside 0 .. 1")
        if not 0 <= max_bad_rows <= 1:
            raise DataError(f"max_bad_rows: {max_bad_rows} is outside 0 .. 1")
        filters = filters or Filters()
        for spec in sources if filters.check_language else ():
            if spec.language is not None:
                scripts_of(spec.language)
        cache_dir = Path(cache_dir)
        corpus = cls(make_plan(sources, streams, cache_dir), Path(tokenizer), filters, held_out, max_bad_rows)
        held = open_held_out(corpus, validation_tokens, cache_dir)
        corpus._held_out = held
        corpus._set_languages(held.language_of)
        return corpus

    def to_json(self) -> dict[str, object]:
        """What `from_json` needs to open the same corpus in another process, without its held-out documents."""
        return {
            "plan": str(self.plan.folder),
            "tokenizer": str(self.tokenizer_path),
            "filters": asdict(self.filters),
            "held_out": str(self.held_out),
            "max_bad_rows": self.max_bad_rows,
            "language_of": self.language_of,
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TextCorpus:
        """The corpus of `to_json`. DataError: the tokenizer has changed meanwhile."""
        tokenizer, filters = Path(content["tokenizer"]), Filters(**content["filters"])
        plan = read_plan(Path(content["plan"]))
        corpus = cls(plan, tokenizer, filters, Fraction(content["held_out"]), content["max_bad_rows"])
        if corpus.digest != content["digest"]:
            raise DataError(f"{tokenizer}: has changed since the run began")
        corpus._set_languages(content["language_of"])
        return corpus

    def split(self, name: str) -> CorpusSplit:
        """The split `validation`; there is no other to be read at any place."""
        if name != "validation" or self._held_out is None:
            raise DataError(
                f"split {name!r} of streamed text cannot be read at any place, data.prepare makes one that can"
            )
        return CorpusSplit(self._held_out.sources)

    def validation_bytes(self, language: str) -> int:
        """Bytes of UTF-8 of the documents to validate on."""
        split = self.split("validation")
        return sum(split.source(name).text_bytes for name in self.sources if self.language_of[name] == language)

    def sample(self, language: str, count: int) -> np.ndarray:
        """At most `count` ids of training documents, from the start of the sources of `language`, int64."""
        names = [name for name in self.sources if self.language_of[name] == language]
        ids = [index for name in names for index in self._first_ids(self.sources.index(name), -(-count // len(names)))]
        return np.array(ids[:count], dtype=np.int64)

    def _first_ids(self, source: int, count: int) -> Iterator[int]:
        reader = Reader(self)
        for unit in range(len(self.plan.units[source])):
            for text in filter(None, reader.texts(source, unit)):
                ids = self.tokenizer.encode(text)
                yield from ids[:count]
                count -= len(ids)
                if count <= 0:
                    return

    def _set_languages(self, language_of: Mapping[str, str]) -> None:
        self.language_of = dict(language_of)
        self.languages = tuple(sorted(set(self.language_of.values())))
