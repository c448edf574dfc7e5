"""What cleaning can do to one text: mappers return it changed, measures return a number (or a label) about it.

Every operator is a function of the text and of keyword parameters, which a profile gives (data/profiles/*.yaml): no
threshold is in here. The measures of repetition, special characters and words follow data-juicer's filters
(https://github.com/datajuicer/data-juicer, which BigScience's and Steel-LLM's thresholds are made for), the share of
duplicate lines Gopher (https://arxiv.org/abs/2112.11446, table A1).

Text may be hostile, so every regular expression here takes time linear in its length, or is bounded. Each begins with
a character and looks behind after it: Python then finds its candidates some ten times as fast.
"""

import re
import unicodedata
from collections.abc import Callable
from enum import IntEnum
from functools import cache, lru_cache

import ftfy
import numpy as np
import opencc

MAPPERS: dict[str, Callable[..., str]] = {}
MEASURES: dict[str, Callable[..., float | str]] = {}


def mapper(function: Callable[..., str]) -> Callable[..., str]:
    MAPPERS[function.__name__] = function
    return function


def measure(function: Callable[..., float | str]) -> Callable[..., float | str]:
    MEASURES[function.__name__] = function
    return function


# --- Mappers: characters and lines ---

CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
MANY_BLANK_LINES = re.compile("\n(?:[ \t\u3000]*\n){3,}")
# ftfy changes nothing that consists of these alone: ASCII, Han, Chinese punctuation, full-width forms, common symbols.
NEEDS_FTFY = re.compile(
    "[^\n\t -~\u4e00-\u9fff\u3000-\u303f\uff01-\uffee“”‘’—–…·•"
    "\u2190-\u21ff\u2460-\u24ff\u25a1-\u27bf\U0001f300-\U0001faff]"
)
FTFY = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, fix_character_width=False, explain=False)
HTML_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
ODD_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # not U+200D, which holds emoji together
SPACES_AT_LINE_END = re.compile("[ \t\u3000](?<![ \t\u3000].)[ \t\u3000]*$", re.MULTILINE)
SPACES_INSIDE_LINE = re.compile(r"[ \t](?<=\S.)[ \t]+(?=\S)")


@mapper
def normalize_lines(text: str) -> str:
    """Return the text with \\n line ends, no control characters, at most two blank lines on end, and bare ends.

    Full-width punctuation and everything else that can be seen stays as it is (no NFC, no NFKC).
    """
    text = CONTROL_CHARACTERS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return MANY_BLANK_LINES.sub("\n\n\n", text).strip()


@mapper
def fix_unicode(text: str, *, unescape_html: bool) -> str:
    """Repair wrongly decoded text, Latin ligatures, line separators, HTML entities; bring the lines repaired to NFC.

    Full-width forms, ideographic spaces and curly quotes stay: ftfy's own defaults would make them ASCII.
    """
    if unescape_html and "&" in text and HTML_ENTITY.search(text):
        text = ftfy.fixes.unescape_html(text)
    if not NEEDS_FTFY.search(text):
        return text
    return "\n".join(ftfy.fix_text(line, FTFY) if NEEDS_FTFY.search(line) else line for line in text.split("\n"))


@mapper
def normalize_spaces(text: str, *, collapse: bool) -> str:
    """Make odd spaces plain, remove invisible ones and those at line ends; `collapse` runs inside a line to one.

    Indentation stays, and so do tabs and the ideographic space, which sets names and columns apart.
    """
    text = INVISIBLE.sub("", ODD_SPACES.sub(" ", text))
    text = SPACES_AT_LINE_END.sub("", text)
    return SPACES_INSIDE_LINE.sub(" ", text) if collapse else text


@mapper
def convert_chinese(text: str, *, config: str) -> str:
    """Convert between the Chinese scripts by an OpenCC configuration, such as `t2s` (traditional to simplified)."""
    return _opencc(config).convert(text)


