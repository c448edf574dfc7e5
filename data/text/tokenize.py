"""The tokenizer as data preparation needs it: facts for the manifest, and a form that makes no special tokens."""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError
from buddygpt.data.shards.format import tokenizer_fingerprint


class TextTokenizer(NamedTuple):
    """A tokenizer that reads text and nothing else.

    Attributes:
        facts: `tokenizer`, `tokenizer_sha256`, `vocab_size`, `dtype`, `separator` and `eos_id`, for the manifest.
        state: As [`raw_text_tokenizer`] gives it.
    """

    facts: dict[str, Any]
    state: str


def read_text_tokenizer(name_or_path: str, separator: str) -> TextTokenizer:
    """As [`describe_tokenizer`], in a process of its own: no stage needs the 300 MB that `AutoTokenizer` imports.

    Where torch is in memory already, nothing would be saved.
    """
    if "torch" in sys.modules:
        return describe_tokenizer(name_or_path, separator)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(describe_tokenizer, name_or_path, separator).result()


def describe_tokenizer(name_or_path: str, separator: str) -> TextTokenizer:
    """Return the tokenizer of a folder or of the Hub.

    Raises:
        UserError: There is none, it has no `tokenizers` backend, or the separator is no special token of it.
    """
    tokenizer = load_tokenizer(name_or_path)
    if separator not in tokenizer.get_added_vocab():
        raise UserError(f"document_separator: `{separator}` is no special token of {name_or_path}. Name one that is")
    facts = {
        "tokenizer": name_or_path,
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "dtype": token_dtype(tokenizer.get_vocab()).name,
        "separator": separator,
        "eos_id": tokenizer.convert_tokens_to_ids(separator),
    }
    return TextTokenizer(facts, raw_text_tokenizer(tokenizer, separator))


def raw_text_tokenizer(tokenizer: PreTrainedTokenizerBase, separator: str) -> str:
    """Return the tokenizer's JSON with the separator and all that its chat template writes marked as special.

    Text never encodes to special tokens here, and Qwen's `<tool_call>` is one in all but name.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    template = f"{separator} {tokenizer.chat_template}"
    for token in state["added_tokens"]:
        token["special"] |= bool(token["content"].strip()) and token["content"] in template
    return json.dumps(state, ensure_ascii=False)


def token_dtype(vocabulary: dict[str, int]) -> np.dtype:
    """Return the smallest type that holds every id; datatrove goes by their number, which gaps make too small."""
    return np.dtype("<u2" if max(vocabulary.values()) <= np.iinfo(np.uint16).max else "<u4")
