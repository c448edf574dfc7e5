"""Tell documents that fill one template with other names from copies of one document.

Two contracts of one form, or the statutes of two provinces, may share most of their runs of units. They differ in
names: the same words are replaced by the same others again and again. The copies of a document differ otherwise: by
text that is added or cut, by words and numbers that are replaced once. (Texts that differ in many numbers, such as
product pages, share few runs.)
"""

from collections import Counter
from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np

LONGEST = 10_000  # units; comparing such texts takes up to a second, and longer ones are never of one template
LONGEST_NAME = 9  # units
OFTEN = 3  # times that a name is replaced
NAMED = 0.6  # share of the differences that are such replacements
AROUND = 4  # units of a run of five around a difference, which differ with it
WORD = np.uint16(0x8000)


def pack_units(hashes: np.ndarray, is_word: np.ndarray) -> np.ndarray:
    """Return a uint16 for each unit: 15 bits of its hash, and `WORD`. Nothing for more than `LONGEST` units.

    Args:
        hashes, is_word: What `ngrams.find_units` returns.
    """
    if len(hashes) > LONGEST:
        return np.empty(0, np.uint16)
    return (hashes & np.uint64(0x7FFF)).astype(np.uint16) | WORD * is_word.astype(np.uint16)


def differ_in_names(first: np.ndarray, second: np.ndarray) -> bool:
    """Return True if most differences between two texts are names, each replaced by the same other name `OFTEN`.

    Every difference counts as many units as the runs of five that differ because of it.

    Args:
        first, second: Texts as [`pack_units`] returns them. False if one is empty.
    """
    if not len(first) or not len(second):
        return False
    a, b = first.tolist(), second.tolist()
    total = 0
    replaced: Counter[tuple] = Counter()
    matches = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    for before, after in pairwise([(0, 0, 0), *matches]):
        old, new = a[before[0] + before[2] : after[0]], b[before[1] + before[2] : after[1]]
        length = max(len(old), len(new))
        if not length:
            continue
        total += length + AROUND
        if old and new and length <= LONGEST_NAME and (length > 1 or old[0] & new[0] & WORD):
            replaced[tuple(old), tuple(new)] += 1
    named = sum(times * (max(len(old), len(new)) + AROUND) for (old, new), times in replaced.items() if times >= OFTEN)
    return named > NAMED * total
