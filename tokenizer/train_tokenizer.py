"""Train a byte-level BPE tokenizer for Chinese, English, code and digits.

    python tokenizer/train_tokenizer.py --config tokenizer/configs/quickstart.yaml

The output is a folder that `AutoTokenizer.from_pretrained` reads, with the chat template beside this file. Any text in
Unicode comes back as it was. The same input gives the same tokenizer.json, byte for byte.

    <|endoftext|>   ends every document of the pretraining text: `tokenizer.document_separator_token`
    <|im_end|>      ends every turn of a chat: `tokenizer.eos_token`
    <|pad|>         fills batches and nothing else: `tokenizer.pad_token`

Memory is bounded by `max_bytes`: the trainer keeps every distinct run of characters between punctuation, spaces and
digits. In Chinese most of them are distinct, which takes about 70 bytes of memory a byte of text.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from buddygpt.data.text_files import find_files, progress_bar, read_rows
from buddygpt.launch import UserError, parse_arguments, run_script

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
# Not flagged special, as in Qwen: decoding with skip_special_tokens keeps them, so that tool calls can be parsed.
TOOL_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
SMALLEST = 256 + len(SPECIAL_TOKENS) + len(TOOL_TOKENS)
PIECE = 100_000  # characters of a document handed to the trainer at once

# Merges never cross these pieces. Digits stand alone: numbers of any length then have one form, aligned by place, and
# a small vocabulary is not spent on the 1,110 numbers of up to three digits.
PATTERN = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",  # English contractions
        r"\p{Han}+",  # Chinese, never with the punctuation or the Latin letters beside it
        r"[\t -/:-@\[-`{-~]?[\p{L}\p{M}&&[^\p{Han}]]+",  # other words, with one space or ASCII sign before
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line end after
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # indentation, less the last space, which goes to the word
        r"\s+",
    ]
)


@dataclass
class TokenizerArguments:
    """What to learn from, and how large to become."""

    files: list[str] = field(metadata={"help": "Files or globs: .jsonl, .json, .parquet, .csv, .txt, also .gz."})
    output: str = field(metadata={"help": "The tokenizer folder to make."})
    vocab_size: int = field(default=16384, metadata={"help": "Entries, with 256 bytes and 8 special tokens."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    max_bytes: int = field(
        default=100_000_000,
        metadata={"help": "Text read at most; each file gives its share of the bytes on disk."},
    )
    min_frequency: int = field(default=2, metadata={"help": "A pair seen less often is not merged."})
    max_token_length: int = field(default=32, metadata={"help": "Bytes in a token; keeps boilerplate out."})
    model_max_length: int = field(default=32768, metadata={"help": "Longer texts are warned of, not cut."})


def read_texts(files: list[Path], column: str, max_bytes: int) -> Iterator[str]:
    """Yield the files' text in pieces, at most `max_bytes` of it; UserError at a row that cannot be read."""
    total = sum(file.stat().st_size for file in files)
    with progress_bar(files, desc="reading", position=1, leave=False) as bar:  # below the trainer's own
        for file in files:
            left = max_bytes * file.stat().st_size // max(total, 1)
            for row in read_rows(file, [column], bar, txt_sample_by="line"):
                if row.error:
                    raise UserError(f"{file}:{row.number}: {row.error}")
                for start in range(0, len(row.content), PIECE):
                    piece = row.content[start : start + PIECE]
                    left -= len(piece.encode())
                    if left < 0:
                        break
                    yield piece
                if left < 0:
                    break


def train(texts: Iterator[str], args: TokenizerArguments) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most `vocab_size` entries, learnt from the texts."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        min_frequency=args.min_frequency,
        max_token_length=args.max_token_length,
        special_tokens=SPECIAL_TOKENS + TOOL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:  # the trainer flags all of them
        token["special"] = token["content"] in SPECIAL_TOKENS
    return Tokenizer.from_str(json.dumps(state))


def save(tokenizer: Tokenizer, model_max_length: int, output: Path) -> None:
    """Write the tokenizer folder beside its place, then put it there, over an earlier tokenizer if there is one."""
    work = output.with_name(f"{output.name}.partial")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens={"document_separator_token": "<|endoftext|>"},
        model_max_length=model_max_length,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    ).save_pretrained(work)
    if output.exists():
        shutil.rmtree(output)
    work.rename(output)


def main() -> None:
    (args,) = parse_arguments(TokenizerArguments, description=__doc__)
    output = Path(args.output)
    if args.vocab_size < SMALLEST:
        raise UserError(f"vocab_size {args.vocab_size} is below the {SMALLEST} of 256 bytes and the special tokens")
    if output.exists() and not (output / "tokenizer.json").is_file():
        raise UserError(f"{output} exists and is no tokenizer folder; choose another `output`")
    texts = read_texts(find_files(args.files), args.text_column, args.max_bytes)
    first = next(texts, None)
    if first is None:
        raise UserError(f"there is no text in column `{args.text_column}` of {', '.join(args.files)}")
    tokenizer = train(chain([first], texts), args)
    save(tokenizer, args.model_max_length, output)
    size = tokenizer.get_vocab_size()
    print(f"{output}: {size:,} entries")
    if size < args.vocab_size:
        print(
            f"warning: the text has no more pairs seen {args.min_frequency} times; `vocab_size` was {args.vocab_size}"
        )


if __name__ == "__main__":
    run_script(main)
