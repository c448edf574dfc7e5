"""The operators of cleaning profiles: mappers return a text changed, measures return a number or a label for it.

Every operator is a function of the text and of keyword parameters, which a profile sets (data/profiles/*.yaml); no
threshold is in this file. A new operator is one function here with `@mapper` or `@measure`. A measure's first
docstring sentence appears in the data report.

The measures of repetition, special characters and words follow data-juicer
(https://github.com/datajuicer/data-juicer), for which BigScience and Steel-LLM chose their thresholds. The share of
duplicate lines follows Gopher (https://arxiv.org/abs/2112.11446, table A1).

Text may be hostile, so every regular expression here takes time linear in its length, or is bounded. Each begins with
a character and looks behind after it, because Python then finds candidates about ten times as fast.
"""

import re
import unicodedata
from collections.abc import Callable
from enum import IntEnum
from functools import cache, lru_cache, partial

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
# ftfy changes nothing in text that has only these: ASCII, Han, Chinese punctuation, full-width forms, common symbols.
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
def normalize_line_ends(text: str) -> str:
    """Use \\n as line end. Cleaning does so before the first step of a profile: all operators rely on it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@mapper
def normalize_lines(text: str) -> str:
    """Use \\n as line end, remove control characters, keep at most two blank lines in a row, and strip both ends.

    No visible character changes, also not full-width punctuation (no NFC, no NFKC).
    """
    text = CONTROL_CHARACTERS.sub("", normalize_line_ends(text))
    return MANY_BLANK_LINES.sub("\n\n\n", text).strip()


@mapper
def fix_unicode(text: str, *, unescape_html: bool) -> str:
    """Repair wrongly decoded text, ligatures and line separators and, with `unescape_html`, replace HTML entities.

    Repaired lines are in NFC. Full-width forms, ideographic spaces and curly quotes stay; the defaults of ftfy would
    turn them into ASCII.
    """
    if unescape_html and "&" in text and HTML_ENTITY.search(text):
        text = ftfy.fixes.unescape_html(text)
    text = normalize_line_ends(text)  # ftfy would turn the \r of each \r\n, also of `&#13;`, into one more line end
    if not NEEDS_FTFY.search(text):
        return text
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if NEEDS_FTFY.search(line):
            lines[number] = ftfy.fix_text(line, FTFY)
    return "\n".join(lines)


@mapper
def normalize_spaces(text: str, *, collapse: bool) -> str:
    """Replace unusual spaces, remove invisible ones and those at line ends, and `collapse` runs inside a line.

    Indentation, tabs and ideographic spaces stay: ideographic spaces separate names and columns.
    """
    text = INVISIBLE.sub("", ODD_SPACES.sub(" ", text))
    text = SPACES_AT_LINE_END.sub("", text)
    return SPACES_INSIDE_LINE.sub(" ", text) if collapse else text


@mapper
def convert_chinese(text: str, *, config: str) -> str:
    """Convert between Chinese scripts with the OpenCC configuration `config`; t2s is traditional to simplified."""
    return _opencc(config).convert(text)


@cache
def _opencc(config: str) -> opencc.OpenCC:
    return opencc.OpenCC(config)


# --- Mappers: personal addresses and numbers ---

EMAIL = re.compile(
    r"[A-Za-z0-9](?<![\w.%+-].)[\w.%+-]{0,63}@(?!example\.)[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{2,63})+", re.ASCII
)
IP_ADDRESS = re.compile(r"[0-9](?<![0-9A-Za-z.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?::[0-9]{1,5})?(?![0-9A-Za-z]|\.[0-9])")
PRIVATE_IP = re.compile(r"(?:0|10|127|255|192\.168|172\.(?:1[6-9]|2[0-9]|3[01]))\.")
IPV6_ADDRESS = re.compile(r"[0-9A-Fa-f](?<![0-9A-Za-z:].)[0-9A-Fa-f]{0,3}(?::[0-9A-Fa-f]{1,4}){7}(?![0-9A-Za-z:])")
URL = r"(?:https?://|HTTPS?://|ftp://|www\.)[A-Za-z0-9\-._~:/?#\[\]@!$&'*+,;=%]+"
MARKDOWN_LINK = re.compile(rf"!?\[([^\[\]\n]*)\]\({URL}(?: [^()\n]*)?\)")
LINK = re.compile(rf"{URL}(?<![.,;:!?'\]])")
ALONE = "(?<![0-9A-Za-z._￥¥$€-].)"  # after the first character: no number or price continues here
AMOUNT = r"\s?(?:元|万|亿|美元|港元|日元|欧元|英镑|吨|股|次|公里|平方|千瓦|字节|[%％])"
PHONE = re.compile(
    rf"(?:(?:\+{ALONE}86[- ]?1|8{ALONE}6[- ]?1|1{ALONE})[3-9][0-9]([- ]?)[0-9]{{4}}\1[0-9]{{4}}"  # mobile
    rf"|(?:0{ALONE}[0-9]{{2,3}}[-— ]|[(（]0[0-9]{{2,3}}[)）] ?)[2-8][0-9]{{6,7}}(?:-[0-9]{{1,6}})?"  # landline
    rf"|[48]{ALONE}00-(?:[0-9]{{3}}-?[0-9]{{4}}|[0-9]{{4}}-?[0-9]{{3}})"  # service numbers
    rf")(?![0-9A-Za-z]|[.,][0-9]|{AMOUNT})"
)
ID_NUMBER = re.compile(
    r"[1-9](?<![0-9A-Za-z].)[0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx]"
    r"(?![0-9A-Za-z])"
)
ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


@mapper
def remove_emails(text: str) -> str:
    """Remove e-mail addresses, except in Markdown code and those of the domains for examples (RFC 2606)."""
    if "@" not in text:
        return text
    return _outside_code(text, partial(EMAIL.sub, "")) if "`" in text else EMAIL.sub("", text)


@mapper
def remove_ips(text: str) -> str:
    """Remove full IPv6 addresses, and IPv4 addresses of at least seven digits: 3.2.1.12 may be a section.

    Addresses of private networks stay, because everybody has them.
    """

    def replace(match: re.Match) -> str:
        address = match[0].split(":")[0]  # without the port
        numbers = address.split(".")
        if any(int(number) > 255 for number in numbers) or len("".join(numbers)) < 7 or PRIVATE_IP.match(address):
            return match[0]
        return ""

    text = IP_ADDRESS.sub(replace, text)
    return IPV6_ADDRESS.sub("", text) if text.count(":") >= 7 else text


@mapper
def remove_links(text: str) -> str:
    """Remove links and Markdown images; the words of Markdown links stay, and so do links in Markdown code."""
    if "://" not in text and "www." not in text:
        return text
    return _outside_code(text, _remove_links) if "`" in text else _remove_links(text)


def _remove_links(text: str) -> str:
    text = MARKDOWN_LINK.sub(lambda match: "" if match[0][0] == "!" else match[1], text)
    return LINK.sub("", text)


@mapper
def remove_phone_numbers(text: str) -> str:
    """Remove Chinese mobile, landline and service phone numbers, except amounts with a currency or unit."""
    return PHONE.sub("", text)


@mapper
def remove_id_numbers(text: str) -> str:
    """Remove Chinese identity numbers: 18 digits with a date of birth and a valid checksum (GB 11643-1999)."""

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
ABOUT_HTML = re.compile("(?:HTML|html|XML|xml) ?(?:标签|元素|代码|文档|文件)|[>`] ?(?:标签|元素|标记)")
HTML_BLOCK = re.compile("article|blockquote|br|d[dlt]|div|h[1-6]|hr|ol|p|pre|section|table|tr|ul")
SENTENCE = re.compile(r"[^。！？!?….]*(?:\.(?! )[^。！？!?….]*)*(?:[。！？!?…]+[”’」』）)]*|\.)?")
SPACE_BEFORE_HAN = re.compile(r"(?<=[^\s：:，,、|丨/+＋&-] )(?=[\u4e00-\u9fff“「『（(《【])")  # as a separator
CLOSING = "”’」』）) "  # after the end of a sentence
SENTENCE_END = re.compile(r"[。！？；!?…]|[.;](?= |$)")
NOT_WORDS = re.compile(r"[\W_]+")
LATEX_MACRO = re.compile(r"\\(?:newcommand\*?\s*\{?|def\s*)(\\[A-Za-z]+)\}?\s*\{([^{}\n]*)\}")
LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
COMMENT_HEADER = re.compile(r"\s*(?:#![^\n]*\n\s*)?(/\*[^*]*\*+(?:[^/*][^*]*\*+)*/|(?:(?://|#|--)[^\n]*(?:\n|\Z))+)")
COPYRIGHT = re.compile(r"copyright|©|\blicen[sc]ed?\b|SPDX|版权所有", re.IGNORECASE)


@mapper
def remove_html(text: str) -> str:
    """Remove HTML tags, comments, scripts and styles; `a < b` and `<T>` stay. Block elements become line ends.

    Tags in the code of Markdown stay, and so do all tags of a text about HTML.
    """
    is_source = HTML_TAG.match(text.lstrip())  # of a page, whose scripts may have backticks
    if "<" not in text or not is_source and ABOUT_HTML.search(text):
        return text
    if "```" in text or "`" in text and not is_source:
        return _outside_code(text, _remove_tags)
    return _remove_tags(text)


def _remove_tags(text: str) -> str:
    def replace(match: re.Match) -> str:
        name = match[2].lower()
        if name == "li":
            return "" if match[1] else "\n* "
        if name in ("td", "th"):
            return " " if match[1] else ""
        return "\n" if HTML_BLOCK.fullmatch(name) else ""

    return HTML_TAG.sub(replace, _remove_hidden_html(text))


CODE_INSIDE_LINE = re.compile(r"(`+[^`\n]+`+)")


def _outside_code(text: str, function: Callable[[str], str]) -> str:
    """Apply a function to the text between Markdown code: fenced blocks, and spans in backticks."""
    parts: list[str] = []  # done
    pending: list[str] = []  # text before the next code
    fence = ""
    for line in text.splitlines(keepends=True):
        start = line.lstrip()[:3]
        if fence or start in ("```", "~~~"):
            parts += [function("".join(pending)), line]
            pending = []
            fence = "" if line.strip() == fence else fence or start
            continue
        *spans, rest = CODE_INSIDE_LINE.split(line)
        for before, code in zip(spans[::2], spans[1::2], strict=True):
            parts += [function("".join([*pending, before])), code]
            pending = []
        pending.append(rest)
    return "".join([*parts, function("".join(pending))])


def _remove_hidden_html(text: str) -> str:
    """Remove comments, scripts and styles that are closed."""
    kept = []
    done = 0  # the text before is in `kept`, or removed
    start = 0  # search for the next opening from here
    unclosed = set()  # names without a closing tag after `start`: not searched for again, so time stays linear
    while opening := HTML_HIDDEN.search(text, start):
        start = opening.end()
        name = opening[1].lower() if opening[1] else None  # None: a comment
        closing = None if name in unclosed else HTML_HIDDEN_END[name].search(text, start)
        if closing:
            kept.append(text[done : opening.start()])
            done = start = closing.end()
        else:
            unclosed.add(name)
    return "".join(kept) + text[done:]


BOLD = re.compile(r"\*\*(?<![0-9A-Za-z_*(,]\*\*)(?<!, \*\*)(?![\s*])([^*]{1,500})(?<!\s)\*\*(?![0-9A-Za-z_*])")
# Also empty bold text, but not the stars of 138****5678.
BOLD_LEFT = re.compile(r"\*(?<![0-9*]\*)\*{3,}+|\*(?<!\*\*)\*{3,}+(?![0-9])|\\\*(?:\\\*)+|^\*\*$", re.MULTILINE)


# Elsewhere, stars may hide words: `what a ** day`.
MARKDOWN = re.compile(
    r"^(?:#{1,6} |```|(?:[0-9]+\.|[-*+]) \*\*[^*\n]|\*\*[^*\n]+\*\*(?:\s*$|[:：]))|\]\(", re.MULTILINE
)


@mapper
def remove_bold(text: str) -> str:
    """Remove the marks of bold text in Markdown; `2**3` and `**kwargs` stay."""
    if "*" not in text or not MARKDOWN.search(text):
        return text
    return BOLD_LEFT.sub("", BOLD.sub(r"\1", text))


@mapper
def remove_spans(text: str, *, patterns: list[str]) -> str:
    """Remove every match of one of the regular expressions `patterns`."""
    return _any_of(tuple(patterns)).sub("", text)


@mapper
def remove_sentences(text: str, *, patterns: list[str], max_chars: int) -> str:
    """Remove sentences of at most `max_chars` in which one of the regular expressions `patterns` matches.

    Pages without line ends often have spaces instead, so a space before a Han character also ends a sentence.
    """
    pattern = _any_of(tuple(patterns))
    if not pattern.search(text):
        return text
    lines = []
    for line in text.split("\n"):
        if pattern.search(line):
            sentences = [part for each in SENTENCE.findall(line) for part in SPACE_BEFORE_HAN.split(each)]
            line = "".join(each for each in sentences if len(each) > max_chars or not pattern.search(each))
            if not line:  # a line that becomes empty is removed, too
                continue
        lines.append(line)
    return "\n".join(lines)


@mapper
def remove_lines(text: str, *, patterns: list[str], max_chars: int) -> str:
    """Remove lines of at most `max_chars` at whose start one of the regular expressions `patterns` matches."""
    pattern = _any_of(tuple(patterns))
    return "\n".join(line for line in text.split("\n") if len(line) > max_chars or not pattern.match(line))


@mapper
def remove_repeated_sentences(text: str, *, min_chars: int, ends: str = "") -> str:
    """Remove repeated sentences of at least `min_chars` letters, Han and digits; only these are compared.

    If `ends` has characters, sentences without one of these at their end (lines of code, tables, titles) all stay.
    """
    seen: set[str] = set()

    def is_new(sentence: str) -> bool:
        if len(sentence) < min_chars or ends and sentence.rstrip(CLOSING)[-1:] not in ends:
            return True
        words = NOT_WORDS.sub("", sentence)
        if len(words) < min_chars:
            return True
        if words in seen:
            return False
        seen.add(words)
        return True

    lines = []
    for line in text.split("\n"):
        kept = "".join(filter(is_new, SENTENCE.findall(line)))
        if kept or not line:  # a line that becomes empty is removed, too
            lines.append(kept)
    return "\n".join(lines)


@mapper
def expand_latex_macros(text: str, *, max_chars: int) -> str:
    """Expand LaTeX macros without arguments whose body has at most `max_chars`, and remove their definitions."""
    if "\\newcommand" not in text and "\\def" not in text:
        return text
    macros = {}
    for name, body in LATEX_MACRO.findall(text):
        if len(body) <= max_chars and "#" not in body:
            macros[name] = body
    text = LATEX_MACRO.sub(lambda match: "" if match[1] in macros else match[0], text)
    return LATEX_COMMAND.sub(lambda match: macros.get(match[0], match[0]), text)


@mapper
def remove_copyright_header(text: str) -> str:
    """Remove the comment at the start of a source file if it mentions copyright or a license; a `#!` line stays."""
    match = COMMENT_HEADER.match(text)
    if match and COPYRIGHT.search(match[1]):
        return text[: match.start(1)] + text[match.end(1) :]
    return text


@cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(patterns))  # without groups, so that Python can search for their first characters


# --- Measures ---


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
COMMON_WORDS = {name: frozenset(words.split()) for name, words in COMMON_WORDS.items()}
LATIN_WORD = re.compile("[a-z]{2,}")
LATIN_SAMPLE = 20_000  # characters


def _is_english(text: str, min_share: float) -> bool:
    """Return whether no other Latin language has more frequent words in the text than English.

    `min_share` is the least share of English ones among the words, unless frequent words of any language are few.
    """
    words = LATIN_WORD.findall(text[:LATIN_SAMPLE].lower())
    counts = {name: sum(word in common for word in words) for name, common in COMMON_WORDS.items()}
    most = max(counts.values())
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
    return 1000 * len(_any_of(tuple(patterns)).findall(text)) / max(len(text), 1)


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
