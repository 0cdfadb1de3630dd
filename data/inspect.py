"""Look into a prepared corpus: `python -m data.inspect DIR stats|verify|peek INDEX`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.batch import Row
from data.errors import DataError, run_command
from data.shards import TokenCorpus
from data.stream import TokenStream
from data.tokenizer import Tokenizer


def peek(stream: TokenStream, tokenizer: Tokenizer, index: int) -> dict[str, object]:
    """The training sequence `index`: where it comes from, and its text cut at the starts of documents."""
    row = stream[index]
    return {
        "index": index,
        "language": stream.corpus.languages[row.language],
        "epoch": row.epoch,
        "row": row.source_row,
        "first_token": row.source_row * stream.seq_len,
        "documents": _documents(row, tokenizer),
    }


def _documents(row: Row, tokenizer: Tokenizer) -> list[dict[str, object]]:
    pieces = np.split(row.input_ids, np.flatnonzero(row.document_starts))
    starts = [False, *[True] * (len(pieces) - 1)]
    return [
        {"tokens": len(piece), "from_start": start, "text": tokenizer.decode(piece.tolist())}
        for piece, start in zip(pieces, starts, strict=True)
        if len(piece)
    ]


def main() -> int:
    arguments = _parser().parse_args()
    commands = {"stats": _stats, "verify": _verify, "peek": _peek}
    return run_command(lambda: commands[arguments.command](TokenCorpus.open(arguments.folder), arguments))


def _stats(corpus: TokenCorpus, arguments: argparse.Namespace) -> None:
    stats = corpus.stats()
    if arguments.json:
        print(json.dumps(stats))
        return
    tokenizer = corpus.manifest.tokenizer_xxh3
    print(f"corpus {corpus.digest}, tokenizer {tokenizer}, {corpus.vocab_size} ids of {corpus.manifest.dtype}")
    for shard in corpus.manifest.shards:
        per_token = shard.text_bytes / (shard.tokens - 2 * shard.documents)
        print(
            f"{shard.split:<10} {shard.language:<8} {shard.documents:>9} documents {shard.tokens:>12} tokens "
            f"{shard.text_bytes:>12} bytes {per_token:>6.3f} bytes/token"
        )
    for language, baseline in corpus.manifest.validation.items():
        print(
            f"xz -9      {language:<8} {baseline.xz_bits_per_byte:.4f} bits/byte of held-out text, "
            f"{baseline.xz_primed_bits_per_byte:.4f} after the training text"
        )


def _verify(corpus: TokenCorpus, arguments: argparse.Namespace) -> None:
    corpus.verify()
    if arguments.json:
        print(json.dumps({"folder": str(arguments.folder), "digest": corpus.digest, "intact": True}))
        return
    print(f"{arguments.folder}: intact, {2 * len(corpus.manifest.shards)} files")


def _peek(corpus: TokenCorpus, arguments: argparse.Namespace) -> None:
    if arguments.index < 0:
        raise DataError(f"INDEX: {arguments.index} is negative, sequences count from 0")
    weights = _weights(arguments.weight) or dict.fromkeys(corpus.languages, "1")
    stream = TokenStream(corpus, arguments.seq_len, weights, arguments.seed)
    facts = peek(stream, Tokenizer.load(corpus.tokenizer_path), arguments.index)
    if arguments.json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    documents = facts.pop("documents")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    assert isinstance(documents, list)
    for number, document in enumerate(documents):
        place = "starts here" if document["from_start"] else "continues"
        print(f"--- document {number} {place}, {document['tokens']} tokens\n{document['text']}")


def _weights(entries: list[str]) -> Mapping[str, str]:
    weights = dict(entry.partition("=")[::2] for entry in entries)
    if not all(weights.values()):
        raise DataError("--weight: write LANGUAGE=SHARE, for example --weight en=0.7 --weight zh=0.3")
    return weights


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.inspect", description="Look into a prepared corpus.")
    parser.add_argument("folder", type=Path, help="corpus folder")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print one JSON object")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("stats", parents=[output], help="sizes, bytes per token, compression baselines")
    commands.add_parser("verify", parents=[output], help="read everything and check it")
    peek = commands.add_parser("peek", parents=[output], help="print one training sequence as documents and text")
    peek.add_argument("index", type=int, help="global sequence index, from 0")
    peek.add_argument("--seq-len", type=int, default=256, help="inputs in a sequence (default 256)")
    peek.add_argument("--seed", type=int, default=0, help="seed of the run (default 0)")
    peek.add_argument("--weight", action="append", default=[], help="LANGUAGE=SHARE; repeat (default: equal)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
