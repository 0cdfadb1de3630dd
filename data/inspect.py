"""Look into a corpus or into what a run was fed: `python -m data.inspect FOLDER stats|verify|peek|replay|diff`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import yaml
from torch import Tensor

from data.corpus import TokenCorpus
from data.documents import require_file
from data.errors import DataError, run_command
from data.loader import BatchSizes
from data.order import MAX_ROWS
from data.pipeline import open_stream, open_text, stream_spec
from data.shards import TokenSource
from data.spec import StreamSpec
from data.stream import Stream
from data.text.loader import TextLoader
from data.text.stream import TextStream
from data.token_stream import TokenStream
from data.tokenizer import Tokenizer

RUN_CONFIG = "config.yaml"
DIFF_HORIZON = 1 << 16


def peek(stream: TokenStream, tokenizer: Tokenizer, index: int) -> dict[str, Any]:
    """Training sequence `index`: where it comes from, and the text of the documents in it."""
    place = stream.place(index)
    pieces = [
        {
            "document": piece.document,
            "from_token": piece.offset,
            "from_start": piece.offset == 0,
            "tokens": len(piece.tokens),
            "text": tokenizer.decode(piece.tokens.tolist()),
        }
        for piece in stream.pieces(index)
    ]
    language = stream.text.language_of[place.source]
    return {"index": index, **vars(place), "language": language, "documents": pieces}


def replay(run: Path, step: int, ranks: int) -> Iterator[dict[str, Any]]:
    """What every one of `ranks` data-parallel ranks read in the `step`-th step of a run, counted from 1 as in its log.

    Raises:
        DataError: no run there, or a step or a number of ranks that it could not have had.
    """
    stream, sizes = open_run(run)
    if step < 1:
        raise DataError(f"STEP: {step} is too small, the first step is 1")
    first = sizes.first_sequence(step - 1)
    size = sizes.size_at(first)
    if ranks < 1 or size % ranks:
        raise DataError(f"--ranks: {ranks} does not divide the {size} sequences of step {step}")
    tokenizer = Tokenizer.load(stream.text.tokenizer_path)
    if isinstance(stream, TextStream):
        yield from _replay_text(stream, sizes, step, ranks, tokenizer)
        return
    assert isinstance(stream, TokenStream)
    for index in range(first, first + size):
        yield {"rank": (index - first) * ranks // size, **peek(stream, tokenizer, index)}


def _replay_text(
    stream: TextStream, sizes: BatchSizes, step: int, ranks: int, tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Streams can only be read from their beginning, so all steps before are read as well."""
    first, streams = sizes.first_sequence(step - 1), stream.corpus.streams
    if streams % ranks:
        raise DataError(f"--ranks: {ranks} does not divide data.streams={streams}")
    loader = TextLoader(stream, sizes, math.gcd(*sizes.sizes), workers=0, prefetch=1)
    try:
        *_, batches = (next(loader) for _ in range(step))
    finally:
        loader.close()
    rows = [(batch, row) for batch in batches for row in range(len(batch.input_ids))]
    for index, (batch, row) in enumerate(rows, start=first):
        source = stream.text.sources[int(batch.row_sources[row])]
        yield {
            "rank": index % streams * ranks // streams,
            "index": index,
            "source": source,
            "language": stream.text.language_of[source],
            "documents": _documents(batch.input_ids[row], batch.document_starts[row], tokenizer),
        }


