"""Hash the units and n-grams of a text: what deduplication and decontamination compare.

A unit is one character of a script without spaces (Han, kana, Hangul, ...), or a run of other letters and digits.
Case, width (NFKC), spaces and punctuation make no difference, and neither do variants of a Chinese character:
Traditional characters, as OpenCC converts each of them, of Taiwan and Hong Kong too. All computations are on arrays of
code points. If the hashes change, so must the name of the index of `deduplicate`, which stores hashes.
"""

import unicodedata
from functools import cache

import numpy as np
import opencc

NOTHING, IN_WORD, ALONE = 0, 1, 2  # kinds of code points
FIRST_ALONE = 0x2E80  # CJK radicals; with few exceptions, letters from here on belong to scripts without spaces
PIECE = 2**20  # characters hashed at once, which bounds the memory; a word across two pieces becomes two words
HAN = np.r_[0x3400:0xA000, 0x20000:0x32400]  # with all extensions of Unicode 16
TO_SIMPLIFIED = ("t2s", "tw2s", "hk2s")  # configurations of OpenCC
ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


@cache
def _kinds() -> np.ndarray:
    """Return the kind of each code point: `NOTHING` (space, punctuation, symbol), `IN_WORD` or `ALONE`."""
    kinds = np.fromiter((chr(code).isalnum() for code in range(0x110000)), np.uint8, 0x110000)
    kinds[FIRST_ALONE:] *= ALONE
    return kinds


@cache
def _variants() -> np.ndarray:
    """Return the code point that stands for each code point up to the last of `HAN` and for all its variants."""
    table = np.arange(HAN[-1] + 1, dtype=np.uint32)
    for config in TO_SIMPLIFIED:
        characters = "\n".join(map(chr, table[HAN]))  # one by one, so the words they occur in do not matter
        table[HAN] = [ord(character) for character in opencc.OpenCC(config).convert(characters).split("\n")]
    # A conversion may end at a character that another one converts: 麼 becomes 么, and 么 becomes 幺.
    while (table != table[table]).any():
        table = table[table]
    return table


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix the bits of each value with the finalizer of SplitMix64: every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_units(text: str) -> np.ndarray:
    """Return a uint64 for each unit of the text, in order; an empty array if it has no letter and no digit."""
    if len(text) > PIECE:
        return np.concatenate([hash_units(text[start : start + PIECE]) for start in range(0, len(text), PIECE)])
    text = unicodedata.normalize("NFKC", text).casefold()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    variants = _variants()
    codes = np.where(codes < len(variants), variants[np.minimum(codes, len(variants) - 1)], codes)

    # A unit starts at every code point that stands alone, and at the first letter of every word.
    kinds = _kinds()[codes]
    follows = np.zeros(len(kinds), bool)
    follows[1:] = kinds[:-1] == IN_WORD
    starts = np.flatnonzero((kinds == ALONE) | (kinds == IN_WORD) & ~follows)
    if not starts.size:
        return np.empty(0, np.uint64)

    # The hash of a unit is the sum of the hashes of its letters, each mixed with its position in the unit.
    lengths = np.diff(starts, append=len(codes))
    positions = np.arange(starts[0], len(codes)) - np.repeat(starts, lengths)
    letters = _mix(codes[starts[0] :] + ODD * positions.astype(np.uint64))
    letters[kinds[starts[0] :] == NOTHING] = 0
    return np.add.reduceat(letters, starts - starts[0])


def hash_ngrams(units: np.ndarray, n: int) -> np.ndarray:
    """Return a uint64 for each run of n consecutive units, or one for all units if there are fewer than n."""
    n = min(n, len(units))
    count = len(units) - n + 1 if n else 0
    grams = np.zeros(count, np.uint64)
    for start in range(n):
        grams = grams * ODD + units[start : start + count]
    return _mix(grams)
