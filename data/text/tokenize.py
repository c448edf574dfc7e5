"""Tokenize documents and write them as token shards: the last step that handles documents.

The tokenizer is read once, by the command. Tasks load only its JSON, with the `tokenizers` library.
"""

import io
import json
import sys
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.tokenization import PipelineStepWithTokenizer
from pyarrow.json import ParseOptions, ReadOptions, read_json
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError
from buddygpt.data.shards.format import documents_file, hash_shard, tokenizer_fingerprint
from buddygpt.data.text.counts import HELD_OUT, RowCounts
from buddygpt.data.text.hold_out import is_held_out
from buddygpt.data.text.pipeline import documents_path, write_document

pa.set_memory_pool(pa.system_memory_pool())  # the default pool keeps the memory it has freed


class TextTokenizer(NamedTuple):
    """A tokenizer for plain text, in which nothing becomes a special token.

    Attributes:
        facts: `tokenizer`, `tokenizer_sha256`, `vocab_size`, `dtype`, `separator` and `eos_id`, for the manifest.
        state: The JSON that [`raw_text_tokenizer`] returns.
    """

    facts: dict[str, Any]
    state: str


def read_text_tokenizer(name_or_path: str, separator: str) -> TextTokenizer:
    """Return what [`describe_tokenizer`] returns, without importing `AutoTokenizer` into this process.

    `AutoTokenizer` takes 300 MB, which no stage needs, so another process imports it. If torch is in memory already,
    another process would save nothing.
    """
    if "torch" in sys.modules:
        return describe_tokenizer(name_or_path, separator)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(describe_tokenizer, name_or_path, separator).result()


def describe_tokenizer(name_or_path: str, separator: str) -> TextTokenizer:
    """Read the tokenizer of a folder or of the Hub.

    Raises:
        UserError: There is none, it has no `tokenizers` backend, or the separator is not one of its special tokens.
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
    """Return the tokenizer's JSON with the separator and every token of its chat template marked as special.

    The tokenizer of [`ShardWriter`] splits tokens that are marked special like any other text, so that text which
    contains `<|im_end|>` never becomes the token. Some tokens of chat templates lack the mark, such as Qwen's
    `<tool_call>`.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    template = f"{separator} {tokenizer.chat_template}"
    for token in state["added_tokens"]:
        is_blank = not token["content"].strip()  # tokens for plain text, such as two spaces
        if token["content"] in template and not is_blank:
            token["special"] = True
    return json.dumps(state, ensure_ascii=False)


def token_dtype(vocabulary: dict[str, int]) -> np.dtype:
    """Return the smallest type that holds every id: uint16 or uint32, little-endian.

    (datatrove chooses by the number of tokens, which is too small a type if there are gaps in the ids.)
    """
    largest = max(vocabulary.values())
    return np.dtype("<u2" if largest <= np.iinfo(np.uint16).max else "<u4")


class HoldOut(PipelineStep):
    """Sets documents aside for evaluation, chosen by a hash of their text.

    The choice does not depend on the order of the documents, and equal texts are treated alike.

    Args:
        fraction: The share of documents to set aside.
        folder: Where a [`DocumentReader`] will read the documents set aside.
    """

    type, name = "FILTER", "hold out"

    def __init__(self, fraction: float, folder: Path) -> None:
        super().__init__()
        self.fraction, self.folder = fraction, folder
        self.counts = RowCounts()

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(documents_path(self.folder, rank), "wb") as file:
            for document in data:
                if not is_held_out(document.text, self.fraction):
                    yield document
                else:
                    self.counts.add("dropped", HELD_OUT)
                    write_document(file, document)


