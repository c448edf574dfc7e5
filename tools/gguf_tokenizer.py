"""The tokenizer inside a GGUF file: vocabulary, merges, chat template, and which of llama.cpp's splits it needs.

A GGUF file holds no pattern for cutting text before BPE, only the name of one that llama.cpp has built in.
"""

import json
import re

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names (src/llama-vocab.cpp), in the order of choice among equals, and what they stand for: patterns that
# split one after the other. transformers reads the names qwen2, qwen35 and llama-bpe, and takes all others for gpt-2.
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
WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is in the vocabulary is one token there, whatever the merges say
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


def tokens_with_ends(tokenizer: Tokenizer, text: str) -> set[tuple[int, int]]:
    """Every token of a text, as (byte of the text where it ends, id)."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    end, found = 0, set()
    for token, token_id in zip(encoding.tokens, encoding.ids, strict=True):
        end += len(token)  # a character of a byte-level token is a byte of text
        found.add((end, token_id))
    return found


def as_llama_cpp(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """Return a copy that tokenizes as llama.cpp does under `tokenizer.ggml.pre = name`: its splits, no normaliser."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.normalizer = None
    copy.model.ignore_merges = name in WHOLE_WORDS_FIRST
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
    copy.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return copy


def choose_pre_tokenizer(tokenizer: Tokenizer, text: str = PROBE) -> tuple[str, float]:
    """Return llama.cpp's name whose tokens of `text` are nearest to the tokenizer's own, and the share that differs.

    Different patterns may well give equal tokens: a split matters only where a merge would have crossed it.
    """
    own, shares = tokens_with_ends(tokenizer, text), {}
    for name in PRE_TOKENIZERS:
        shares[name] = len(own - tokens_with_ends(as_llama_cpp(tokenizer, name), text)) / len(own)
        if shares[name] == 0:
            break
    name = min(shares, key=shares.get)
    return name, shares[name]


def without_generation_marks(template: str) -> str:
    """Turn `{% generation %}`, which only transformers knows, into a comment: it renders the same."""
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[TokenType]]:
    """Return the text and the type of every token, filled up with unused ones to the rows of the embedding.

    Raises:
        UserError: The tokenizer has more tokens than the embedding has rows.
    """
    texts = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if max(texts) >= rows:
        raise UserError(f"the tokenizer has {max(texts) + 1:,} tokens, the model only {rows:,}: they do not belong")
    types = dict.fromkeys(texts, TokenType.NORMAL)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        types[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    ids = range(rows)
    return [texts.get(i, f"[PAD{i}]") for i in ids], [types.get(i, TokenType.UNUSED) for i in ids]


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Put a byte-level BPE tokenizer into the file's metadata and say how its splits were chosen.

    Raises:
        UserError: The tokenizer is of another kind, or larger than the model's `rows` of embeddings.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE" or (state["decoder"] or {}).get("type") != "ByteLevel":
        raise UserError("the tokenizer is not byte-level BPE, the only kind written here: use llama.cpp's converter")
    name, share = choose_pre_tokenizer(backend)
    print(f"pre-tokenizer {name}: {share:.2%} of the probe's tokens differ from the tokenizer's own")
    if share:
        print("warning: llama.cpp has no split like this tokenizer's: what it reads is the same text in other tokens")
    texts, types = vocabulary(tokenizer, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]])
    ends_turn = tokenizer.get_vocab().get("<|im_end|>")
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_eot_token_id, ends_turn),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(without_generation_marks(tokenizer.chat_template))
