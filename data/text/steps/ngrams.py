"""Hash the units and n-grams of a text: what deduplication and decontamination compare.

A unit is one character of a script without spaces (Han, kana, Hangul, ...), or a run of other letters and digits.
Case, width (NFKC), spaces and punctuation make no difference, and neither do variants of a Chinese character:
Traditional ones, of Taiwan and Hong Kong too, and those of Japan, as OpenCC converts each of them, and `VARIANTS`. All
computations are on arrays of code points. If the hashes change, so must `FINGERPRINTS` of `plan`.
"""

import unicodedata
from functools import cache

import numpy as np
import opencc

NOTHING, IN_WORD, ALONE = 0, 1, 2  # kinds of code points
FIRST_ALONE = 0x2E80  # CJK radicals; with few exceptions, letters from here on belong to scripts without spaces
PIECE = 2**20  # characters hashed at once, which bounds the memory; a word across two pieces becomes two words
HAN = np.r_[0x3400:0xA000, 0x20000:0x32400]  # with all extensions of Unicode 16
TO_SIMPLIFIED = ("t2s", "tw2s", "hk2s", "jp2t", "t2s")  # configurations of OpenCC, in this order
# Variants that OpenCC keeps, in pairs: the second stands for both. They are listed in its STCharacters.txt (as one of
# several Traditional forms) or in Unihan_Variants.txt (kSemanticVariant, kSpecializedSemanticVariant, kZVariant) of
# Unicode 10, except 甚, which is in 甚麼. A meaning of its own (祇 for a god) does not matter for comparing texts.
VARIANTS = (
    "甚什 祇只 牠它 妳你 彷仿 倣仿 髣仿 髴佛 瞭了 藉借 姪侄 暱昵 廻回 囘回 囬回 彊强 尅克 毬球 砲炮 鎗枪 鎔熔 "
    "燄焰 畧略 荳豆 菓果 觔斤 諠喧 阬坑 隄堤 隣邻 喆哲 堃坤 徧遍 攷考 朞期 炤照 牋笺 犂犁 濬浚 迺乃 妬妒 姙妊 "
    "寃冤 幇帮 恠怪 慙惭 憇憩 搆构 旛幡 暎映 栢柏 碁棋 窓窗 竒奇 箒帚 籐藤 葢盖 讐仇 邨村 迆迤 鉋刨 鑛矿 閙闹 "
    "韮韭 餽馈 駮驳 鵞鹅 鴈雁 倶俱 値值 兎兔 冨富 凖准 劒剑 劔剑 呉吴 呑吞 呪咒 囓啮 夛多 峩峨 嶋岛 帋纸 弍二 "
    "恊协 悳德 惇敦 戸户 擧举 晳晰 汚污 渕渊 甦苏 疎疏 皃貌 稺稚 穉稚 竸竞 糺纠 聨联 脇胁 臯皋 艸草 蝿蝇 覩睹 "
    "貮二 躰体 輌辆 逈迥 銕铁 靭韧 頬颊 駄驮 鼇鳌 氷冰 姉姊 淸清 靑青"
)
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
    for variant, stands_for_both in VARIANTS.split():
        table[ord(variant)] = ord(stands_for_both)
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
    return find_units(text)[0]


def find_units(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what [`hash_units`] does, and for each unit whether it is a word: letters of a script with spaces."""
    if len(text) > PIECE:
        pieces = [find_units(text[start : start + PIECE]) for start in range(0, len(text), PIECE)]
        return tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))
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
        return np.empty(0, np.uint64), np.empty(0, bool)
    is_word = (kinds[starts] == IN_WORD) & (codes[starts] > ord("9"))  # ASCII digits come before letters

    # The hash of a unit is the sum of the hashes of its letters, each mixed with its position in the unit.
    lengths = np.diff(starts, append=len(codes))
    positions = np.arange(starts[0], len(codes)) - np.repeat(starts, lengths)
    letters = _mix(codes[starts[0] :] + ODD * positions.astype(np.uint64))
    letters[kinds[starts[0] :] == NOTHING] = 0
    return np.add.reduceat(letters, starts - starts[0]), is_word


def hash_ngrams(units: np.ndarray, n: int) -> np.ndarray:
    """Return a uint64 for each run of n consecutive units, or one for all units if there are fewer than n."""
    n = min(n, len(units))
    count = len(units) - n + 1 if n else 0
    grams = np.zeros(count, np.uint64)
    for start in range(n):
        grams = grams * ODD + units[start : start + count]
    return _mix(grams)