class ShardWriter(PipelineStepWithTokenizer):
    """Writes the documents of a task as shards, and their entries for the manifest to LISTS/{rank:05d}.json.

    Text that looks like a special token is encoded as text. The order of the documents in a shard depends only on the
    seed and the task. Memory holds one batch of documents, and about 200 bytes for each document of a shard.

    Args:
        folder: Where the shards go: PREFIX_{rank:05d}_{part:05d}.ds, .ds.index and .documents.parquet.
        lists: Where the entries for the manifest go.
        tokenizer: A file with the state of a [`TextTokenizer`].
        separator: The token that follows every document.
        prefix: First part of the file names.
        shuffle_seed: Seed of the order; None keeps the order of the input.
        shard_bytes: UTF-8 bytes of text after which a new shard starts, at the end of a batch.
        batch_chars: Characters that are tokenized at once.
        dtype: Type of a token: `uint16` or `uint32`.
    """

    type, name = "WRITER", "shards"

    def __init__(
        self,
        folder: Path,
        lists: Path,
        tokenizer: Path,
        separator: str,
        prefix: str,
        shuffle_seed: int | None,
        shard_bytes: int,
        batch_chars: int,
        dtype: str,
    ) -> None:
        super().__init__(str(tokenizer), separator)
        self.folder, self.lists, self.prefix = folder, lists, prefix
        self.shuffle_seed, self.shard_bytes, self.batch_chars = shuffle_seed, shard_bytes, batch_chars
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.counts = RowCounts()

    @cached_property
    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer` that appends the separator and encodes special tokens as text."""
        tokenizer = super().tokenizer
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        for folder in (self.folder, self.lists):
            folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng([self.shuffle_seed or 0, rank])
        entries = []
        documents = iter(data)
        # Each round takes the first document here, and _write_shard takes more from the same iterator.
        for first in documents:
            name = f"{self.prefix}_{rank:05d}_{len(entries):05d}.ds"
            entries.append(self._write_shard(chain([first], documents), name, random))
        (self.lists / f"{rank:05d}.json").write_text(json.dumps(entries), encoding="utf-8")

    def _write_shard(self, data: Iterator[Document], name: str, random: np.random.Generator) -> dict[str, Any]:
        """Write one shard of the next documents, and return its entry for the manifest."""
        path = self.folder / name
        table = DocumentTable()
        ends = array("Q")  # where each document ends, in tokens
        tokens = text_bytes = 0

        # Write the tokens in the order of the input, until the shard is full.
        with open(path, "wb") as file:
            for batch in self._batches(data):
                encodings = self.tokenizer.encode_batch_fast([document.text for document in batch])
                for document, encoding in zip(batch, encodings, strict=True):
                    file.write(np.array(encoding.ids, self.dtype).tobytes())
                    tokens += len(encoding.ids)
                    ends.append(tokens)
                    text_bytes += len(document.text.encode())
                    table.add(document)
                if text_bytes >= self.shard_bytes:
                    break

        # Shuffle the documents on disk, and write the index and the table in the new order.
        ends, order = np.array(ends), np.arange(len(ends))
        if self.shuffle_seed is not None:
            random.shuffle(order)
            ends = reorder_documents(path, ends, order, self.dtype.itemsize)
        ends.astype("<u8").tofile(f"{path}.index")
        table.write(self.folder / documents_file({"file": name}), order)

        self.counts.add("written", count=len(ends))
        return {
            "file": name,
            "source": table.source,
            "tokens": tokens,
            "documents": len(ends),
            "text_bytes": text_bytes,
            **hash_shard(self.folder, name),
        }

    def _batches(self, data: Iterator[Document]) -> Iterator[list[Document]]:
        """Yield batches that end with the document that reaches `batch_chars` characters."""
        batch, chars = [], 0
        for document in data:
            batch.append(document)
            chars += len(document.text)
            if chars >= self.batch_chars:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch


def reorder_documents(path: Path, ends: np.ndarray, order: np.ndarray, token_size: int) -> np.ndarray:
    """Reorder the documents of a token file, and return their new ends.

    Args:
        path: The token file; it is replaced.
        ends: uint64, (documents,): where each document ends, in tokens.
        order: int64, (documents,): the old number of each document.
        token_size: Bytes per token.
    """
    lengths = np.diff(ends, prepend=np.uint64(0))
    reordered = path.with_suffix(".reordered")
    with open(path, "rb") as old, open(reordered, "wb") as new:
        for number in order.tolist():
            length = int(lengths[number])
            old.seek((int(ends[number]) - length) * token_size)
            new.write(old.read(length * token_size))
    reordered.replace(path)
    return np.cumsum(lengths[order], dtype=np.uint64)


class DocumentTable:
    """The table of a shard's documents: id, length in characters, and every number in their metadata.

    Rows are kept as JSON, which takes less memory than Python objects, and pyarrow reads JSON without importing
    pandas (50 MB).
    """

    def __init__(self) -> None:
        self.source: str | None = None
        self._rows = io.BytesIO()

    def add(self, document: Document) -> None:
        """Append a row."""
        self.source = document.metadata["source"]
        row = {key: float(value) for key, value in document.metadata.items() if type(value) in (int, float)}
        row |= {"id": document.id, "chars": len(document.text)}
        self._rows.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

    def write(self, path: Path, order: np.ndarray) -> None:
        """Write the rows in a new order, with a column for each name that any document has."""
        self._rows.seek(0)
        # An explicit type keeps pyarrow from reading an id that looks like a date as one.
        schema = pa.schema([("id", pa.string()), ("chars", pa.int64())])
        table = read_json(self._rows, ReadOptions(use_threads=False), ParseOptions(explicit_schema=schema))
        numbers = pa.Array.from_buffers(pa.int64(), len(order), [None, pa.py_buffer(order)])
        pq.write_table(table.take(numbers), path, compression="zstd", use_dictionary=False)
