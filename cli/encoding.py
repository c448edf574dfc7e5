"""Name the encoding of text that is not UTF-8, and the command that converts it."""

import codecs
import re

COMMON = 0.8  # share of the letters; other languages reach 0.7
SAMPLE = 1000  # bytes to look at: chardet takes 0.2 s for a hundred thousand
CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
HAN = re.compile("[\u3400-\u9fff]")
NOT_CHINESE = re.compile("[^\n\r\t -~\u00b7\u2010-\u2030\u3000-\u303f\u3040-\u30ff\u3400-\u9fff\uff00-\uffef]")
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is the first half of this one
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Which of each four bytes are often zero.
ZERO_BYTES = {"x0x0": "UTF-16LE", "0x0x": "UTF-16BE"}
ZERO_BYTES |= dict.fromkeys(("x000", "xx00"), "UTF-32LE") | dict.fromkeys(("000x", "00xx"), "UTF-32BE")
# Frequent in Cantonese, and not in GB 2312.
CANTONESE = set("嘅喺咗佢哋啲嗰冇嘢嚟噉畀啱嘥攞㗎囉噃揾瞓嬲嗌嘞啩嗱諗揸咪睇")
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
    """Return the encoding that a byte order mark or zero bytes tell, except UTF-8; an empty string if none does.

    Every second byte of Latin letters in UTF-16 is zero. Without this, such text would pass as UTF-8.
    """
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "")
    places = [data[start:SAMPLE:4] for start in range(4)]  # in UTF-32, each place has bytes of one kind
    are_zero = "".join("0" if 4 * place.count(0) > len(place) else "x" for place in places)
    return marked or ZERO_BYTES.get(are_zero, "")


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
    names = [*NAMES.get(guess, []), *NAMES["BIG5"], *NAMES["GB18030"]]
    texts = {name: _decode(sample, name) for name in names}
    for name in ("UTF-16LE", "UTF-16BE"):
        text = _decode(data[:SAMPLE], name)
        # Almost any bytes are UTF-16, and many of its characters are common Han.
        if len(text) > 7 and not NOT_CHINESE.search(text):
            texts[name] = text
    shares = {name: _common_share(text) for name, text in texts.items()}
    best = max(shares, key=shares.__getitem__)
    others = {texts[name] for name in texts if shares[name] == shares[best]} - {texts[best]}
    is_clear = not others or len(CJK.findall(texts[best])) > 5
    return best if shares[best] >= COMMON and is_clear else ""


def _decode(data: bytes, encoding: str) -> str:
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)  # incremental: the last character may be cut
    except UnicodeDecodeError:
        return ""


def _common_share(text: str) -> float:
    """Return the share of common East Asian letters: kana, Hangul, or Han of level 1 of GB 2312 in Simplified form.

    Text that is decoded by a wrong encoding has rare characters: Russian as GB 18030 has those of level 2.
    """
    import opencc

    letters = [letter for letter in CJK.findall(opencc.OpenCC("t2s").convert(text)) if letter not in CANTONESE]
    if len(letters) < 2:
        return 0.0
    return sum(not HAN.match(letter) or _is_in_level_1(letter) for letter in letters) / len(letters)


def _is_in_level_1(character: str) -> bool:
    try:
        return character.encode("gb2312")[0] < 0xD8
    except UnicodeEncodeError:
        return False
