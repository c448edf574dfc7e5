"""Byte-level BPE learnt on characters: half the time and memory of learning on bytes, and no broken entries.

A Chinese character is three bytes, so a trainer that starts from bytes holds three symbols for each, and spends
entries on pieces like `的` and the first two bytes of what follows. Here the frequent characters are built from their
bytes first, then `BpeTrainer` merges characters. The result is plain byte-level BPE: what is rare falls back to bytes.
"""

import json

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
# Not flagged special, as in Qwen: decoding with skip_special_tokens keeps them, so that tool calls can be parsed.
TOOL_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
BYTES = bytes_to_unicode()  # byte -> the character that stands for it in a token
FIXED = [*SPECIAL_TOKENS, *TOOL_TOKENS, *sorted(BYTES.values())]

# Text is cut as Qwen2's is, digits one by one. llama.cpp has it built in, so an exported model reads the same tokens.
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SIGN = r"[^\r\n\p{L}\p{N}]?"  # one space or punctuation mark, Chinese ones too, goes with the word behind it
OTHERS = [r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]
PATTERN = "|".join([CONTRACTION, SIGN + r"\p{L}+", *OTHERS])


def training_pattern(max_token_length: int) -> str:
    """Return a finer cut to learn from: Chinese apart from other letters, in runs no longer than a token may be.

    It takes a tenth less time. Memory hardly changes: most runs of Chinese are distinct at any length.
    """
    han = rf"[\p{{L}}&&\p{{Han}}]{{1,{max(max_token_length // 3, 1)}}}"
    return "|".join([CONTRACTION, SIGN + han, SIGN + r"[\p{L}&&[^\p{Han}]]+", *OTHERS])


def to_token(data: bytes) -> str:
    """Return bytes as byte-level tokens show them."""
    return "".join(BYTES[byte] for byte in data)


def count_characters(texts: list[str], batch: int = 100) -> np.ndarray:
    """Return how often each code point occurs: (1,114,112,)."""
    counts = np.zeros(0x110000, np.int64)
    for start in range(0, len(texts), batch):
        codes = np.frombuffer("".join(texts[start : start + batch]).encode("utf-32-le"), "<u4")
        found = np.bincount(codes)
        counts[: len(found)] += found
    return counts


def choose_characters(counts: np.ndarray, vocab_size: int, min_frequency: int) -> tuple[list[str], list[bytes]]:
    """Return the characters worth an entry, and the entries that build them: beginnings of their bytes, shorter first.

    Worth it is what is about as frequent as the last merge will be. That is near a tenth of (length of the text /
    entries), where a trainer that starts from bytes stops at 8,192, 16,384 and 32,768 entries of Chinese and English.
    """
    least = max(min_frequency, counts.sum() / (10 * vocab_size))
    characters = [chr(code) for code in range(128)]  # are bytes already
    built: dict[bytes, None] = {}
    for code in np.argsort(-counts, kind="stable"):
        if counts[code] < least:
            break
        data = chr(code).encode()
        missing = [data[:end] for end in range(2, len(data) + 1) if data[:end] not in built]
        if len(FIXED) + len(built) + len(missing) > vocab_size:
            break
        if missing:
            characters.append(chr(code))
            built.update(dict.fromkeys(missing))
    return characters, list(built)


def learn_merges(texts: list[str], characters: list[str], size: int, **limits: int) -> list[list[str]]:
    """Return the merges of the characters that make `size` entries; other characters are passed over."""
    tokenizer = Tokenizer(models.BPE())
    cut = Regex(training_pattern(limits["max_token_length"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(cut, behavior="isolated")
    alphabet = {"initial_alphabet": characters, "limit_alphabet": len(characters)}
    trainer = trainers.BpeTrainer(vocab_size=len(characters) + size, **alphabet, **limits)
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return json.loads(tokenizer.to_str())["model"]["merges"]


def assemble(built: list[bytes], merges: list[list[str]]) -> Tokenizer:
    """Return the tokenizer of the fixed entries, the characters' and the merges', in this order."""
    pairs = [(to_token(data[:-1]), to_token(data[-1:])) for data in built]
    pairs += [(to_token(left.encode()), to_token(right.encode())) for left, right in merges]
    entries = dict.fromkeys([*FIXED, *(left + right for left, right in pairs)])
    tokenizer = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=pairs))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TOOL_TOKENS])
    return tokenizer


def learn(texts: list[str], vocab_size: int, min_frequency: int, max_token_length: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most `vocab_size` entries, learnt from the texts.

    Args:
        texts: Pieces of text, all in memory.
        vocab_size: At least the `FIXED` entries.
        min_frequency: A character or a pair of tokens seen less often gets no entry.
        max_token_length: Characters in a token; a third as many Chinese ones.
    """
    characters, built = choose_characters(count_characters(texts), vocab_size, min_frequency)
    size = vocab_size - len(FIXED) - len(built)
    limits = {"min_frequency": min_frequency, "max_token_length": max_token_length}
    return assemble(built, learn_merges(texts, characters, size, **limits))
