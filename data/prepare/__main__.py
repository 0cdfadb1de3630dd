"""Command line: `python -m data.prepare --source NAME=PATH ... --tokenizer FILE --out DIR`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from fractions import Fraction
from pathlib import Path

from data.corpus import TokenCorpus
from data.errors import DataError, run_command
from data.prepare import Filters, Selection, prepare
from data.prepare.selection import MAX_BAD_ROWS, SHARD_TOKENS
from data.sources import SourceSpec, parse_source, read_sources_file
from data.split import HELD_OUT

EXIT_INTERRUPTED = 130


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return run_command(lambda: _prepare(arguments))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _prepare(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    folder = prepare(
        _sources(arguments),
        arguments.tokenizer,
        arguments.out,
        workers=arguments.workers,
        filters=Filters(arguments.min_chars, arguments.max_chars, arguments.check_language),
        selection=Selection(
            seed=arguments.seed,
            dedup=not arguments.no_dedup,
            held_out=_fraction(arguments.held_out),
            max_bad_rows=arguments.max_bad_rows,
            shard_tokens=arguments.shard_tokens,
        ),
        quiet=arguments.quiet,
    )
    corpus = TokenCorpus.open(folder)
    seconds = round(time.perf_counter() - started, 2)
    if arguments.json:
        print(json.dumps({"folder": str(folder), "seconds": seconds, **corpus.stats()}))
        return
    _print(corpus)
    print(f"{folder}: prepared in {seconds} s")


def _sources(arguments: argparse.Namespace) -> list[SourceSpec]:
    named = [parse_source(text) for text in arguments.source]
    return named + [spec for path in arguments.sources for spec in read_sources_file(path)]


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(f"--held-out: {text!r} is no fraction such as 0.06 or 3/50") from error


def _print(corpus: TokenCorpus) -> None:
    for split in ("train", "validation"):
        for name in corpus.sources:
            source = corpus.split(split).source(name)
            print(f"{split:<10} {name:<16} {source.num_documents:>9} documents {source.num_tokens:>12} tokens")
    for name, record in sorted(corpus.manifest.sources.items()):
        left_out = {"duplicates": record.duplicates, "bad rows": record.quarantined, **record.filtered}
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        print(f"left out   {name:<16} {counts or 'nothing'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Tokenise text into a corpus folder. Interrupted, the same command goes on.",
    )
    add = parser.add_argument
    add(
        "--source",
        action="append",
        default=[],
        metavar="[NAME=]PATH[,FIELD=VALUE...]",
        help="file, folder, glob or address; fields: language, format, config, split, revision, text_field ...; repeat",
    )
    add("--sources", type=Path, action="append", default=[], metavar="FILE", help="YAML file: names to sources; repeat")
    add("--tokenizer", type=Path, required=True, help="tokenizer.json")
    add("--out", type=Path, required=True, help="corpus folder to create")
    add("--seed", type=int, default=0, help="order of the documents (default 0)")
    add("--workers", type=int, help="processes (default: one a core; none for small inputs)")
    add("--no-dedup", action="store_true", help="keep exact repetitions of documents")
    add("--min-chars", type=int, default=0, help="leave out shorter documents")
    add("--max-chars", type=int, help="leave out longer documents")
    add("--check-language", action="store_true", help="leave out documents mostly in another script")
    add("--max-bad-rows", type=float, default=MAX_BAD_ROWS, help="share of a source's rows that may be bad (0.01)")
    add("--held-out", default=str(HELD_OUT), help="share of the documents held out for validation (3/50)")
    add("--shard-tokens", type=int, default=SHARD_TOKENS, help=f"most tokens in a shard (default {SHARD_TOKENS})")
    add("--quiet", action="store_true", help="no progress")
    add("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
