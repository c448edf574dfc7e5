"""Train a byte-level BPE tokenizer by merging characters instead of bytes.

A Chinese character is three bytes in UTF-8. A trainer that starts from bytes keeps three symbols per character, and
spends entries on fragments such as `的` plus the first two bytes of the next character. This trainer gives frequent
characters an entry first, then lets `BpeTrainer` merge characters. That halves time and memory, and no entry holds
part of a character next to another one. The result is ordinary byte-level BPE: rare characters fall back to bytes.
"""

import json

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
# Not marked as special, as in Qwen: decoding with skip_special_tokens keeps them, so tool calls can be parsed.
TOOL_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
BYTE_CHARACTERS = bytes_to_unicode()  # byte -> the character that represents it in an entry, as in GPT-2
FIXED_ENTRIES = [*SPECIAL_TOKENS, *TOOL_TOKENS, *sorted(BYTE_CHARACTERS.values())]

# The pre-tokenizer of Qwen2: merges stay inside the pieces of text that it matches, and each digit is a piece.
# llama.cpp has it built in, so an exported model produces the same tokens there.
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PREFIX = r"[^\r\n\p{L}\p{N}]?"  # one space or punctuation mark (Chinese ones too) joins the word after it
OTHERS = [r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]
PATTERN = "|".join([CONTRACTION, PREFIX + r"\p{L}+", *OTHERS])


def train_byte_level_bpe(texts: list[str], vocab_size: int, min_frequency: int, max_token_length: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with at most `vocab_size` entries.

    Args:
        texts: Pieces of text, all in memory.
        vocab_size: Number of entries, at least `len(FIXED_ENTRIES)`.
        min_frequency: Characters and pairs of tokens that occur less often get no entry.
        max_token_length: Longest entry, in characters. Chinese entries have at most a third of that.
    """
    characters, prefixes = choose_characters(count_characters(texts), vocab_size, min_frequency)
    n_merges = vocab_size - len(FIXED_ENTRIES) - len(prefixes)
    merges = learn_merges(texts, characters, n_merges, min_frequency=min_frequency, max_token_length=max_token_length)
    return build_tokenizer(prefixes, merges)


def count_characters(texts: list[str], batch: int = 100) -> np.ndarray:
    """Return how often each Unicode code point occurs, shape (1,114,112)."""
    counts = np.zeros(0x110000, np.int64)
    for start in range(0, len(texts), batch):
        joined = "".join(texts[start : start + batch])
        codes = np.frombuffer(joined.encode("utf-32-le"), "<u4")
        batch_counts = np.bincount(codes)
        counts[: len(batch_counts)] += batch_counts
    return counts


def choose_characters(counts: np.ndarray, vocab_size: int, min_frequency: int) -> tuple[list[str], list[bytes]]:
    """Choose the characters that get an entry.

    A character gets one if it is about as frequent as the last merge will be. That frequency is close to
    (characters of text) / (10 * vocab_size): trainers that start from bytes stop there at 8,192, 16,384 and 32,768
    entries on Chinese and English text.

    Returns:
        The characters, including all of ASCII, and the entries that build them: prefixes of their UTF-8 bytes, two
        or more bytes long. A prefix comes after the shorter prefixes that it extends.
    """
    threshold = max(min_frequency, counts.sum() / (10 * vocab_size))
    characters = [chr(code) for code in range(128)]  # ASCII characters are single bytes and need no further entry
    prefixes: dict[bytes, None] = {}  # used as an ordered set
    most_frequent_first = np.argsort(-counts, kind="stable")
    for code in most_frequent_first:
        if counts[code] < threshold:
            break
        data = chr(code).encode()
        if len(data) == 1:
            continue
        # Characters with the same first bytes share those prefixes.
        missing = [data[:end] for end in range(2, len(data) + 1) if data[:end] not in prefixes]
        if len(FIXED_ENTRIES) + len(prefixes) + len(missing) > vocab_size:
            break
        characters.append(chr(code))
        prefixes.update(dict.fromkeys(missing))
    return characters, list(prefixes)


def learn_merges(
    texts: list[str], characters: list[str], n_merges: int, min_frequency: int, max_token_length: int
) -> list[list[str]]:
    """Return up to `n_merges` pairs of entries to merge, in order; characters not in `characters` are ignored."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(training_pattern(max_token_length))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=len(characters) + n_merges,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        min_frequency=min_frequency,
        max_token_length=max_token_length,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return json.loads(tokenizer.to_str())["model"]["merges"]


def training_pattern(max_token_length: int) -> str:
    """Return `PATTERN` with smaller pieces: runs of Chinese are separate, and no longer than an entry may be.

    Training on them takes a tenth less time. Memory hardly changes, because most runs of Chinese occur only once,
    whether they are short or long.
    """
    han = rf"[\p{{L}}&&\p{{Han}}]{{1,{max(max_token_length // 3, 1)}}}"
    other_letters = r"[\p{L}&&[^\p{Han}]]+"
    return "|".join([CONTRACTION, PREFIX + han, PREFIX + other_letters, *OTHERS])


def build_tokenizer(prefixes: list[bytes], merges: list[list[str]]) -> Tokenizer:
    """Build a byte-level tokenizer whose entries are `FIXED_ENTRIES`, then `prefixes`, then the merged `merges`.

    Args:
        prefixes: Byte strings that build characters, as [`choose_characters`] returns them.
        merges: Pairs of strings of characters.
    """
    # Every entry that is not fixed is a merge of two others: the bytes of a character, or two strings of characters.
    byte_merges = [(to_entry(data[:-1]), to_entry(data[-1:])) for data in prefixes]
    byte_merges += [(to_entry(left.encode()), to_entry(right.encode())) for left, right in merges]
    # Two merges may give the same entry; dict.fromkeys keeps the first.
    entries = dict.fromkeys([*FIXED_ENTRIES, *(left + right for left, right in byte_merges)])
    vocab = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=byte_merges))

    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TOOL_TOKENS])
    return tokenizer


def to_entry(data: bytes) -> str:
    """Return bytes as a byte-level vocabulary writes them: one character for each byte."""
    return "".join(BYTE_CHARACTERS[byte] for byte in data)
