"""Which documents are left out although their rows are fine: too short, too long, or in another script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from data.errors import DataError

MIN_SHARE = 0.5
CODES = 0x33480  # letters end here

# First and last code point of the blocks that hold a script's letters.
SCRIPTS = {
    "latin": ((0x41, 0x24F), (0x250, 0x2AF), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xFF21, 0xFF5A)),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "armenian": ((0x530, 0x58F),),
    "hebrew": ((0x590, 0x5FF), (0xFB1D, 0xFB4F)),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "devanagari": ((0x900, 0x97F), (0xA8E0, 0xA8FF)),
    "bengali": ((0x980, 0x9FF),),
    "tamil": ((0xB80, 0xBFF),),
    "telugu": ((0xC00, 0xC7F),),
    "thai": ((0xE00, 0xE7F),),
    "georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF)),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7FF)),
    "kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D)),
    "han": ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3347F)),
}
LANGUAGES = {
    "latin": "af ca cs cy da de en es et eu fi fr ga gl hr hu id is it la lt lv ms mt nl no pl pt ro sk sl sq sv sw tl "
    "tr vi",
    "greek": "el",
    "cyrillic": "be bg kk ky mk mn ru tg uk",
    "armenian": "hy",
    "hebrew": "he yi",
    "arabic": "ar fa ps ur",
    "devanagari": "hi mr ne sa",
    "bengali": "as bn",
    "tamil": "ta",
    "telugu": "te",
    "thai": "th",
    "georgian": "ka",
    "hangul han": "ko",
    "kana han": "ja",
    "han": "lzh yue zh",
}


@dataclass(frozen=True)
class Filters:
    """Limits in characters, both allowed themselves, and whether at least half of a document's letters must be of the
    script its language is written in.
    """

    min_chars: int = 0
    max_chars: int | None = None
    check_language: bool = False

    def __post_init__(self) -> None:
        if self.min_chars < 0:
            raise DataError(f"min_chars: {self.min_chars} is negative")
        if self.max_chars is not None and self.max_chars < max(self.min_chars, 1):
            raise DataError(f"max_chars: {self.max_chars} leaves nothing, min_chars is {self.min_chars}")

    def reason(self, text: str, language: str) -> str | None:
        """Why `text` is left out, or None. DataError: the check is on and the language's script is not known."""
        if len(text) < self.min_chars:
            return "too short"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "too long"
        if self.check_language and script_share(text, scripts_of(language)) < MIN_SHARE:
            return "another script"
        return None


@cache
def scripts_of(language: str) -> tuple[str, ...]:
    """Scripts that a language is written in. DataError: not known here."""
    primary = language.partition("-")[0]
    for scripts, languages in LANGUAGES.items():
        if primary in languages.split():
            return tuple(scripts.split())
    raise DataError(f"check_language: no script is known for {language}")


def script_share(text: str, scripts: Sequence[str]) -> float:
    """Share of the letters of `text` that belong to `scripts`; 0 where it has no letters."""
    kinds = _script_numbers()[np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), CODES - 1)]
    letters = np.count_nonzero(kinds)
    wanted = [1 + list(SCRIPTS).index(script) for script in scripts]
    return float(np.isin(kinds, wanted).sum() / letters) if letters else 0.0


@cache
def _script_numbers() -> np.ndarray:
    """For every code point 0 where it is no letter, 1.. for the scripts in order, 255 for letters of others."""
    numbers = np.fromiter((255 * chr(code).isalpha() for code in range(CODES)), np.uint8, CODES)
    for number, blocks in enumerate(SCRIPTS.values(), start=1):
        for first, last in blocks:
            part = numbers[first : last + 1]
            part[part != 0] = number
    numbers[CODES - 1] = 0
    return numbers
