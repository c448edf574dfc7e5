"""Train a byte-level BPE tokenizer for Chinese, English, code and digits.

    python tokenizer/train_tokenizer.py --config tokenizer/configs/quickstart.yaml

The output is a folder that `AutoTokenizer.from_pretrained` reads. It includes chat_template.jinja from this folder.
Encoding and decoding returns any Unicode text unchanged. The same input gives the same tokenizer.json, byte for byte.

    <|endoftext|>   ends every document of the pretraining text: `tokenizer.document_separator_token`
    <|im_end|>      ends every turn of a chat: `tokenizer.eos_token`
    <|pad|>         fills batches and has no other use: `tokenizer.pad_token`

`max_bytes` limits memory: training needs 20 to 40 bytes per byte of text, at worst 70.
The default needs about 1.1 GB. More text takes longer and hardly improves compression: see README.md.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from buddygpt.cli.arguments import parse_arguments, require_count
from buddygpt.cli.checkpoints import save_tokenizer
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import write_atomically
from buddygpt.data.text.hubs import find_source_files
from buddygpt.data.text.rows import file_size, progress_bar, read_rows
from buddygpt.tokenizer.byte_level_bpe import FIXED_ENTRIES, train_byte_level_bpe

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"
# How `parse_response`, `transformers serve` and TRL find thoughts and calls in an answer; TRL's for Qwen3.
RESPONSE_TEMPLATE = Path(__file__).parent / "response_template.json"
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "old_ids.json"}
PIECE_LENGTH = 100_000  # characters; longer documents reach the trainer in pieces of this length


@dataclass
class TokenizerArguments:
    """What to train on, and how large the vocabulary becomes."""

    files: list[str] = field(
        metadata={
            "help": "Files or globs: .jsonl, .json, .parquet, .csv, .txt, also .gz; of a hub, hf://OWNER/NAME/... or ms://..."
        }
    )
    output: str = field(metadata={"help": "Tokenizer folder to write."})
    vocab_size: int = field(default=16384, metadata={"help": "Entries, including 256 bytes and the special tokens."})
    text_column: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns that may hold the text; the first found counts."}
    )
    max_bytes: int = field(
        default=50_000_000,
        metadata={"help": "Read at most this much text; each file contributes its share of the bytes on disk."},
    )
    min_frequency: int = field(
        default=2, metadata={"help": "Characters and pairs of tokens that occur less often get no entry."}
    )
    max_token_length: int = field(
        default=32,
        metadata={"help": "Longest entry in characters, a third of it for Chinese. Keeps boilerplate out."},
    )
    model_max_length: int = field(
        default=32768, metadata={"help": "The tokenizer warns about longer texts but does not truncate them."}
    )

    def __post_init__(self) -> None:
        for key in ("max_bytes", "min_frequency", "model_max_length"):
            require_count(key, getattr(self, key))
        require_count("vocab_size", self.vocab_size, 10_000_000)
        require_count("max_token_length", self.max_token_length, 10_000)


def main() -> None:
    (args,) = parse_arguments(TokenizerArguments, description=__doc__)
    output = Path(args.output)

    # Check everything that can be checked before reading gigabytes of text.
    if args.vocab_size < len(FIXED_ENTRIES):
        raise UserError(
            f"vocab_size {args.vocab_size} is too small: the 256 bytes and the special tokens already take "
            f"{len(FIXED_ENTRIES)} entries"
        )
    check_output(output)
    texts = read_all_texts(args.files, args.text_column, args.max_bytes)

    backend = train_byte_level_bpe(texts, args.vocab_size, args.min_frequency, args.max_token_length)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens={"document_separator_token": "<|endoftext|>"},
        model_max_length=args.model_max_length,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        response_template=json.loads(RESPONSE_TEMPLATE.read_text(encoding="utf-8")),
    )
    with write_atomically(output) as partial:
        save_tokenizer(tokenizer, partial)

    size = backend.get_vocab_size()
    print(f"{output}: {size:,} entries")
    if size < args.vocab_size:
        print(
            f"warning: `vocab_size` is {args.vocab_size}, but the text has no more pairs that occur "
            f"{args.min_frequency} times"
        )


def check_output(output: Path) -> None:
    """Raise UserError if `output` exists and is anything but a tokenizer folder of ours: it would be overwritten."""
    if not output.exists():
        return
    if not (output / "tokenizer.json").is_file():
        raise UserError(f"{output} exists and is not a tokenizer folder; choose another `output`")
    for path in sorted(output.glob("*")):
        if path.name not in TOKENIZER_FILES:
            raise UserError(f"{output} holds more than a tokenizer ({path.name}); choose another `output`")
    config = output / "tokenizer_config.json"
    is_trained_here = config.is_file() and '"document_separator_token"' in config.read_text(encoding="utf-8")
    if not is_trained_here and not (output / "old_ids.json").is_file():
        raise UserError(f"{output} holds a tokenizer from elsewhere; choose another `output`")


def read_all_texts(patterns: list[str], columns: list[str], max_bytes: int) -> list[str]:
    """Return the pieces of [`read_texts`] from files, globs or folders.

    Raises:
        UserError: No file matches, a row cannot be read, or there is no text.
    """
    files = list(dict.fromkeys(file for pattern in patterns for file in find_source_files(pattern)))
    texts = list(read_texts(files, columns, max_bytes))
    if not texts:
        raise UserError(f"there is no text in column `{'` or `'.join(columns)}` of {', '.join(patterns)}")
    return texts


def read_texts(files: list[str], columns: list[str], max_bytes: int) -> Iterator[str]:
    """Yield text in pieces of at most `PIECE_LENGTH` characters, in total at most `max_bytes` of UTF-8.

    Each file contributes its share of the bytes on disk.

    Raises:
        UserError: A row cannot be read.
    """
    sizes = {file: file_size(file) for file in files}
    with progress_bar(files, desc="reading") as bar:
        for file in files:
            budget = max_bytes * sizes[file] // max(sum(sizes.values()), 1)
            for piece in _read_pieces(file, columns, bar):
                budget -= len(piece.encode())
                if budget < 0:
                    break
                yield piece


def _read_pieces(file: str, columns: list[str], bar: tqdm) -> Iterator[str]:
    for row in read_rows(file, columns, bar, txt_sample_by="line"):
        if row.error:
            raise UserError(f"{file}:{row.number}: {row.error}")
        for start in range(0, len(row.content), PIECE_LENGTH):
            yield row.content[start : start + PIECE_LENGTH]


if __name__ == "__main__":
    run_script(main)
