"""Measures of cleaning profiles: operators that return a number or a label for a text.

Every measure is a function of the text and of keyword parameters, which a profile sets (data/profiles/*.yaml); no
threshold is in this file. A new one is one function here with `@measure`; its first docstring sentence appears in the
data report.

The measures of repetition, special characters and words follow data-juicer
(https://github.com/datajuicer/data-juicer), for which BigScience and Steel-LLM chose their thresholds. The share of
duplicate lines follows Gopher (https://arxiv.org/abs/2112.11446, table A1).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from functools import cache, lru_cache

import numpy as np

MEASURES: dict[str, Callable[..., float | str]] = {}


def measure(function: Callable[..., float | str]) -> Callable[..., float | str]:
    MEASURES[function.__name__] = function
    return function


class Kind(IntEnum):
    """Kinds of characters."""

    SPACE, SYMBOL, DIGIT, LETTER, ACCENTED_LETTER, HAN, KANA_OR_HANGUL, GREEK, FOREIGN_LETTER = range(9)


def _kind(code: int) -> Kind:
    """Return the kind of a code point. LETTER is A to Z, also full-width; FOREIGN_LETTER is of any other script."""
    character = chr(code)
    category = unicodedata.category(character)[0]
    # 々 and 〇; extension A; the basic block; compatibility ideographs.
    if code in (0x3005, 0x3007) or 0x3400 <= code < 0x4DC0 or 0x4E00 <= code < 0xA000 or 0xF900 <= code < 0xFB00:
        return Kind.HAN
    if category == "L":
        name = unicodedata.name(character, "").removeprefix("HALFWIDTH ")
        if name.startswith(("HIRAGANA", "KATAKANA", "HANGUL")):
            return Kind.KANA_OR_HANGUL
        if name.startswith("GREEK"):
            return Kind.GREEK
        if name.partition("LATIN ")[0] not in ("", "FULLWIDTH "):
            return Kind.FOREIGN_LETTER
        return Kind.LETTER if code < 0x80 or code >= 0xFF00 else Kind.ACCENTED_LETTER
    if category == "N":
        return Kind.DIGIT
    if category == "Z" or character in "\n\t":
        return Kind.SPACE
    return Kind.SYMBOL


@cache
def _kinds() -> np.ndarray:
    """Return the kind of every code point of the planes 0 to 3, and one entry more for the planes above."""
    planes_0_and_1 = np.array([_kind(code) for code in range(0x20000)])
    planes_2_and_3 = np.full(0x20000, Kind.HAN)
    return np.concatenate([planes_0_and_1, planes_2_and_3, [Kind.SYMBOL]]).astype(np.uint8)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@lru_cache(maxsize=1)
def _kind_counts(text: str) -> list[int]:
    """Return how many characters of each kind the text has. Several measures of one text use it, hence the cache."""
    kinds = _kinds()
    codes = np.minimum(_codes(text), len(kinds) - 1)
    return np.bincount(kinds[codes], minlength=len(Kind)).tolist()


def _share(text: str, *kinds: Kind) -> float:
    counts = _kind_counts(text)
    return sum(counts[kind] for kind in kinds) / max(len(text), 1)


@measure
def text_length(text: str) -> float:
    """Number of characters."""
    return len(text)


@measure
def alphanumeric_share(text: str) -> float:
    """Share of letters, Han and digits among the characters."""
    return _share(text, *(set(Kind) - {Kind.SPACE, Kind.SYMBOL}))


@measure
def special_share(text: str) -> float:
    """Share of punctuation, symbols, digits and spaces among the characters."""
    return _share(text, Kind.SPACE, Kind.SYMBOL, Kind.DIGIT)


PADDING = re.compile(r"[-=_|+:]{2,}")  # the lines of a table


@measure
def symbol_share(text: str) -> float:
    """Share of punctuation, symbols and digits among the characters except spaces; a line of a table counts as one."""
    counts = _kind_counts(PADDING.sub("-", text))
    symbols = counts[Kind.SYMBOL] + counts[Kind.DIGIT]
    return symbols / max(sum(counts) - counts[Kind.SPACE], 1)


@measure
def han_share(text: str) -> float:
    """Share of Han among the characters except spaces."""
    counts = _kind_counts(text)
    return counts[Kind.HAN] / max(len(text) - counts[Kind.SPACE], 1)


# Frequent words that tell Latin languages apart, without letters that stand alone.
COMMON_WORDS = {  # `sin` is not among them: it is in formulas
    "en": "the of and to in is that it for was on are as with at be this have from or by not but you we he they"
    " his her which an their has had its can will if there would what all when more one so about said who"
    " do them into than",
    "de": "der die das und ist nicht ein eine einen zu den mit von auf im dem sich des auch es an werden aus er"
    " hat dass sie nach wird bei einer um sind noch wie wir ich aber oder war haben kann durch wenn nur"
    " vom zum",
    "fr": "le la les des et est un une du que qui dans pour pas sur au avec ce il ne se sont par plus son elle"
    " nous vous cette mais ou je on leur tout aux ont comme bien",
    "es": "el la los las de que en un una es por con no para del se lo como su al sus pero este esta son entre"
    " cuando muy sobre ser todo desde nos hay donde quien",
    "it": "il di che la per un non sono in una del della con si le da al dei gli nel alla anche come questo ma"
    " era delle lo ha nella sua suo dal essere hanno",
    "pt": "que de do da em um para com uma os no se na por mais as dos como mas foi ao ele das tem seu sua ou"
    " ser quando muito nos ela entre depois",
    "nl": "de het een en van is dat niet op te zijn voor met aan er in ook als bij maar om uit door over naar"
    " wordt heeft deze dit hij zij werd kan nog worden",
    "id": "yang dan di dengan untuk ini itu dari dalam tidak akan pada adalah ke juga saya oleh atau ada karena"
    " sebagai telah bisa mereka kami kita dapat",
    "sv": "och att det som en av med den till inte har om ett var men sig han hon vi kan jag efter vid mot ut"
    " over skulle",
    "pl": "nie na do jest to ale jak po co tak za od dla przez tylko jego ich czy ten tego oraz pod jako ma",
    "sw": "ya wa na kwa ni katika la za cha kuwa hii huo yake wake kama au lakini hiyo watu",
    "tl": "ang ng sa na mga ay at ito ko hindi para may isang siya kung niya nila din",
    "la": "et in est non ad cum ut qui quod sed quae ex per ab enim atque aut esse quam sunt etiam",
    "vi": "va cua la co cho mot khong nguoi trong duoc nhung voi nhu cac khi da nay",
}
LANGUAGES_OF: dict[str, list[str]] = {}  # word -> languages in which it is frequent
for _name, _words in COMMON_WORDS.items():
    for _word in set(_words.split()):
        LANGUAGES_OF.setdefault(_word, []).append(_name)
LATIN_WORD = re.compile("[a-z]{2,}")
LATIN_SAMPLE = 20_000  # characters


def _is_english(text: str, min_share: float) -> bool:
    """Return whether no other Latin language has more frequent words in the text than English.

    `min_share` is the least share of English ones among the words, unless frequent words of any language are few.
    """
    words = LATIN_WORD.findall(text[:LATIN_SAMPLE].lower())
    counts = Counter(name for word in words for name in LANGUAGES_OF.get(word, ()))
    most = max(counts.values(), default=0)
    return counts["en"] >= max(most, min_share * len(words)) or min_share == 0 and most < 0.1 * len(words)


@measure
def language(text: str, *, min_han: float, max_accented: float) -> str:
    """`zh`, `en` or `other`, by the scripts of the letters and, for Latin letters, by frequent words.

    Greek letters do not count: they are in formulas. `zh` if the share of Han is at least `min_han`, and there are
    less than half as many kana and Hangul, and less than twice as many letters of other scripts (Cyrillic, Thai, ...).
    Else `en` if at least 90% are A to Z, and no other Latin language has more of its frequent words there; if more
    than `max_accented` have accents, frequent words of English must also be a fifth of all. Else `other`.
    """
    counts = _kind_counts(text)
    han, foreign, accented = counts[Kind.HAN], counts[Kind.FOREIGN_LETTER], counts[Kind.ACCENTED_LETTER]
    kana = counts[Kind.KANA_OR_HANGUL]
    letters = max(han + kana + foreign + accented + counts[Kind.LETTER], 1)
    if han / letters >= min_han and kana < han / 2 and foreign < 2 * han:
        return "zh"
    min_share = 0 if accented / letters <= max_accented else 0.2
    if counts[Kind.LETTER] >= 0.9 * letters and _is_english(text, min_share):
        return "en"
    return "other"


@measure
def average_line_length(text: str) -> float:
    """Average number of characters per line."""
    return len(text) / (text.count("\n") + 1)


@measure
def max_line_length(text: str) -> float:
    """Number of characters of the longest line."""
    return max(map(len, text.split("\n")))


SENTENCE_END = re.compile(r"[。！？；!?…]|[.;](?= |$)")


@measure
def prose_share(text: str) -> float:
    """Share of the characters in lines that contain the end of a sentence, unlike menus, lists and captions."""
    prose = sum(len(line) for line in text.split("\n") if SENTENCE_END.search(line))
    return prose / max(len(text) - text.count("\n"), 1)


@measure
def duplicate_line_share(text: str) -> float:
    """Share of the characters in lines that repeat an earlier line."""
    seen = set()
    repeated = 0
    for line in text.split("\n"):
        line = line.strip()
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / max(len(text) - text.count("\n"), 1)


@measure
def advert_density(text: str, *, patterns: list[str]) -> float:
    """Number of matches of the regular expressions `patterns` per 1,000 characters."""
    return 1000 * sum(len(re.findall(pattern, text)) for pattern in patterns) / max(len(text), 1)


@measure
def character_repetition(text: str, *, n: int) -> float:
    """Share of the most frequent repeated n-grams among all n-grams of `n` characters.

    This is the rule of data-juicer: only the most frequent repeated n-grams count, as many as the square root of the
    number of different n-grams. So a text that repeats one sentence scores low.
    """
    counts = _ngram_counts(_codes(text), n)
    repeated = np.sort(counts[counts > 1])[::-1]
    return float(repeated[: int(len(counts) ** 0.5)].sum() / max(counts.sum(), 1))


@measure
def repeated_share(text: str, *, n: int, times: int = 2) -> float:
    """Share of the n-grams of `n` characters that occur at least `times` times."""
    return _repeated_share(_ngram_counts(_codes(text), n), times)


@measure
def word_count(text: str) -> float:
    """Number of words: every Han character, and every run of other letters and digits."""
    return len(_words(text))


@measure
def word_repetition(text: str, *, n: int) -> float:
    """Share of the n-grams of `n` words that occur more than once."""
    words = _words(text)
    return _repeated_share(_ngram_counts(np.fromiter(map(hash, words), np.int64, len(words)), n))


WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")


@lru_cache(maxsize=1)
def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _repeated_share(counts: np.ndarray, times: int = 2) -> float:
    return float(counts[counts >= times].sum() / max(counts.sum(), 1))


def _ngram_counts(values: np.ndarray, n: int) -> np.ndarray:
    """Return how often each different n-gram of the values occurs. A polynomial 64-bit hash identifies an n-gram."""
    size = max(len(values) - n + 1, 0)
    hashes = np.zeros(size, np.uint64)
    for i in range(n if size else 0):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + values[i : i + size].astype(np.uint64)
    return np.unique(hashes, return_counts=True)[1]