@cache
def _opencc(config: str) -> opencc.OpenCC:
    return opencc.OpenCC(config)


# --- Mappers: addresses and numbers of people ---

EMAIL = re.compile(r"[A-Za-z0-9](?<![\w.%+-].)[\w.%+-]{0,63}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{2,63})+", re.ASCII)
IP_ADDRESS = re.compile(r"[0-9](?<![0-9A-Za-z.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?::[0-9]{1,5})?(?![0-9A-Za-z]|\.[0-9])")
IPV6_ADDRESS = re.compile(r"[0-9A-Fa-f](?<![0-9A-Za-z:].)[0-9A-Fa-f]{0,3}(?::[0-9A-Fa-f]{1,4}){7}(?![0-9A-Za-z:])")
URL = r"(?:https?://|HTTPS?://|ftp://|www\.)[A-Za-z0-9\-._~:/?#\[\]@!$&'*+,;=%]+"
MARKDOWN_LINK = re.compile(rf"!?\[([^\[\]\n]*)\]\({URL}(?: [^()\n]*)?\)")
LINK = re.compile(rf"{URL}(?<![.,;:!?'\]])")
ALONE = "(?<![0-9A-Za-z._￥¥$€-].)"  # after the first character: what stands before is no part of a number or a price
AMOUNT = r"\s?(?:元|万|亿|美元|港元|日元|欧元|英镑|吨|股|次|公里|平方|千瓦|字节|[%％])"
PHONE = re.compile(
    rf"(?:(?:\+{ALONE}86[- ]?1|8{ALONE}6[- ]?1|1{ALONE})[3-9][0-9]([- ]?)[0-9]{{4}}\1[0-9]{{4}}"  # mobile
    rf"|(?:0{ALONE}[0-9]{{2,3}}[-— ]|[(（]0[0-9]{{2,3}}[)）] ?)[2-8][0-9]{{6,7}}(?:-[0-9]{{1,6}})?"  # landline
    rf"|[48]{ALONE}00-(?:[0-9]{{3}}-?[0-9]{{4}}|[0-9]{{4}}-?[0-9]{{3}})"  # of services
    rf")(?![0-9A-Za-z]|[.,][0-9]|{AMOUNT})"
)
ID_NUMBER = re.compile(
    r"[1-9](?<![0-9A-Za-z].)[0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx]"
    r"(?![0-9A-Za-z])"
)
ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


@mapper
def remove_emails(text: str) -> str:
    """Remove e-mail addresses."""
    return EMAIL.sub("", text) if "@" in text else text


@mapper
def remove_ips(text: str) -> str:
    """Remove IPv6 addresses written in full, and IPv4 ones of seven digits or more: 3.2.1.12 may be a section."""

    def replace(match: re.Match) -> str:
        numbers = match[0].split(":")[0].split(".")
        is_address = all(int(n) < 256 for n in numbers) and len("".join(numbers)) >= 7
        return "" if is_address else match[0]

    text = IP_ADDRESS.sub(replace, text)
    return IPV6_ADDRESS.sub("", text) if text.count(":") >= 7 else text


@mapper
def remove_links(text: str) -> str:
    """Remove links and Markdown's images; of Markdown's links the words stay."""
    if "://" not in text and "www." not in text:
        return text
    text = MARKDOWN_LINK.sub(lambda match: "" if match[0][0] == "!" else match[1], text)
    return LINK.sub("", text)


@mapper
def remove_phone_numbers(text: str) -> str:
    """Remove Chinese mobile, landline and service numbers, unless a currency or unit makes them an amount."""
    return PHONE.sub("", text)


@mapper
def remove_id_numbers(text: str) -> str:
    """Remove Chinese identity numbers: 18 digits with a date of birth and a right checksum (GB 11643-1999)."""

    def replace(match: re.Match) -> str:
        total = sum(weight * int(digit) for weight, digit in zip(ID_WEIGHTS, match[0], strict=False))
        return "" if "10X98765432"[total % 11] == match[0][17].upper() else match[0]

    return ID_NUMBER.sub(replace, text)