def _documents(ids: Tensor, starts: Tensor, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    opened = [place for place in starts.nonzero().flatten().tolist() if place]
    pieces = np.split(ids.numpy(), opened)
    opens = [bool(starts[0]), *[True] * len(opened)]
    return [
        {"from_start": start, "tokens": len(piece), "text": tokenizer.decode(piece.tolist())}
        for start, piece in zip(opens, pieces, strict=True)
    ]


def open_run(run: Path) -> tuple[Stream, BatchSizes]:
    """The stream of a run folder and the sizes of its steps, from the `config.yaml` in it."""
    path = run / RUN_CONFIG
    require_file(path)
    try:
        config = yaml.safe_load(path.read_bytes())
        data, train = config["data"], config["train"]
        sizes = BatchSizes(train["global_batch_size"], [tuple(pair) for pair in train["batch_ramp"]])
        text = open_text(data)
        return open_stream(text, stream_spec(data, text, sizes, train["seed"])), sizes
    except DataError:
        raise
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise DataError(f"{path}: not the configuration of a run: {' '.join(str(error).split()):.200}") from error


def diff(first: Path, second: Path) -> list[str]:
    """In which ways two corpora, or the streams of two runs, differ; empty when training could not tell them apart."""
    if (first / RUN_CONFIG).is_file() and (second / RUN_CONFIG).is_file():
        return _diff_streams(open_run(first)[0], open_run(second)[0])
    return _diff_corpora(TokenCorpus.open(first), TokenCorpus.open(second))


def _diff_corpora(first: TokenCorpus, second: TokenCorpus) -> list[str]:
    lines = []
    for key in ("tokenizer_xxh3", "dtype", "vocab_size", "held_out", "seed"):
        before, after = getattr(first.manifest, key), getattr(second.manifest, key)
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    for name in sorted({*first.sources, *second.sources}):
        if name not in first.sources or name not in second.sources:
            lines.append(f"source {name}: only in the {'first' if name in first.sources else 'second'}")
            continue
        for split in ("train", "validation"):
            lines += _diff_sources(f"{split} {name}", *(c.split(split).source(name) for c in (first, second)))
    return lines


def _diff_sources(name: str, first: TokenSource, second: TokenSource) -> list[str]:
    before, after = _document_digests(first), _document_digests(second)
    if np.array_equal(before, after):
        return []
    gone, new = len(np.setdiff1d(before, after)), len(np.setdiff1d(after, before))
    if gone or new:
        return [f"{name}: {gone} documents only in the first, {new} only in the second"]
    return [f"{name}: the same documents in another order or number"]


def _document_digests(source: TokenSource) -> np.ndarray:
    ends = source.document_ends().astype(np.int64).tolist()
    spans = zip([0, *ends], ends, strict=False)
    return np.array([xxhash.xxh3_64_intdigest(source.tokens(*span).tobytes()) for span in spans], dtype=np.uint64)


def _diff_streams(first: Stream, second: Stream) -> list[str]:
    specs = [{"text": stream.text.digest, **stream.spec.to_json()} for stream in (first, second)]
    lines = [f"{key}: {specs[0][key]} -> {specs[1][key]}" for key in specs[0] if specs[0][key] != specs[1][key]]
    if lines and isinstance(first, TokenStream) and isinstance(second, TokenStream):
        places = ((first.place(index), second.place(index)) for index in range(DIFF_HORIZON))
        at = next((index for index, (one, other) in enumerate(places) if one != other), None)
        lines.append(f"first sequence from another place: {f'none of {DIFF_HORIZON}' if at is None else at}")
    return lines


def main() -> int:
    arguments = _parser().parse_args()
    commands = {"stats": _stats, "verify": _verify, "peek": _peek, "replay": _replay, "diff": _diff}
    return run_command(lambda: commands[arguments.command](arguments))


def _stats(arguments: argparse.Namespace) -> None:
    corpus = TokenCorpus.open(arguments.folder)
    if arguments.json:
        print(json.dumps(corpus.stats()))
        return
    tokenizer = corpus.manifest.tokenizer_xxh3
    print(f"corpus {corpus.digest}, tokenizer {tokenizer}, {corpus.vocab_size} ids of {corpus.manifest.dtype}")
    for split, sources in corpus.stats()["splits"].items():
        for name, facts in sources.items():
            print(
                f"{split:<10} {name:<12} {corpus.language_of[name]:<5} {facts['documents']:>9} documents "
                f"{facts['tokens']:>12} tokens {facts['text_bytes']:>13} bytes {facts['bytes_per_token'] or 0:>6.3f} "
                "bytes/token"
            )
    for language, baseline in corpus.baselines.items():
        print(
            f"xz -9      {language:<8} {baseline.xz_bits_per_byte:.4f} bits/byte of held-out text, "
            f"{baseline.xz_primed_bits_per_byte:.4f} after the training text"
        )


def _verify(arguments: argparse.Namespace) -> None:
    corpus = TokenCorpus.open(arguments.folder)
    corpus.verify()
    if arguments.json:
        print(json.dumps({"folder": str(arguments.folder), "digest": corpus.digest, "intact": True}))
        return
    print(f"{arguments.folder}: intact, {2 * len(corpus.manifest.shards)} files")


def _peek(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.index < MAX_ROWS:
        raise DataError(f"INDEX: {arguments.index} is out of range, sequences count from 0 to {MAX_ROWS - 1}")
    corpus = TokenCorpus.open(arguments.folder)
    weights = _weights(arguments.weight) or corpus.weights
    stream = TokenStream(corpus, StreamSpec.single_stage(arguments.seq_len, weights, arguments.seed))
    _print_sequence(peek(stream, Tokenizer.load(corpus.tokenizer_path), arguments.index), arguments.json)


def _replay(arguments: argparse.Namespace) -> None:
    for facts in replay(arguments.folder, arguments.step, arguments.ranks):
        _print_sequence(facts, arguments.json)


def _diff(arguments: argparse.Namespace) -> None:
    lines = diff(arguments.folder, arguments.other)
    if arguments.json:
        print(json.dumps({"equal": not lines, "differences": lines}, ensure_ascii=False))
        return
    print("\n".join(lines) or "training could not tell them apart")


def _print_sequence(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    documents = facts.pop("documents")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for document in documents:
        number = f"document {document['document']}" if "document" in document else "a document"
        later = f"from token {document['from_token']}" if "from_token" in document else "continued"
        place = "from its start" if document["from_start"] else later
        print(f"--- {number} {place}, {document['tokens']} tokens\n{document['text']}")


def _weights(entries: list[str]) -> Mapping[str, str]:
    weights = dict(entry.partition("=")[::2] for entry in entries)
    if not all(weights.values()):
        raise DataError("--weight: write SOURCE=SHARE, for example --weight en=0.7 --weight zh=0.3")
    return weights


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect", description="Look into a prepared corpus, or into what a run was fed."
    )
    parser.add_argument("folder", type=Path, help="corpus folder; for replay a run folder; for diff either")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print JSON, an object a line")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("stats", parents=[output], help="sizes, bytes per token, compression baselines")
    commands.add_parser("verify", parents=[output], help="read everything and check it")
    peek = commands.add_parser("peek", parents=[output], help="print one training sequence as documents and text")
    peek.add_argument("index", type=int, help="global sequence index, from 0")
    peek.add_argument("--seq-len", type=int, default=256, help="inputs in a sequence (default 256)")
    peek.add_argument("--seed", type=int, default=0, help="seed of the run (default 0)")
    peek.add_argument("--weight", action="append", default=[], help="SOURCE=SHARE; repeat (default: the sources' own)")
    replay = commands.add_parser("replay", parents=[output], help="print what every rank of a run read in one step")
    replay.add_argument("step", type=int, help="step as in the log, from 1")
    replay.add_argument("--ranks", type=int, default=1, help="data-parallel ranks to deal the step to (default 1)")
    diff = commands.add_parser("diff", parents=[output], help="say in which ways two corpora or runs differ")
    diff.add_argument("other", type=Path, help="the other corpus or run folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
