"""Train a byte-level BPE tokenizer for Chinese, English, code and digits, or cut a large one down to what is used.

    python tokenizer/train_tokenizer.py --config tokenizer/configs/quickstart.yaml
    python tokenizer/train_tokenizer.py --prune_from QWEN --files corpus/*.jsonl --vocab_size 32768 --output OUT

The output is a folder that `AutoTokenizer.from_pretrained` reads, with the chat template beside this file. Any text in
Unicode comes back as it was. The same input gives the same tokenizer.json, byte for byte.

    <|endoftext|>   ends every document of the pretraining text: `tokenizer.document_separator_token`
    <|im_end|>      ends every turn of a chat: `tokenizer.eos_token`
    <|pad|>         fills batches and nothing else: `tokenizer.pad_token`

A pruned tokenizer keeps the template, the special tokens and the normaliser it had. `old_ids.json` beside it holds the
former id of each of its ids, to cut a model's embedding with.

Memory is bounded by `max_bytes`: training takes 20 to 40 bytes of it a byte of text, at worst (no two runs of Chinese
alike) 70; about 1.1 GB for the default. More text costs time and hardly compresses better: see README.md.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import find_files
from buddygpt.data.text.rows import progress_bar, read_rows
from buddygpt.tokenizer.byte_level_bpe import FIXED, learn
from buddygpt.tokenizer.prune_vocabulary import (
    choose_entries,
    count_tokens,
    fixed_entries,
    read_state,
    rebuild,
    split_by_hash,
)

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"
PIECE = 100_000  # characters of a document handed to the trainer at once


@dataclass
class TokenizerArguments:
    """What to learn from, and how large to become."""

    files: list[str] = field(metadata={"help": "Files or globs: .jsonl, .json, .parquet, .csv, .txt, also .gz."})
    output: str = field(metadata={"help": "The tokenizer folder to make."})
    vocab_size: int = field(default=16384, metadata={"help": "Entries, with 256 bytes and the special tokens."})
    prune_from: str | None = field(
        default=None,
        metadata={"help": "Instead of training: keep the entries of this tokenizer that the files use most."},
    )
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    max_bytes: int = field(
        default=50_000_000,
        metadata={"help": "Text read at most; each file gives its share of the bytes on disk."},
    )
    min_frequency: int = field(default=2, metadata={"help": "A character or pair seen less often is not learnt."})
    max_token_length: int = field(
        default=32, metadata={"help": "Characters in a token, a third as many Chinese ones; keeps boilerplate out."}
    )
    model_max_length: int = field(default=32768, metadata={"help": "Longer texts are warned of, not cut."})


def read_texts(files: list[Path], column: str, max_bytes: int) -> Iterator[str]:
    """Yield the files' text in pieces, at most `max_bytes` of it; UserError at a row that cannot be read."""
    total = sum(file.stat().st_size for file in files)
    with progress_bar(files, desc="reading") as bar:
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


def save(tokenizer: Tokenizer, output: Path, old_ids: list[int] | None = None, **options: Any) -> None:
    """Write the tokenizer folder beside its place, then put it there, over an earlier tokenizer if there is one."""
    work = output.with_name(f"{output.name}.partial")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(work)
    if old_ids is not None:
        (work / "old_ids.json").write_text(json.dumps(old_ids), encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    work.rename(output)


def train_into(output: Path, texts: Iterator[str], args: TokenizerArguments) -> None:
    """Learn a tokenizer from the texts, and say how large it is."""
    tokenizer = learn(list(texts), args.vocab_size, args.min_frequency, args.max_token_length)
    save(
        tokenizer,
        output,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens={"document_separator_token": "<|endoftext|>"},
        model_max_length=args.model_max_length,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )
    size = tokenizer.get_vocab_size()
    print(f"{output}: {size:,} entries")
    if size < args.vocab_size:
        print(
            f"warning: the text has no more pairs seen {args.min_frequency} times; `vocab_size` was {args.vocab_size}"
        )


def prune_into(output: Path, texts: Iterator[str], source: PreTrainedTokenizerBase, args: TokenizerArguments) -> None:
    """Keep the entries of `source` that the texts use most, and say what that costs on texts held out."""
    before, (used, held_out) = source.backend_tokenizer, split_by_hash(texts)
    state = read_state(source, args.prune_from)
    after, old_ids = rebuild(state, choose_entries(state, count_tokens(before, used), args.vocab_size))
    has_chatml = {"<|im_start|>", "<|im_end|>"} <= source.get_added_vocab().keys()
    ours = CHAT_TEMPLATE.read_text(encoding="utf-8") if has_chatml else None
    save(
        after,
        output,
        old_ids,
        **source.special_tokens_map,
        extra_special_tokens=source.extra_special_tokens,
        model_max_length=source.model_max_length,
        chat_template=source.chat_template or ours,
    )
    print(f"{output}: {len(old_ids):,} of {len(source):,} entries")
    if len(old_ids) < args.vocab_size:
        print(f"warning: the text uses no more than these; `vocab_size` was {args.vocab_size}")
    if held_out:
        size = sum(len(text.encode()) for text in held_out)
        old, new = (count_tokens(tokenizer, held_out).total() for tokenizer in (before, after))
        cost = f"{new / old - 1:+.2%} tokens, {size / old:.2f} -> {size / new:.2f} bytes a token"
        print(f"held-out text of {size:,} bytes: {cost}")


def main() -> None:
    (args,) = parse_arguments(TokenizerArguments, description=__doc__)
    output = Path(args.output)
    source = load_tokenizer(args.prune_from) if args.prune_from else None
    fixed = len(fixed_entries(read_state(source, args.prune_from))) if source else len(FIXED)
    if args.vocab_size < fixed:
        raise UserError(f"vocab_size {args.vocab_size} is below the {fixed} of 256 bytes and the special tokens")
    if output.exists() and not (output / "tokenizer.json").is_file():
        raise UserError(f"{output} exists and is no tokenizer folder; choose another `output`")
    texts = read_texts(find_files(args.files), args.text_column, args.max_bytes)
    first = next(texts, None)
    if first is None:
        raise UserError(f"there is no text in column `{args.text_column}` of {', '.join(args.files)}")
    texts = chain([first], texts)
    if source:
        prune_into(output, texts, source, args)
    else:
        train_into(output, texts, args)


if __name__ == "__main__":
    run_script(main)