# --- Mappers: markup, boilerplate, repeats ---

HTML_HIDDEN = re.compile(r"<!--|<(script|style)\b[^<>]*>", re.IGNORECASE)
HTML_HIDDEN_END = {
    None: re.compile("-->"),
    "script": re.compile("</script>", re.I),
    "style": re.compile("</style>", re.I),
}
HTML_TAG = re.compile(
    r"<(/?)(!doctype|a|abbr|article|b|blockquote|body|br|button|center|code|dd|div|dl|dt|em|font|footer|form|h[1-6]|"
    r"head|header|hr|html|i|iframe|img|input|label|li|link|main|meta|nav|ol|p|pre|script|section|small|span|strong|"
    r"style|sub|sup|table|tbody|td|th|thead|title|tr|u|ul|video)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
HTML_BLOCK = re.compile("article|blockquote|br|d[dlt]|div|h[1-6]|hr|ol|p|pre|section|table|tr|ul")
SENTENCE = re.compile(r"[^。！？!?….]*(?:\.(?! )[^。！？!?….]*)*(?:[。！？!?…]+[”’」』）)]*|\.)?")
SENTENCE_END = re.compile(r"[。！？；!?…]|[.;](?= |$)")
NOT_WORDS = re.compile(r"[\W_]+")
LATEX_MACRO = re.compile(r"\\(?:newcommand\*?\s*\{?|def\s*)(\\[A-Za-z]+)\}?\s*\{([^{}\n]*)\}")
LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
COMMENT_HEADER = re.compile(r"\s*(?:#![^\n]*\n\s*)?(/\*[^*]*\*+(?:[^/*][^*]*\*+)*/|(?:(?://|#|--)[^\n]*(?:\n|\Z))+)")
COPYRIGHT = re.compile(r"copyright|©|\blicen[sc]ed?\b|SPDX|版权所有", re.IGNORECASE)


@mapper
def remove_html(text: str) -> str:
    """Remove HTML's own tags, and what scripts and styles hold; `a < b` and `<T>` stay. Blocks end in a line end."""
    if "<" not in text:
        return text

    def replace(match: re.Match) -> str:
        name = match[2].lower()
        if name == "li":
            return "" if match[1] else "\n* "
        if name in ("td", "th"):
            return " " if match[1] else ""
        return "\n" if HTML_BLOCK.fullmatch(name) else ""

    return HTML_TAG.sub(replace, _remove_hidden_html(text))


def _remove_hidden_html(text: str) -> str:
    """Remove comments, scripts and styles that have an end; each end is looked for once, so that time is linear."""
    kept, done, start, endless = [], 0, 0, set()
    while opening := HTML_HIDDEN.search(text, start):
        start, name = opening.end(), opening[1] and opening[1].lower()
        closing = None if name in endless else HTML_HIDDEN_END[name].search(text, start)
        if closing:
            kept.append(text[done : opening.start()])
            done = start = closing.end()
        else:
            endless.add(name)
    return "".join(kept) + text[done:]


@mapper
def remove_spans(text: str, *, patterns: list[str]) -> str:
    """Remove whatever matches one of these regular expressions."""
    return _any_of(tuple(patterns)).sub("", text)


@mapper
def remove_sentences(text: str, *, patterns: list[str], max_chars: int) -> str:
    """Remove the sentences in which one of these regular expressions is found, if they are not longer than that."""
    pattern = _any_of(tuple(patterns))
    if not pattern.search(text):
        return text

    def keep(line: str) -> str | None:
        kept = [s for s in SENTENCE.findall(line) if len(s) > max_chars or not pattern.search(s)]
        return "".join(kept) or None

    lines = [keep(line) if pattern.search(line) else line for line in text.split("\n")]
    return "\n".join(line for line in lines if line is not None)


@mapper
def remove_lines(text: str, *, patterns: list[str], max_chars: int) -> str:
    """Remove the lines that begin as one of these regular expressions says, if they are not longer than that."""
    pattern = _any_of(tuple(patterns))
    return "\n".join(line for line in text.split("\n") if len(line) > max_chars or not pattern.match(line))


@mapper
def remove_repeated_sentences(text: str, *, min_chars: int) -> str:
    """Remove sentences that have stood before; compared, and at least so long, in their letters, Han and digits."""
    seen: set[str] = set()

    def is_new(sentence: str) -> bool:
        words = NOT_WORDS.sub("", sentence) if len(sentence) >= min_chars else ""
        if len(words) < min_chars:
            return True
        new = words not in seen
        seen.add(words)
        return new

    lines = ((line, "".join(filter(is_new, SENTENCE.findall(line)))) for line in text.split("\n"))
    return "\n".join(kept for line, kept in lines if kept or not line)


@mapper
def expand_latex_macros(text: str, *, max_chars: int) -> str:
    """Write out LaTeX macros without arguments whose definition is at most so long, and remove the definitions."""
    if "\\newcommand" not in text and "\\def" not in text:
        return text
    macros = {name: body for name, body in LATEX_MACRO.findall(text) if len(body) <= max_chars and "#" not in body}
    text = LATEX_MACRO.sub(lambda match: "" if match[1] in macros else match[0], text)
    return LATEX_COMMAND.sub(lambda match: macros.get(match[0], match[0]), text)


@mapper
def remove_copyright_header(text: str) -> str:
    """Remove the comment that a source file begins with, if it speaks of copyright or licence; a `#!` line stays."""
    match = COMMENT_HEADER.match(text)
    return text[: match.start(1)] + text[match.end(1) :] if match and COPYRIGHT.search(match[1]) else text


@cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(patterns))  # not in groups: only so does Python look for their first characters


