"""Write a tokenizer into a GGUF file: vocabulary, merges, chat template and the name of a pre-tokenizer.

A GGUF file contains no pattern for splitting text before BPE, only the name of a pattern that is built into llama.cpp.
This module finds the name whose pattern gives the same tokens.
"""

import json

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError
from buddygpt.export.generation_marks import hide_generation_marks

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names (src/llama-vocab.cpp) and the patterns they stand for, applied one after the other. If several give
# the same tokens, the first one is chosen. transformers knows qwen2, qwen35 and llama-bpe and reads others as gpt-2.
PRE_TOKENIZERS: dict[str, list[str]] = {
    "qwen2": [CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + PUNCTUATION + SPACES],
    "qwen35": [
        CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES,
    ],
    "llama-bpe": [CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + PUNCTUATION + SPACES],
    "gpt-2": [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + SPACES,
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
}
# With these names, a word in the vocabulary is always one token, even if no merges lead to it.
WHOLE_WORDS_FIRST = ("llama-bpe",)
# Text with Chinese, English, code, numbers, other scripts and odd spaces, on which the patterns differ.
PROBE = """\
床前明月光，疑是地上霜。举头望明月，低头思故乡！《静夜思》是唐代诗人李白的作品（约公元726年）。
“人工智能”简称AI，包括机器学习、深度学习……例如：用Python3训练GPT模型，batch_size=32，lr=3e-4，耗时12345.67秒。
The quick brown fox doesn't jump over the lazy dog; IT'S 2026, we've seen 1,234,567 of them -- "haven't you?"
def fibonacci(n: int) -> list[int]:
    \"\"\"返回前 n 个数。\"\"\"
\tvalues = [0, 1]   # two spaces  and   three
    while len(values) < n:\r
        values.append(values[-1] + values[-2])


    return values[:n] if n != 2 else {"键": 'value', "π": 3.14159}
问：1米等于多少厘米？答：100厘米。A+B≠C；x²+y²=z²，50%的人选①②③。電話：+86-10-8888-8888 、https://example.com/路径?q=中文&id=9527
日本語のテキストと한국어 텍스트、Русский язык, naïve café, नमस्ते दुनिया, สวัสดีครับ, مرحبا بالعالم 😀👍🏽\x20\x20

<html><p class="标题">　　全角空格，ＡＢＣ１２３</p></html>
"""


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Add a byte-level BPE tokenizer to the file's metadata and print how well its pre-tokenizer matches.

    Args:
        writer: Writer of the GGUF file.
        tokenizer: The tokenizer.
        rows: Rows of the model's embedding.

    Raises:
        UserError: The tokenizer is not byte-level BPE, or has more tokens than `rows`.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE" or (state["decoder"] or {}).get("type") != "ByteLevel":
        raise UserError("the tokenizer is not byte-level BPE, the only kind written here: use llama.cpp's converter")

    name, share = choose_pre_tokenizer(backend)
    print(f"pre-tokenizer {name}: {share:.2%} of the probe's tokens differ from the tokenizer's own")
    if share:
        print("warning: llama.cpp has no split like this tokenizer's: it will read the same text as other tokens")

    # Vocabulary
    texts, types = vocabulary(tokenizer, rows)
    merges = []
    for pair in state["model"]["merges"]:
        merges.append(pair if isinstance(pair, str) else " ".join(pair))
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre(name)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(merges)

    # Special tokens
    end_of_turn_id = tokenizer.get_vocab().get("<|im_end|>")
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if end_of_turn_id is not None:
        writer.add_eot_token_id(end_of_turn_id)
    writer.add_add_bos_token(False)

    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(hide_generation_marks(tokenizer.chat_template))


def choose_pre_tokenizer(tokenizer: Tokenizer, text: str = PROBE) -> tuple[str, float]:
    """Find the pre-tokenizer of llama.cpp that tokenizes a text most like the tokenizer itself.

    Different patterns may give equal tokens: a split matters only where a merge would have crossed it.

    Returns:
        llama.cpp's name, and the share of the tokenizer's tokens that differ (0 to 1).
    """
    own_tokens = tokens_with_ends(tokenizer, text)
    shares = {}
    for name in PRE_TOKENIZERS:
        missing = own_tokens - tokens_with_ends(as_llama_cpp(tokenizer, name), text)
        shares[name] = len(missing) / len(own_tokens)
        if shares[name] == 0:
            break
    best = min(shares, key=shares.get)
    return best, shares[best]


def tokens_with_ends(tokenizer: Tokenizer, text: str) -> set[tuple[int, int]]:
    """Return every token of a text as (byte of the text at which it ends, token id)."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    end = 0
    found = set()
    for token, token_id in zip(encoding.tokens, encoding.ids, strict=True):
        end += len(token)  # each character of a byte-level token stands for one byte of text
        found.add((end, token_id))
    return found


def as_llama_cpp(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """Return a copy that tokenizes as llama.cpp does with `tokenizer.ggml.pre = name`: its splits, no normalizer."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.normalizer = None
    copy.model.ignore_merges = name in WHOLE_WORDS_FIRST
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    copy.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return copy


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[TokenType]]:
    """Return the text and the type of every token, padded with unused tokens to the rows of the embedding.

    Raises:
        UserError: The tokenizer has more tokens than the embedding has rows.
    """
    text_of = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if max(text_of) >= rows:
        raise UserError(
            f"the tokenizer has {max(text_of) + 1:,} tokens, the model only {rows:,}: they do not belong together"
        )
    type_of = dict.fromkeys(text_of, TokenType.NORMAL)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        type_of[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED

    texts = [text_of.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)]
    types = [type_of.get(token_id, TokenType.UNUSED) for token_id in range(rows)]
    return texts, types
