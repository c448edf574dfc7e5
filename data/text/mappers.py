"""Mappers of cleaning profiles: operators that return a text changed.

Every mapper is a function of the text and of keyword parameters, which a profile sets (data/profiles/*.yaml); no
threshold is in this file. A new one is one function here with `@mapper`.

Text may be hostile, so every regular expression here takes time linear in its length, or is bounded. Each begins with
a character and looks behind after it, because Python then finds candidates about ten times as fast.
"""

import re
from collections.abc import Callable
from functools import cache, partial

import ftfy
import opencc

MAPPERS: dict[str, Callable[..., str]] = {}


def mapper(function: Callable[..., str]) -> Callable[..., str]:
    MAPPERS[function.__name__] = function
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
