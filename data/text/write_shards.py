"""Documents to token shards: what is held out, the token files themselves, and the table of their documents."""

import hashlib
import io
import json
from array import array
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.tokenization import PipelineStepWithTokenizer
from pyarrow.json import ParseOptions, ReadOptions, read_json

from buddygpt.data.shards.format import documents_file, hash_shard
from buddygpt.data.text.pipeline import documents_path, write_document

pa.set_memory_pool(pa.system_memory_pool())  # the default one keeps what it has freed


class HoldOut(PipelineStep):
    """Sets documents aside by a hash of their text: the same ones in any order, and copies all on one side.

    Args:
        fraction: The share that is set aside.
        folder: Where to, for a [`DocumentReader`].
    """

    type, name = "FILTER", "hold out"

    def __init__(self, fraction: float, folder: Path) -> None:
        super().__init__()
        self.fraction, self.folder = fraction, folder

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(documents_path(self.folder, rank), "wb") as file:
            for document in data:
                digest = hashlib.sha256(document.text.encode()).digest()
                if int.from_bytes(digest[:8], "big") >= self.fraction * 2**64:
                    yield document
                else:
                    self.stat_update("dropped_held_out")
                    write_document(file, document)


class ShardWriter(PipelineStepWithTokenizer):
    """Writes the documents of a task as shards, and what it wrote to LISTS/{rank:05d}.json.

    Nothing that stands in a text becomes a special token. The documents of a shard are in an order that follows from
    the seed and the task. Memory is that of one batch, and some 200 bytes for every document of a shard.

    Args:
        folder: Where the shards go: PREFIX_{rank:05d}_{part:05d}.ds, .ds.index and .documents.parquet.
        lists: Where the entries for the manifest go.
        tokenizer: The file with the state of a [`TextTokenizer`].
        separator: The token after every document.
        prefix: What the names begin with.
        shuffle_seed: None keeps the order.
        shard_bytes: UTF-8 bytes of text after which another shard begins, as soon as a batch is complete.
        batch_chars: Characters tokenised at once.
        dtype: Of a token: `uint16` or `uint32`.
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

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = super().tokenizer
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        for folder in (self.folder, self.lists):
            folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng([self.shuffle_seed or 0, rank])
        data, entries = iter(data), []
        for first in data:  # the rest of a shard is taken from the same iterator
            name = f"{self.prefix}_{rank:05d}_{len(entries):05d}.ds"
            entries.append(self._write_shard(chain([first], data), name, random))
        (self.lists / f"{rank:05d}.json").write_text(json.dumps(entries), encoding="utf-8")

    def _write_shard(self, data: Iterator[Document], name: str, random: np.random.Generator) -> dict[str, Any]:
        """Write one shard of what comes next, and return its entry in the manifest."""
        path, table, ends = self.folder / name, DocumentTable(), array("Q")
        tokens = text_bytes = 0
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
        ends, order = np.array(ends), np.arange(len(ends))
        if self.shuffle_seed is not None:
            random.shuffle(order)
            ends = reorder_documents(path, ends, order, self.dtype.itemsize)
        ends.astype("<u8").tofile(f"{path}.index")
        table.write(self.folder / documents_file({"file": name}), order)
        self.stat_update("written", value=len(ends))
        sizes = {"tokens": tokens, "documents": len(ends), "text_bytes": text_bytes}
        return {"file": name, "source": table.source, **sizes, **hash_shard(self.folder, name)}

    def _batches(self, data: Iterator[Document]) -> Iterator[list[Document]]:
        """Yield documents of `batch_chars` together, or a longer one alone."""
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
    """Bring the documents of a token file into another order; return where they end then.

    Args:
        path: The token file; it is replaced.
        ends: Where its documents end, in tokens.
        order: The old number of every document.
        token_size: Bytes of a token.
    """
    lengths = np.diff(ends, prepend=np.uint64(0))
    beside = path.with_suffix(".reordered")
    with open(path, "rb") as old, open(beside, "wb") as new:
        for number in order.tolist():
            length = int(lengths[number])
            old.seek((int(ends[number]) - length) * token_size)
            new.write(old.read(length * token_size))
    beside.replace(path)
    return np.cumsum(lengths[order], dtype=np.uint64)


class DocumentTable:
    """What the documents of a shard are: id, length in characters, and every number of their metadata.

    Rows are kept as JSON: less than Python objects take, and pyarrow reads it without importing pandas (50 MB).
    """

    def __init__(self) -> None:
        self.source: str | None = None
        self._rows = io.BytesIO()

    def add(self, document: Document) -> None:
        self.source = document.metadata["source"]
        row = {key: float(value) for key, value in document.metadata.items() if type(value) in (int, float)}
        row |= {"id": document.id, "chars": len(document.text)}
        self._rows.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

    def write(self, path: Path, order: np.ndarray) -> None:
        """Write the rows in another order, a column for each name that any document has."""
        self._rows.seek(0)
        schema = pa.schema([("id", pa.string()), ("chars", pa.int64())])  # a name may look like a date
        table = read_json(self._rows, ReadOptions(use_threads=False), ParseOptions(explicit_schema=schema))
        numbers = pa.Array.from_buffers(pa.int64(), len(order), [None, pa.py_buffer(order)])
        pq.write_table(table.take(numbers), path, compression="zstd", use_dictionary=False)