# --- Measures ---


class Kind(IntEnum):
    """What a character is."""

    SPACE, SYMBOL, DIGIT, LETTER, ACCENTED_LETTER, HAN, FOREIGN_LETTER = range(7)


def _kind(code: int) -> Kind:
    category = unicodedata.category(chr(code))[0]
    if code in (0x3005, 0x3007) or 0x3400 <= code < 0x4DC0 or 0x4E00 <= code < 0xA000 or 0xF900 <= code < 0xFB00:
        return Kind.HAN
    if category == "L":
        latin = unicodedata.name(chr(code), "").partition("LATIN ")[0] in ("", "FULLWIDTH ")
        plain = code < 0x80 or code >= 0xFF00
        return (Kind.LETTER if plain else Kind.ACCENTED_LETTER) if latin else Kind.FOREIGN_LETTER
    return {"N": Kind.DIGIT, "Z": Kind.SPACE}.get(category, Kind.SPACE if chr(code) in "\n\t" else Kind.SYMBOL)


@cache
def _kinds() -> np.ndarray:
    """Return the kind of every code point of the planes 0 to 3 (2 and 3 hold nothing but Han) and of one above."""
    planes = [np.array([_kind(code) for code in range(0x20000)]), np.full(0x20000, Kind.HAN), [Kind.SYMBOL]]
    return np.concatenate(planes).astype(np.uint8)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@lru_cache(maxsize=1)
def _kind_counts(text: str) -> list[int]:
    kinds = _kinds()
    return np.bincount(kinds[np.minimum(_codes(text), len(kinds) - 1)], minlength=len(Kind)).tolist()


def _share(text: str, *kinds: Kind) -> float:
    counts = _kind_counts(text)
    return sum(counts[kind] for kind in kinds) / max(len(text), 1)


@measure
def text_length(text: str) -> float:
    """Characters."""
    return len(text)


@measure
def alphanumeric_share(text: str) -> float:
    """Share of letters, Han and digits among the characters."""
    return _share(text, *(set(Kind) - {Kind.SPACE, Kind.SYMBOL}))


