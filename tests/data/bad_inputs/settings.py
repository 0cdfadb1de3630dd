"""YAML files of sources, command lines, configurations."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from conftest import TOKENIZER

from bad_inputs import GOOD_LINES, Attempt, Bench, Case, Refused
from data import inspect
from data.errors import EXIT_DATA_ERROR, DataError
from data.prepare import __main__ as prepare_command
from data.sources import read_sources_file
from data.tokenizer import __main__ as tokenizer_command
from moe.config import compose, load_config

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MAP_BOMB = "a0: &a0 {" + ", ".join(f"k{k}: x" for k in range(9)) + "}\n"
MAP_BOMB += "".join(f"a{n}: &a{n} {{{', '.join(f'k{k}: *a{n - 1}' for k in range(9))}}}\n" for n in range(1, 12))
YAML = {
    "empty": ("", "must map names to sources"),
    "list": ("- a\n- b\n", "must map names to sources"),
    "text": ("a.jsonl", "must map names to sources"),
    "cut": ("en: {path: a", "not YAML"),
    "tabs": ("en:\n\tpath: a\n", "not YAML"),
    "two documents": ("en: a\n---\nzh: b\n", "not YAML"),
    "unknown anchor": ("en: *a\n", "not YAML"),
    "zero byte": ("en: a\0b\n", "not YAML"),
    "nested lists": ("[" * 5000, "not YAML"),
    "python object": ("en: !!python/object/apply:os.mknod ['CANARY']\n", "not YAML"),
    "python name": ("en: !!python/name:os.system\n", "not YAML"),
    "python module": ("en: !!python/object/new:os.mknod ['CANARY']\n", "not YAML"),
    "unknown tag": ("en: !env SECRET\n", "not YAML"),
    "bomb of lists": (BOMB, "source a0: must be a path"),
    "bomb of lists as a path": (
        BOMB.replace("a0: &a0", "a0: {path: &a0").replace("x]", "x]}") + "en: {path: *a11}",
        "source",
    ),
    "bomb as a weight": ("x: {path: a, storage_options: {y: 1}, weight: &w [1]}\n", "weight: .* is not a number"),
    "bomb of options": (
        "\n".join(f"{line}" for line in ["en:", "  path: a", "  storage_options:"])
        + "\n"
        + "".join(f"    {line}\n" for line in MAP_BOMB.splitlines()),
        "source en: storage_options: ",
    ),
    "option in itself": ("en: {path: a, storage_options: &o {x: *o}}\n", "source en: storage_options: "),
    "number as an entry": ("en: 3\n", "must be a path"),
    "null as an entry": ("en:\n", "must be a path"),
    "number as a path": ("en: {path: 3}\n", "path: must be a string"),
    "no path": ("en: {language: en}\n", "path is missing"),
    "empty path": ("en: ''\n", "is no path"),
    "unknown field": ("en: {path: a, trust_remote_code: true}\n", "'trust_remote_code' is unknown"),
    "unknown field of a number": ("en: {path: a, 3: 4}\n", "3 is unknown"),
    "target": ("en: {path: a, _target_: os.system}\n", "'_target_' is unknown"),
    "weight in words": ("en: {path: a, weight: much}\n", "weight: 'much' is not a number"),
    "negative weight": ("en: {path: a, weight: -1}\n", "weight: -1.0 is not a number of 0 or more"),
    "weight NaN": ("en: {path: a, weight: .nan}\n", "weight: nan is not a number"),
    "weight infinite": ("en: {path: a, weight: .inf}\n", "weight: inf is not a number"),
    "weight a list": ("en: {path: a, weight: [1]}\n", r"weight: \[1\] is not a number"),
    "weight of 5,000 digits": (f"en: {{path: a, weight: {'9' * 4000}}}\n", "weight: "),
    "name of two lines": ('"a\\nb": 3\n', "a name has a-z"),
    "name in capitals": ("EN: a\n", "a name has a-z"),
    "name of a path": ("../en: a\n", "a name has a-z"),
    "name too long": (f"{'e' * 65}: a\n", "a name has a-z"),
    "name null": ("~: 3\n", "source"),
    "language": ("en: {path: a, language: English}\n", "language: 'English' is no tag"),
    "language false": ("no: {path: a, language: no}\n", "source"),
    "format": ("en: {path: a, format: pickle}\n", "format: 'pickle' is unknown"),
    "sample_by": ("en: {path: a, sample_by: word}\n", "sample_by: 'word' is unknown"),
    "dtype": ("en: {path: a, dtype: object}\n", "dtype: 'object' is unknown"),
    "options a list": ("en: {path: a, storage_options: [1]}\n", "storage_options: must be a mapping"),
    **{
        f"secret {key}": (f"en: {{path: a, storage_options: {{{key}: hunter2}}}}\n", "looks like a secret")
        for key in ("key", "secret", "token", "password", "aws_secret_access_key", "Authorization", "SESSION_TOKEN")
    },
    "secret inside": ("en: {path: a, storage_options: {a: {b: {token: hunter2}}}}\n", "looks like a secret"),
    "secret in a list": ("en: {path: a, storage_options: {a: [{token: hunter2}]}}\n", "looks like a secret"),
    "secret in an address": ("en: {path: 'https://me:hunter2@127.0.0.1/a.jsonl'}\n", "looks like a secret"),
}


def _yaml(content: str) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        path = bench.write("sources.yaml", content.replace("CANARY", str(bench.canary)).encode())
        return lambda: read_sources_file(path)

    return make


def _command(main: Callable[[], int], arguments: str) -> Callable[[Bench], Attempt]:
    """A command line; SOURCE, TOKENIZER, OUT, CORPUS and FOLDER are replaced."""

    def make(bench: Bench) -> Attempt:
        source = bench.write("en.jsonl", GOOD_LINES)
        words = {
            "SOURCE": source,
            "TOKENIZER": TOKENIZER,
            "OUT": bench.folder / "out",
            "CORPUS": bench.corpus,
            "FOLDER": bench.folder,
        }
        given = [arguments_with(words, argument) for argument in arguments.split()]
        bench.patch.setattr(sys, "argv", ["command", *given])

        def attempt() -> None:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
                assert main() == EXIT_DATA_ERROR
            line = errors.getvalue().splitlines()[-1]  # after what it reports of its progress
            assert "Traceback" not in errors.getvalue()
            raise DataError(line)

        return attempt

    return make


def arguments_with(words: dict[str, Path], argument: str) -> str:
    """`argument` with paths in place of words; `EMPTY` is nothing, `ZERO` a zero byte."""
    for word, path in words.items():
        argument = argument.replace(word, str(path))
    return argument.replace("EMPTY", "").replace("ZERO", "\0")


PREPARE = "--source SOURCE --tokenizer TOKENIZER --out OUT"
COMMANDS: dict[str, tuple[Callable[[], int], list[tuple[str, str]]]] = {
    "prepare": (
        prepare_command.main,
        [
            ("--tokenizer TOKENIZER --out OUT", "error: no sources given"),
            (f"{PREPARE} --source SOURCE", "source en: is given 2 times"),
            (f"{PREPARE} --source de=SOURCE", "belongs to sources de and en"),
            (f"{PREPARE} --source en=", "error: "),
            (f"{PREPARE} --source EMPTY", "error: "),
            (f"{PREPARE} --source de=ZERO", "is no path"),
            (f"{PREPARE} --source de=SOURCE,format=x", "format: 'x' is unknown"),
            (f"{PREPARE} --source de=SOURCE,weight=x", "weight: 'x' is not a number"),
            (f"{PREPARE} --source de=SOURCE,language=../x", "is no tag"),
            (f"{PREPARE} --sources FOLDER", "is a folder, a file is needed"),
            (f"{PREPARE} --sources FOLDER/none", "none: no such file"),
            (f"{PREPARE} --workers 0", "workers: 0 is too small"),
            (f"{PREPARE} --workers -3", "workers: -3 is too small"),
            (f"{PREPARE} --seed -1", "seed: -1 is out of range"),
            (f"{PREPARE} --seed 9223372036854775808", "seed: 9223372036854775808 is out of range"),
            *(
                (f"{PREPARE} --held-out {value}", "held.out: ")
                for value in ("1", "-0.1", "x", "1/0", "nan", "inf", "2")
            ),
            *((f"{PREPARE} --max-bad-rows {value}", "max_bad_rows: ") for value in ("-1", "1.5", "nan", "inf")),
            *((f"{PREPARE} --shard-tokens {value}", "shard_tokens: ") for value in ("0", "-1")),
            (f"{PREPARE} --min-chars -1", "min_chars: -1 is negative"),
            (f"{PREPARE} --max-chars 0", "max_chars: 0 leaves nothing"),
            (f"{PREPARE} --min-chars 9 --max-chars 8", "max_chars: 8 leaves nothing"),
            (f"{PREPARE} --min-chars 999999", "no documents are left"),
            (
                "--source SOURCE,language=xx --tokenizer TOKENIZER --out OUT --check-language",
                "no script is known for xx",
            ),
            ("--source SOURCE --tokenizer FOLDER/none --out OUT", "none: no such file"),
            ("--source SOURCE --tokenizer FOLDER --out OUT", "is a folder"),
            ("--source SOURCE --tokenizer SOURCE --out OUT", r"en\.jsonl: not a tokenizer"),
            ("--source SOURCE --tokenizer TOKENIZER --out FOLDER", "exists already"),
            ("--source SOURCE --tokenizer TOKENIZER --out SOURCE", "exists already"),
            ("--source SOURCE --tokenizer TOKENIZER --out SOURCE/out", "error: .*: (Not a directory|File exists)"),
            ("--source SOURCE --tokenizer TOKENIZER --out /proc/out", "error: .*out"),
            ("--source SOURCE --tokenizer TOKENIZER --out /dev/null", "exists already"),
            ("--source FOLDER/*.txt --tokenizer TOKENIZER --out OUT", "no parquet, jsonl, text or arrow files"),
        ],
    ),
    "inspect": (
        inspect.main,
        [
            ("FOLDER/none stats", "none: no such corpus folder"),
            ("FOLDER stats", "manifest.json: no such file"),
            ("SOURCE verify", "no such corpus folder"),
            ("CORPUS peek -- -1", "-1 is out of range"),
            ("CORPUS peek 0 --seq-len 0", "seq_len: 0 is too small"),
            ("CORPUS peek 0 --seq-len 100000000", "error: "),
            ("CORPUS peek 0 --weight en", "--weight: write SOURCE=SHARE"),
            ("CORPUS peek 0 --weight fr=1", "fr"),
            ("CORPUS peek 0 --weight en=nan", "weights.en: "),
            ("CORPUS peek 0 --weight en=-1", "weights.en: -1 is negative"),
            ("CORPUS peek 0 --weight en=0", "at least one must be above 0"),
            ("CORPUS peek 0 --weight en=1e999999", "weights"),
            ("CORPUS peek 0 --weight en=0.123456789 --weight zh=1", "round them"),
            ("CORPUS peek 99999999999999999999", "99999999999999999999 is out of range"),
            ("FOLDER replay 1", "config.yaml: no such file"),
            ("FOLDER/none replay 1", "config.yaml: no such file"),
            ("CORPUS diff FOLDER/none", "no such corpus folder"),
            ("CORPUS diff FOLDER", "manifest.json: no such file"),
        ],
    ),
    "tokenizer": (
        tokenizer_command.main,
        [
            ("inspect FOLDER/none", "none: no such file"),
            ("inspect FOLDER", "is a folder"),
            ("inspect SOURCE", r"en\.jsonl: not a tokenizer"),
            ("inspect TOKENIZER --against SOURCE", r"en\.jsonl: not a tokenizer"),
            ("inspect TOKENIZER --tiktoken SOURCE", r"en\.jsonl:1: must be a token in base64"),
            ("inspect TOKENIZER --source FOLDER/none.jsonl", "none.jsonl: no such file"),
            ("import FOLDER/none --out OUT", "none: no such file"),
            ("import TOKENIZER --out OUT --bos <s>", "--bos: <s> is no special token"),
            ("import TOKENIZER --out FOLDER", "error: "),
            ("import TOKENIZER --out SOURCE/out", "error: "),
            ("train --source SOURCE --vocab-size 0 --out OUT", "vocab.size: "),
            ("train --source SOURCE --vocab-size -5 --out OUT", "vocab.size: "),
            ("train --source SOURCE --vocab-size 99999999999 --out OUT", "vocab-size: 99999999999 is too large"),
            ("train --source SOURCE --vocab-size 300 --out OUT --max-bytes 0", "error: "),
            ("train --source SOURCE --vocab-size 300 --out OUT --share en", "--share: 'en' must be LANGUAGE=NUMBER"),
            ("train --source SOURCE --vocab-size 300 --out OUT --share en=0", "--share: 'en=0' must be"),
            ("train --source SOURCE --vocab-size 300 --out OUT --share fr=1", "--share: shares of fr for text in en"),
            ("train --source FOLDER/no.jsonl --vocab-size 300 --out OUT", "no such file"),
        ],
    ),
}
RUNS = {
    "empty": "",
    "list": "[]",
    "data a list": "data: []\ntrain: {}\n",
    "python object": "data: !!python/object/apply:os.mknod ['CANARY']\n",
    "nested lists": "[" * 5000,
    "cut": "data: {mode: tokens",
    "no mode": "data: {}\ntrain: {global_batch_size: 1, batch_ramp: []}\n",
    "ramp a number": "data: {mode: tokens}\ntrain: {global_batch_size: 1, batch_ramp: 3}\n",
    "ramp of numbers": "data: {mode: tokens}\ntrain: {global_batch_size: 1, batch_ramp: [3]}\n",
    "size in quotes": "data: {mode: tokens}\ntrain: {global_batch_size: '1', batch_ramp: []}\n",
    "sources a list": "data: {mode: text, sources: [a]}\ntrain: {global_batch_size: 1, batch_ramp: []}\n",
    "prepared a number": "data: {mode: tokens, prepared: 3}\ntrain: {global_batch_size: 1, batch_ramp: []}\n",
}


def _run(content: bytes) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        bench.write("config.yaml", content.replace(b"CANARY", str(bench.canary).encode()))
        return _command(inspect.main, "FOLDER replay 1")(bench)

    return make


def _loaded(content: str) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        path = bench.write("config.yaml", content.replace("CANARY", str(bench.canary)).encode())
        return lambda: load_config(path)

    return make


def _composed(override: str) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        return lambda: compose([override])

    return make


OVERRIDES = {
    "data.mode=pickle": "data.mode must be one of",
    "data.mode=null": "data.mode",
    "data.seq_len=0": "data.seq_len",
    "data.seq_len=1": "data.seq_len",
    "data.seq_len=-5": "data.seq_len",
    "data.seq_len=1.5": "data.seq_len",
    "data.seq_len=many": "data.seq_len",
    "data.seq_len=9999999999": "data.seq_len",
    "data.seq_len=null": "data.seq_len",
    "data.workers=-1": "data.workers",
    "data.workers=100000": "data.workers",
    "data.prefetch=0": "data.prefetch",
    "data.prefetch=1000000": "data.prefetch",
    "data.streams=0": "data.streams",
    "data.streams=1000000000": "data.streams",
    "data.validation_tokens=-1": "data.validation_tokens",
    "data.tokenizer=[a]": "data.tokenizer",
    "data.prepared={a: b}": "data.prepared",
    "data.sources=3": "data.sources",
    "data.sources=[a]": "data.sources",
    "+data.sources.x={_target_: os.system}": "data.sources.x",
    "+data.sources.x={path: a, _target_: os.system}": "data.sources.x.*_target_",
    "+data._target_=os.system": "_target_",
    "+data.sources.x={path: [a]}": "data.sources.x",
    "+data.sources.x=[1]": "data.sources.x",
    "+data.sources.x={path: a, weight: nan}": "data.sources.x.weight",
    "+data.sources.x={path: a, weight: -1}": "data.sources.x.weight",
    "+data.weights.en=nan": "data.weights.en",
    "+data.weights.en=inf": "data.weights.en",
    "+data.weights.en=x": "data.weights.en",
    "+data.weights.en=0": "data.weights",
    "data.stages=3": "data.stages",
    "data.stages=[3]": "data.stages",
    "data.stages=[{start_step: 0, weights: {en: 1}}]": "data.stages",
    "data.stages=[{start_step: 5}, {start_step: 5}]": "data.stages",
    "data.skip_ranges=3": "data.skip_ranges",
    "data.skip_ranges=[3]": "data.skip_ranges",
    "data.skip_ranges=[[5, 3]]": "data.skip_ranges",
    "data.skip_ranges=[[-5, 3]]": "data.skip_ranges",
    "data.skip_ranges=[[0, 3], [2, 9]]": "data.skip_ranges",
    "data.packing=first_fit": "data.packing",
    "data.shuffle=random": "data.shuffle",
    "data.accept_change=perhaps": "data.accept_change",
    "data.seq_len=${data.seq_len}": "data.seq_len|nterpolation",
    "data.tokenizer=${no.such.key}": "no.such.key|tokenizer",
    "data.tokenizer=${python:1}": "python",
    "data.unknown=1": "unknown key data.unknown",
    "data=../../etc": "data",
}

CASES: dict[str, Case] = {
    **{f"yaml: {name}": Refused(_yaml(content), reason) for name, (content, reason) in YAML.items()},
    **{
        f"data.{name} {arguments}": Refused(_command(main, arguments), f"^error: .*{reason.removeprefix('error: ')}")
        for name, (main, cases) in COMMANDS.items()
        for arguments, reason in cases
    },
    **{
        f"run folder: {name}": Refused(_run(content.encode()), r"config\.yaml: |prepared|error: ")
        for name, content in RUNS.items()
    },
    "run folder: invalid UTF-8": Refused(_run(b"data: \xff\n"), r"config\.yaml: "),
    "run folder: bomb": Refused(_run((BOMB + "data: {mode: *a11}\n").encode()), r"config\.yaml: "),
    "saved configuration: python object": Refused(
        _loaded("data: !!python/object/apply:os.mknod ['CANARY']\n"), "config"
    ),
    "saved configuration: unknown key": Refused(_loaded("data: {_target_: os.system}\n"), "_target_"),
    "saved configuration: cut": Refused(_loaded("data: {mode: tokens"), r"config\.yaml: "),
    "saved configuration: list": Refused(_loaded("[1]"), r"config\.yaml: "),
    "saved configuration: nested lists": Refused(_loaded("[" * 5000), r"config\.yaml: "),
    **{f"configuration: {key}": Refused(_composed(key), reason) for key, reason in OVERRIDES.items()},
}
