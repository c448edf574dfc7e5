"""Text as hashes of its units and n-grams, for finding copies: what deduplication and decontamination compare.

A unit is a character of a script written without spaces (Han, kana, Hangul, ...) or a run of other letters and
digits; case, width (NFKC), spaces and punctuation make no difference. Everything is computed on arrays of code points.
"""

import unicodedata
from functools import cache

import numpy as np

NOTHING, IN_WORD, ALONE = 0, 1, 2
FIRST_ALONE = 0x2E80  # CJK radicals; letters above it belong to scripts without spaces, with few exceptions
PIECE = 2**20  # characters hashed at once, which bounds the memory; a word across two pieces becomes two
ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


@cache
def _kinds() -> np.ndarray:
    """What every code point is: `NOTHING` (space, punctuation, symbol), `IN_WORD` or `ALONE`."""
    kinds = np.fromiter((chr(code).isalnum() for code in range(0x110000)), np.uint8, 0x110000)
    kinds[FIRST_ALONE:] *= ALONE
    return kinds


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_units(text: str) -> np.ndarray:
    """Return a uint64 for every unit of the text, in order; none where there is no letter and no digit."""
    if len(text) > PIECE:
        return np.concatenate([hash_units(text[start : start + PIECE]) for start in range(0, len(text), PIECE)])
    text = unicodedata.normalize("NFKC", text).casefold()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    kinds = _kinds()[codes]
    follows = np.zeros(len(kinds), bool)
    follows[1:] = kinds[:-1] == IN_WORD
    starts = np.flatnonzero((kinds == ALONE) | (kinds == IN_WORD) & ~follows)
    if not starts.size:
        return np.empty(0, np.uint64)
    lengths = np.diff(starts, append=len(codes))
    places = np.arange(starts[0], len(codes)) - np.repeat(starts, lengths)
    letters = _mix(codes[starts[0] :] + ODD * places.astype(np.uint64))
    letters[kinds[starts[0] :] == NOTHING] = 0
    return np.add.reduceat(letters, starts - starts[0])


def hash_ngrams(units: np.ndarray, n: int) -> np.ndarray:
    """Return a uint64 for every n units that follow each other, or one for all units where these are fewer than n."""
    n = min(n, len(units))
    count = len(units) - n + 1 if n else 0
    grams = np.zeros(count, np.uint64)
    for start in range(n):
        grams = grams * ODD + units[start : start + count]
    return _mix(grams)
