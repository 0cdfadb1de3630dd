"""Turn sources of text into a tokenised corpus folder: `prepare`, `prepare_cached`, `python -m data.prepare`.

Every document becomes BOS, its tokens, EOS. The work has two phases:

    plan.py      files and units, kept in a work folder beside the folder to be
    encode.py    phase 1: every unit is read, filtered, hashed and encoded on its own (workers.py: in several processes)
    gather.py    phase 2: what selection.py chose becomes shards and a manifest; one rename makes the folder appear

A run that is killed at any moment is continued by the same command. The result is the same to the byte for any number
of workers and any interruptions.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import xxhash

from data.corpus import TokenCorpus
from data.errors import DataError
from data.files import locked, new_folder, write_whole
from data.manifest import FORMAT_VERSION, TOKENIZER
from data.prepare.encode import read_facts
from data.prepare.filters import Filters
from data.prepare.gather import write_corpus
from data.prepare.plan import PLAN_VERSION, Plan, open_plan, resolve_all, sorted_sources, work_folder
from data.prepare.progress import Progress
from data.prepare.selection import Selection
from data.prepare.workers import encode_here, encode_in_workers
from data.sources import SourceSpec
from data.sources.spec import source_of_path
from data.split import SPLIT_KEY
from data.tokenizer import Tokenizer

__all__ = ["Filters", "Selection", "prepare", "prepare_cached"]

# Smaller inputs are encoded in this process: starting others would take longer.
SMALL_BYTES = 32 << 20

Source = SourceSpec | str | Path


def prepare(
    sources: Sequence[Source],
    tokenizer: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    filters: Filters | None = None,
    selection: Selection | None = None,
    quiet: bool = True,
) -> Path:
    """Prepare `sources` with `tokenizer`, a tokenizer.json, into the new folder `out` and return it.

    Args:
        sources: specs, or paths that stand for a source named after the file.
        seed: order of the documents; `selection`, when given, has its own.
        workers: processes; None takes one a core, or none for small inputs.
        filters: which documents to leave out.
        selection: seed, duplicates, held-out fraction, bad rows, shard size.
        quiet: show no progress on stderr.

    Raises:
        DataError: bad input, a source given twice or empty, `out` exists, an input changed since work on `out` began.
        OSError: a disk is full or fails.
    """
    out = Path(out)
    specs = sorted_sources([_as_spec(source) for source in sources])
    selection = selection or Selection(seed=seed)
    filters = filters or Filters()
    if workers is not None and workers < 1:
        raise DataError(f"workers: {workers} is too small, 1 is the least")
    _require_new(out)
    loaded = Tokenizer.load(tokenizer)
    work = work_folder(out, specs, loaded.digest, filters)
    with _working_in(work):
        _require_new(out)
        write_whole(work / TOKENIZER, Path(tokenizer).read_bytes())  # for the workers and the corpus
        plan = open_plan(work, specs, loaded.digest, filters)
        with _small_leaves_nothing(plan, work):
            _encode(plan, work, loaded, workers, quiet)
            with new_folder(out, inside=work) as folder:
                write_corpus(folder, plan, work, loaded, selection)
        shutil.rmtree(work, ignore_errors=True)
    return out


def prepare_cached(sources: Sequence[Source], tokenizer: str | Path, cache_dir: str | Path, seed: int = 0) -> Path:
    """Return the corpus of these inputs below `cache_dir`, preparing it when it is missing or damaged.

    The folder is named by a digest of sources, sizes and stamps of their files, tokenizer and seed. Any number of
    processes may call this at once: one prepares, the others wait for it; where the file system has no locks they all
    prepare and the first rename wins.

    Raises:
        DataError: as `prepare`.
    """
    specs = sorted_sources([_as_spec(source) for source in sources])
    out = Path(cache_dir) / _inputs_digest(specs, Path(tokenizer), seed)
    if _is_intact(out):  # needs no lock, which read-only storage could not give
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent / f".{out.name}.lock"):
        if out.exists() and not _is_intact(out):
            shutil.rmtree(out)
        if not out.exists():
            try:
                prepare(specs, tokenizer, out, seed=seed)
            except (OSError, DataError):
                if not out.exists() or not _is_intact(out):  # else another process has finished it first
                    raise
    return out


def _as_spec(source: Source) -> SourceSpec:
    return source if isinstance(source, SourceSpec) else source_of_path(source)


def _require_new(out: Path) -> None:
    if os.path.lexists(out):
        raise DataError(f"{out}: exists already, choose another folder or remove it")


@contextmanager
def _working_in(work: Path) -> Iterator[None]:
    """Hold the work folder against other processes; it goes away when the body fails before there is a plan."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        with locked(work / "lock"):
            yield
    finally:
        if work.exists() and not (work / "plan.json").exists():
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _small_leaves_nothing(plan: Plan, work: Path) -> Iterator[None]:
    """Remove the work folder of a small input when the body fails; what is large is kept, to go on with."""
    try:
        yield
    except Exception:
        if plan.num_bytes <= SMALL_BYTES:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _encode(plan: Plan, work: Path, tokenizer: Tokenizer, workers: int | None, quiet: bool) -> None:
    left = [number for number in range(len(plan.units)) if read_facts(work, number) is None]
    todo = sum(plan.units[number].num_bytes for number in left)
    here = todo <= SMALL_BYTES if workers is None else workers == 1
    with Progress(plan.num_bytes, plan.num_bytes - todo, quiet) as progress:
        if here or not left:
            encode_here(plan, left, work, tokenizer, progress)
        else:
            encode_in_workers(plan, left, work, min(workers or os.cpu_count() or 1, len(left)), progress)


def _is_intact(folder: Path) -> bool:
    try:
        TokenCorpus.open(folder).check_digests()
    except DataError:
        return False
    return True


def _inputs_digest(specs: Sequence[SourceSpec], tokenizer: Path, seed: int) -> str:
    inputs = {
        "version": [FORMAT_VERSION, PLAN_VERSION, str(Selection().held_out), SPLIT_KEY],
        "sources": [asdict(spec) for spec in specs],
        "files": [[asdict(file) for file in files] for files in resolve_all(specs)],
        "tokenizer": Tokenizer.load(tokenizer).digest,
        "seed": seed,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(inputs, sort_keys=True, default=str).encode())
