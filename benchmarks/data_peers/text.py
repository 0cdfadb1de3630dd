"""Text to tokens: this project's mode B and `data.prepare`, and the `tokenizers` library alone.

Tokens are counted alike: those that reach the trainer or the corpus, BOS and EOS of every document included. The
library alone has its texts in memory already and keeps none of the ids.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from benchmarks.data_peers.common import SEED, Job, Loader, serve
from benchmarks.data_peers.corpus import read_texts
from benchmarks.data_peers.ours import SAMPLE, StepLoader

BATCH_TEXTS = 1000
PROCESSES = 2


def write(job: Job) -> None:
    """The text is a parquet file already."""


def open_loader(job: Job, state: Any) -> Loader:
    from data.sources import SourceSpec
    from data.spec import StreamSpec
    from data.text.corpus import TextCorpus
    from data.text.loader import TextLoader
    from data.text.stream import TextStream

    source = SourceSpec("text", str(Path(job.corpus) / "text.parquet"), language="en")
    corpus = TextCorpus.open([source], SAMPLE, streams=job.batch_size, cache_dir=Path(job.folder) / "cache")
    stream = TextStream(corpus, StreamSpec.single_stage(job.seq_len, {"text": 1}, SEED))
    loader = TextLoader(stream, job.batch_size, job.batch_size, workers=job.workers)
    if state is not None:
        loader.load_state_dict(state)
    return StepLoader(loader)


def raw(job: Job) -> dict[str, object]:
    """The library alone: on all cores by its own threads, or in two processes without threads."""
    if not job.workers:
        return {"tokens_per_second": _encode(job, 0, 1, None)}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(job.workers)
    shares = [(job, number, job.workers, barrier) for number in range(job.workers)]
    with context.Manager() as manager:
        rates = manager.list()
        pool = [context.Process(target=_encode_share, args=(*share, rates)) for share in shares]
        for process in pool:
            process.start()
        for process in pool:
            process.join()
        if len(rates) < job.workers:
            raise SystemExit("a process has died")
        return {"tokens_per_second": sum(rates)}


def prepare(job: Job) -> dict[str, object]:
    """`python -m data.prepare` from start to end, without its own start-up; no document is a duplicate."""
    out = Path(job.folder) / "prepared"
    shutil.rmtree(out, ignore_errors=True)
    source = f"text={Path(job.corpus) / 'text.parquet'},language=en"
    command = [sys.executable, "-m", "data.prepare", "--source", source, "--tokenizer", str(SAMPLE), "--out", str(out)]
    begin = time.perf_counter()
    done = subprocess.run(
        [*command, "--workers", str(job.workers), "--quiet", "--json"], check=True, stdout=subprocess.PIPE
    )
    wall = time.perf_counter() - begin
    facts = json.loads(done.stdout)
    tokens = sum(source["tokens"] for split in facts["splits"].values() for source in split.values())
    shutil.rmtree(out)
    return {"tokens_per_second": tokens / facts["seconds"], "wall_s": wall}


def _encode_share(job: Job, number: int, parts: int, barrier: Barrier, rates: Any) -> None:
    rates.append(_encode(job, number, parts, barrier))


def _encode(job: Job, number: int, parts: int, barrier: Barrier | None) -> float:
    """Tokens a second of one part of the texts, again and again for `job.seconds`."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(SAMPLE))
    encode = getattr(tokenizer, job.case)
    texts = read_texts(Path(job.corpus))[number::parts]
    batches = [texts[first : first + BATCH_TEXTS] for first in range(0, len(texts), BATCH_TEXTS)]
    encode(batches[0], add_special_tokens=False)
    if barrier is not None:
        barrier.wait()
    begin = time.perf_counter()
    tokens = turn = 0
    while (seconds := time.perf_counter() - begin) < job.seconds:
        texts = batches[turn % len(batches)]
        tokens += sum(map(len, encode(texts, add_special_tokens=False))) + 2 * len(texts)
        turn += 1
    return tokens / seconds


if __name__ == "__main__":
    asked = Job(**json.loads(sys.argv[1]))
    if asked.action in ("raw", "prepare"):
        print(json.dumps({"raw": raw, "prepare": prepare}[asked.action](asked)))
    else:
        serve(write, open_loader, "tokenizers")
