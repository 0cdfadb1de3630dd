"""Turn text into a tokenised corpus folder: `python -m data.prepare --source FILE ... --tokenizer FILE --out DIR`.

Every document becomes BOS, its tokens, EOS. Documents are held out as `data.split` says and ordered by a hash of their
text under `seed`, so the folder does not depend on the order of files or rows. The folder appears whole, by one rename,
or not at all. The text of all sources is held in memory.
"""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from data.baseline import xz_bits_per_byte, xz_primed_bits_per_byte
from data.documents import Document, read_jsonl, require_file
from data.errors import DataError, run_command
from data.files import file_digest, locked, new_folder
from data.manifest import FORMAT_VERSION, MANIFEST, TOKENIZER, Baseline, Manifest, Shard, SourceFile
from data.shards import TokenCorpus
from data.split import HELD_OUT, SPLIT_KEY, keyed_hash, split_documents
from data.tokenizer import Tokenizer

ENCODE_AT_ONCE = 256


def prepare(sources: Sequence[str | Path], tokenizer: str | Path, out: str | Path, seed: int = 0) -> Path:
    """Prepare `sources` (JSON Lines) with `tokenizer` (a tokenizer.json) into the new folder `out` and return it.

    Raises:
        DataError: bad input, a source given twice or empty, a language too small to hold out a document, `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out}: exists already, choose another folder or remove it")
    with new_folder(out) as folder:
        _write_corpus(folder, sources, Path(tokenizer), seed)
    return out


def prepare_cached(sources: Sequence[str | Path], tokenizer: str | Path, cache_dir: str | Path, seed: int = 0) -> Path:
    """Return the corpus of these inputs below `cache_dir`, preparing it when it is missing or damaged.

    The folder is named by a digest of the inputs' contents. Any number of processes may call this at once: one
    prepares, the others wait for it; where the file system has no locks they all prepare and the first rename wins.

    Raises:
        DataError: as `prepare`.
    """
    out = Path(cache_dir) / _inputs_digest(_describe_sources(sources), Path(tokenizer), seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent / f".{out.name}.lock"):
        if out.exists() and not _is_intact(out):
            shutil.rmtree(out)
        if not out.exists():
            _build(sources, tokenizer, out, seed)
    return out


def _build(sources: Sequence[str | Path], tokenizer: str | Path, out: Path, seed: int) -> None:
    """Prepare `out`, or leave it to the process that has finished it first."""
    try:
        with new_folder(out) as folder:
            _write_corpus(folder, sources, Path(tokenizer), seed)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not _is_intact(out):
            raise


def _is_intact(folder: Path) -> bool:
    try:
        TokenCorpus.open(folder).check_digests()
    except DataError:
        return False
    return True


def _inputs_digest(files: Iterable[SourceFile], tokenizer: Path, seed: int) -> str:
    require_file(tokenizer)
    inputs = {
        "version": [FORMAT_VERSION, str(HELD_OUT), SPLIT_KEY],
        "sources": sorted(file.xxh3 for file in files),
        "tokenizer": file_digest(tokenizer),
        "seed": seed,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(inputs, sort_keys=True).encode())


def _describe_sources(sources: Sequence[str | Path]) -> list[SourceFile]:
    if not sources:
        raise DataError("no source files given")
    files: dict[str, SourceFile] = {}
    for path in map(Path, sources):
        require_file(path)
        file = SourceFile(path.name, path.stat().st_size, file_digest(path))
        if file.size == 0:
            raise DataError(f"{path}: is empty")
        if file.xxh3 in files:
            raise DataError(f"{path}: has the same content as {files[file.xxh3].name}, give every source once")
        files[file.xxh3] = file
    return list(files.values())


def _write_corpus(folder: Path, sources: Sequence[str | Path], tokenizer_path: Path, seed: int) -> None:
    files = _describe_sources(sources)
    if not 0 <= seed < 1 << 63:
        raise DataError(f"seed: {seed} is out of range, allowed: 0 .. 2^63 - 1")
    tokenizer = Tokenizer.load(tokenizer_path)
    shutil.copyfile(tokenizer_path, folder / TOKENIZER)
    shards: list[Shard] = []
    baselines: dict[str, Baseline] = {}
    for language, train, validation in _by_language([row for path in sources for row in read_jsonl(path)], seed):
        shards += [
            _write_shard(folder, split, language, documents, tokenizer)
            for split, documents in (("train", train), ("validation", validation))
        ]
        baselines[language] = _baseline(train, validation)
    manifest = Manifest(
        dtype=_dtype(tokenizer).name,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        tokenizer_xxh3=tokenizer.digest,
        seed=seed,
        sources=tuple(sorted(files, key=lambda file: file.xxh3)),
        shards=tuple(shards),
        validation=baselines,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _by_language(documents: Sequence[Document], seed: int) -> Iterator[tuple[str, list[Document], list[Document]]]:
    """Yield (language, training documents, validation documents), languages sorted, documents shuffled under `seed`."""
    train, validation = (
        sorted(part, key=lambda document: (keyed_hash(document.text, seed), document.source))
        for part in split_documents(documents)
    )
    for language in sorted({document.language for document in documents}):
        parts = [[document for document in part if document.language == language] for part in (train, validation)]
        if not all(parts):
            raise DataError(f"language {language}: too few documents, at least two are needed to hold one out")
        yield language, parts[0], parts[1]


def _write_shard(folder: Path, split: str, language: str, documents: Sequence[Document], tokenizer: Tokenizer) -> Shard:
    stem = folder / f"{split}-{language}-00000"
    ends = []
    tokens = 0
    with stem.with_suffix(".bin").open("wb") as file:
        for ids in _encode(documents, tokenizer):
            file.write(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=_dtype(tokenizer)).tobytes())
            tokens += len(ids) + 2
            ends.append(tokens)
    stem.with_suffix(".idx").write_bytes(np.array(ends, dtype="<u8").tobytes())
    return Shard(
        split=split,
        language=language,
        tokens=tokens,
        documents=len(documents),
        text_bytes=sum(document.num_bytes for document in documents),
        tokens_xxh3=file_digest(stem.with_suffix(".bin")),
        index_xxh3=file_digest(stem.with_suffix(".idx")),
    )


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for start in range(0, len(documents), ENCODE_AT_ONCE):
        yield from tokenizer.encode_batch([document.text for document in documents[start : start + ENCODE_AT_ONCE]])


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _baseline(train: Iterable[Document], validation: Iterable[Document]) -> Baseline:
    training_text, held_out_text = (
        b"".join(document.text.encode() for document in part) for part in (train, validation)
    )
    return Baseline(xz_bits_per_byte(held_out_text), xz_primed_bits_per_byte(training_text, held_out_text))


def main() -> int:
    arguments = _parser().parse_args()

    def command() -> None:
        started = time.perf_counter()
        corpus = TokenCorpus.open(prepare(arguments.source, arguments.tokenizer, arguments.out, arguments.seed))
        seconds = round(time.perf_counter() - started, 2)
        if arguments.json:
            print(json.dumps({"folder": str(arguments.out), "seconds": seconds, **corpus.stats()}))
            return
        for shard in corpus.manifest.shards:
            print(f"{shard.split:<10} {shard.language:<8} {shard.documents:>9} documents {shard.tokens:>12} tokens")
        print(f"{arguments.out}: prepared in {seconds} s")

    return run_command(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Tokenise text into a corpus folder.")
    parser.add_argument("--source", type=Path, action="append", required=True, help="JSON Lines file; may be repeated")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="corpus folder to create")
    parser.add_argument("--seed", type=int, default=0, help="order of the documents (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
