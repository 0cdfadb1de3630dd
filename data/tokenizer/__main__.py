"""Command line: `python -m data.tokenizer train`, `import` and `inspect`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import tokenizers

from data.documents import Document
from data.errors import DataError, run_command
from data.sources.read import read_documents
from data.sources.spec import SourceSpec, parse_source
from data.split import SPLIT_KEY, is_held_out, keyed_hash
from data.tokenizer import Tokenizer, errors_name, read_tokenizer
from data.tokenizer.importing import import_tokenizer
from data.tokenizer.layout import BOS, EOS
from data.tokenizer.measure import Compression, Encode, compression, table
from data.tokenizer.ranks import load_ranks
from data.tokenizer.train import MAX_BYTES, train_tokenizer


def main() -> int:
    arguments = _parser().parse_args()
    commands = {"train": _train, "import": _import, "inspect": _inspect}
    return run_command(lambda: commands[arguments.command](arguments))


def describe(tokenizer: Tokenizer) -> dict[str, object]:
    """Facts about a tokenizer."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "unused_ids": tokenizer.vocab_size - tokenizer.num_entries,
        "bos": tokenizer.bos,
        "bos_id": tokenizer.bos_id,
        "eos": tokenizer.eos,
        "eos_id": tokenizer.eos_id,
        "digest": tokenizer.digest,
        "longest_token_bytes": int(tokenizer.byte_lengths().max()),
    }


def _train(arguments: argparse.Namespace) -> None:
    train_tokenizer(
        _sources(arguments),
        arguments.vocab_size,
        arguments.out,
        shares=_shares(arguments.share),
        max_bytes=arguments.max_bytes,
        report=lambda line: print(line, file=sys.stderr),
        progress=sys.stderr.isatty(),
    )
    print(f"{arguments.out}: {Tokenizer.load(arguments.out).vocab_size} entries")


def _import(arguments: argparse.Namespace) -> None:
    tokenizer = import_tokenizer(
        arguments.file,
        arguments.out,
        bos=arguments.bos,
        eos=arguments.eos,
        drop_normalizer=arguments.drop_normalizer,
    )
    _print_facts(describe(tokenizer))


def _inspect(arguments: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(arguments.file)
    encoders: dict[str, Encode] = {str(arguments.file): tokenizer.encode_batch}
    others = {str(path): _read_other(path) for path in arguments.against}
    others |= {str(path): load_ranks(path) for path in arguments.tiktoken}
    for name, backend in others.items():
        encoders.setdefault(name, _encoder(name, backend))
    result = compression(encoders, _documents(_sources(arguments), arguments.held_out))
    facts = describe(tokenizer)
    if arguments.json:
        print(json.dumps(facts | _figures(result, str(arguments.file))))
        return
    _print_facts(facts)
    if result.text_bytes:
        print("", *table(result), sep="\n")


def _figures(result: Compression, first: str) -> dict[str, object]:
    """Bytes per token and tokens by language, of the tokenizer itself and of those it is held against."""
    figures: dict[str, dict[str, object]] = {
        name: {
            "bytes_per_token": {key: round(result.bytes_per_token(name, key), 3) for key in sorted(counts)},
            "tokens": {key: counts[key] for key in sorted(counts)},
        }
        for name, counts in result.tokens.items()
    }
    return {"text_bytes": dict(sorted(result.text_bytes.items())), **figures.pop(first), "against": figures}


def _read_other(path: Path) -> tokenizers.Tokenizer:
    """Any tokenizer the library can run, unchecked: it only serves for comparison."""
    content = read_tokenizer(path)
    with errors_name(str(path), "not a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_str(content.decode())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _encoder(name: str, backend: tokenizers.Tokenizer) -> Encode:
    def encode(texts: Sequence[str]) -> list[list[int]]:
        with errors_name(name, "text cannot be encoded"):
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    return encode


def _documents(sources: Sequence[SourceSpec], held_out: bool) -> Iterator[Document]:
    for document in chain.from_iterable(read_documents(source) for source in sources):
        if not held_out or is_held_out(keyed_hash(document.text, SPLIT_KEY)):
            yield document


def _sources(arguments: argparse.Namespace) -> list[SourceSpec]:
    return [parse_source(text) for text in arguments.source]


def _shares(texts: Sequence[str]) -> dict[str, Fraction]:
    shares = {}
    for text in texts:
        language, equals, number = text.partition("=")
        try:
            share = Fraction(number)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not equals or not language or share <= 0:
            raise DataError(f"--share: {text!r:.60} must be LANGUAGE=NUMBER, the number above 0")
        if language in shares:
            raise DataError(f"--share: {language} is given twice")
        shares[language] = share
    return shares


def _print_facts(facts: dict[str, object]) -> None:
    for name, value in facts.items():
        print(f"{name:<20} {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.tokenizer", description="Train, take over or describe one.")
    commands = parser.add_subparsers(dest="command", required=True)
    path = "[NAME=]PATH[,FIELD=VALUE...]"
    train = commands.add_parser("train", help="train a byte-level BPE on the training split of sources")
    train.add_argument("--source", action="append", required=True, metavar=path, help="as for python -m data.prepare")
    train.add_argument("--vocab-size", type=int, required=True, help="entries, BOS and EOS included")
    train.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    train.add_argument(
        "--share", action="append", default=[], metavar="LANGUAGE=NUMBER", help="part of the text; without: equal parts"
    )
    train.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="text to use at most; 1 GB takes about 40 GB")
    take = commands.add_parser("import", help="check another project's byte-level BPE and take it over")
    take.add_argument("file", type=Path, help="tokenizer.json")
    take.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    take.add_argument("--bos", help=f"special token that opens a document; default: what the file says, or {BOS}")
    take.add_argument("--eos", help=f"special token that closes a document; default: what the file says, or {EOS}")
    take.add_argument(
        "--drop-normalizer", action="store_true", help="remove a normalizer (such as NFC), so that every text survives"
    )
    inspect = commands.add_parser("inspect", help="print facts about a tokenizer.json, and its compression")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--source", action="append", default=[], metavar=path, help="text to measure on; repeatable")
    inspect.add_argument("--held-out", action="store_true", help="measure on held-out documents alone")
    inspect.add_argument("--against", type=Path, action="append", default=[], help="another tokenizer.json")
    inspect.add_argument("--tiktoken", type=Path, action="append", default=[], help="GPT-2 style ranks to compare with")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
