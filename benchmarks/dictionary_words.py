"""How much of a run's sample completions a dictionary knows: `python -m benchmarks.dictionary_words RUN_FOLDER`.

English: words that pyspellchecker's list has. Chinese: characters in words of two or more characters of jieba's
dictionary. Needs the `eval` extra; the report itself counts against the training text, so that it needs none.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import re
from pathlib import Path
from typing import Any


def english(text: str) -> tuple[int, int]:
    """Words, and how many of them the dictionary has."""
    spelling = _package("spellchecker").SpellChecker(language="en")
    found = [word.lower() for word in re.findall(r"[A-Za-z]+", text)]
    return len(found), sum(word in spelling for word in found)


def chinese(text: str) -> tuple[int, int]:
    """Characters, and how many of them lie in dictionary words of two or more characters."""
    jieba = _package("jieba")
    jieba.setLogLevel(logging.ERROR)
    runs = re.findall(r"[\u4e00-\u9fff]+", text)
    words = [word for run in runs for word in jieba.cut(run, HMM=False)]
    known = [word for word in words if len(word) > 1 and jieba.dt.FREQ.get(word, 0) > 0]
    return sum(map(len, runs)), sum(map(len, known))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SystemExit(f"error: {name} is not installed: pip install '.[eval]'") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    file = parser.parse_args().run / "samples.json"
    if not file.is_file():
        raise SystemExit(f"error: {file}: no such file")
    samples = json.loads(file.read_text(encoding="utf-8"))
    for language, count, unit in (("en", english, "words"), ("zh", chinese, "characters in words")):
        totals = [count(row["completion"]) for row in samples if row["language"] == language]
        everything, known = (sum(column) for column in zip(*totals, strict=True))
        print(f"{language}: {known} of {everything} {unit} in the dictionary ({known / max(everything, 1):.0%})")


if __name__ == "__main__":
    main()