@measure
def special_share(text: str) -> float:
    """Share of punctuation, symbols, digits and spaces among the characters."""
    return _share(text, Kind.SPACE, Kind.SYMBOL, Kind.DIGIT)


@measure
def han_share(text: str) -> float:
    """Share of Han among the characters that are no spaces."""
    return _kind_counts(text)[Kind.HAN] / max(len(text) - _kind_counts(text)[Kind.SPACE], 1)


@measure
def language(text: str, *, min_han: float, max_accented: float) -> str:
    """`zh`, `en` or `other`, by the shares of scripts among the letters.

    Chinese has at least `min_han` of Han and less of kana, Hangul, Cyrillic, ...; English has nine letters in ten from
    A to Z and at most `max_accented` with accents, which other Latin languages have more of.
    """
    counts = _kind_counts(text)
    han, foreign, accented = counts[Kind.HAN], counts[Kind.FOREIGN_LETTER], counts[Kind.ACCENTED_LETTER]
    letters = max(han + foreign + accented + counts[Kind.LETTER], 1)
    if han / letters >= min_han and foreign < han / 4:
        return "zh"
    return "en" if counts[Kind.LETTER] >= 0.9 * letters and accented / letters <= max_accented else "other"


@measure
def average_line_length(text: str) -> float:
    """Characters a line."""
    return len(text) / (text.count("\n") + 1)


@measure
def max_line_length(text: str) -> float:
    """Characters of the longest line."""
    return max(map(len, text.split("\n")))


@measure
def prose_share(text: str) -> float:
    """Share of the characters that stand in a line in which a sentence ends; menus, lists and captions have none."""
    prose = sum(len(line) for line in text.split("\n") if SENTENCE_END.search(line))
    return prose / max(len(text) - text.count("\n"), 1)


@measure
def duplicate_line_share(text: str) -> float:
    """Share of the characters that stand in a line which has stood before."""
    seen, repeated = set(), 0
    for line in map(str.strip, text.split("\n")):
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / max(len(text), 1)


@measure
def advert_density(text: str, *, patterns: list[str]) -> float:
    """Matches of these regular expressions on a thousand characters."""
    return 1000 * len(_any_of(tuple(patterns)).findall(text)) / max(len(text), 1)


@measure
def character_repetition(text: str, *, n: int) -> float:
    """Share of the most frequent repeated n-grams of characters, as many as the root of all, among all n-grams.

    data-juicer's rule. A text of one sentence again and again scores low: it has few n-grams, and the root is small.
    """
    counts = _ngram_counts(_codes(text), n)
    repeated = np.sort(counts[counts > 1])[::-1]
    return float(repeated[: int(len(counts) ** 0.5)].sum() / max(counts.sum(), 1))


@measure
def repeated_share(text: str, *, n: int) -> float:
    """Share of the n-grams of characters that stand there more than once."""
    return _repeated_share(_ngram_counts(_codes(text), n))


@measure
def word_count(text: str) -> float:
    """Words: every Han character, and every run of other letters and digits."""
    return len(_words(text))


@measure
def word_repetition(text: str, *, n: int) -> float:
    """Share of the n-grams of words that stand there more than once."""
    words = _words(text)
    return _repeated_share(_ngram_counts(np.fromiter(map(hash, words), np.int64, len(words)), n))


WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")


@lru_cache(maxsize=1)
def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _repeated_share(counts: np.ndarray) -> float:
    return float(counts[counts > 1].sum() / max(counts.sum(), 1))


def _ngram_counts(values: np.ndarray, n: int) -> np.ndarray:
    """Return how often each n-gram of the values occurs; told apart by a polynomial hash of 64 bits."""
    size = max(len(values) - n + 1, 0)
    hashes = np.zeros(size, np.uint64)
    for i in range(n if size else 0):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + values[i : i + size].astype(np.uint64)
    return np.unique(hashes, return_counts=True)[1]
