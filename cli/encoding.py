"""Name the encoding of text that is not UTF-8, and the command that converts it."""

import codecs
import re

SAMPLE = 1000  # bytes to look at: chardet takes 0.2 s for a hundred thousand
CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
HAN = re.compile("[\u3400-\u9fff]")
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is the first half of this one
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# For each encoding that chardet may find: names that both Python and iconv know, from the strictest to the widest.
NAMES = {
    "GB18030": ["GB18030"],
    "BIG5": ["BIG5", "CP950", "BIG5-HKSCS"],
    "SHIFT_JIS": ["SHIFT_JIS", "CP932"],
    "EUC-JP": ["EUC-JP"],
    "CP949": ["EUC-KR", "CP949"],
    "EUC-KR": ["EUC-KR", "CP949"],
    "JOHAB": ["JOHAB"],
}


def not_utf8(data: bytes) -> str:
    """Return an error message for bytes that are not UTF-8: with their encoding, if it can be told, and the remedy."""
    encoding = find_encoding(data)
    if not encoding:
        return "not valid UTF-8"
    return f"not valid UTF-8; it looks like {encoding}: convert it with `iconv -f {encoding} -t UTF-8`"


def marked_encoding(data: bytes) -> str:
    """Return the encoding that a byte order mark names, except UTF-8; an empty string if there is none."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "")


def find_encoding(data: bytes) -> str:
    """Return the name that iconv has for the encoding of the bytes, or an empty string if it is not clear.

    Only encodings of East Asia are told: damaged UTF-8 looks like any other.
    """
    if marked := marked_encoding(data):
        return marked
    # Damaged UTF-8 still has most of its characters.
    damaged = data.decode(errors="replace")
    if damaged.count("\ufffd") <= len(CJK.findall(damaged)):
        return ""

    import chardet  # only now: it takes a while to import

    first = next(number for number, byte in enumerate(data) if byte >= 0x80)
    sample = data[first : first + SAMPLE]
    guess = (chardet.detect(sample)["encoding"] or "").upper()
    # chardet does not know the characters that Hong Kong has added to Big5.
    for name in [*NAMES.get(guess, []), *NAMES["BIG5"], *NAMES["GB18030"]]:
        try:
            text = codecs.getincrementaldecoder(name)().decode(sample)  # incremental: the last character may be cut
        except UnicodeDecodeError:
            continue
        if _is_plausible(text):
            return name
    return ""


def _is_plausible(text: str) -> bool:
    """Return whether most characters are common: kana, Hangul, or Han that GB 2312 has in Simplified form.

    Text that is decoded by a wrong encoding has rare characters.
    """
    import opencc

    letters = CJK.findall(opencc.OpenCC("t2s").convert(text))
    common = sum(not HAN.match(letter) or _is_in_gb2312(letter) for letter in letters)
    return len(letters) > 1 and common >= 0.85 * len(letters)


def _is_in_gb2312(character: str) -> bool:
    try:
        character.encode("gb2312")
        return True
    except UnicodeEncodeError:
        return False
