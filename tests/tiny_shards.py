"""Shards of random tokens in the format of data/prepare_pretrain.py, for tests that need no text."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from buddygpt.data.shards.format import FORMAT_VERSION, documents_file, hash_shard
from buddygpt.data.shards.mixture import resolve_mixture


class Shard(NamedTuple):
    """A shard to write; `documents` holds the lengths of its documents in tokens, separators included."""

    file: str
    source: str
    documents: list[int]
    language: str | None = None


def write_shards(folder: Path, shards: list[Shard], tokenizer_sha256: str = "", **epochs: float) -> Path:
    """Write shards and manifest. Each source is read once per mixture epoch, or as often as `epochs` says.

    Token ids are 2 to 63, and 0 ends a document. A token counts as two bytes of text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, sources = [], {}
    for file, source, documents, language in shards:
        facts = _write(folder, file, source, documents)
        entries.append({"file": file, "source": source, **hash_shard(folder, file), **facts})
        known = sources.setdefault(source, {"name": source, "language": language, "epochs": epochs.get(source, 1.0)})
        known |= {key: known.get(key, 0) + value for key, value in facts.items()}
    manifest = {"format_version": FORMAT_VERSION, "dtype": "uint16"}
    manifest |= {"tokenizer": "tiny", "tokenizer_sha256": tokenizer_sha256}
    manifest |= {key: sum(entry[key] for entry in entries) for key in ("tokens", "documents", "text_bytes")}
    manifest |= {"eos_id": 0, "shards": entries, "sources": resolve_mixture([*sources.values()])}
    manifest["generations"] = [{"shards": [shard.file for shard in shards]}]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def _write(folder: Path, file: str, source: str, documents: list[int]) -> dict[str, int]:
    size, ends = sum(documents), np.cumsum(documents, dtype="<u8")
    tokens = np.random.default_rng([*file.encode(), size]).integers(2, 64, size, dtype="<u2")
    tokens[ends - 1] = 0
    tokens.tofile(folder / file)
    ends.tofile(folder / f"{file}.index")
    rows = [{"id": f"{source}.jsonl:{n + 1}", "chars": length, "score": n / 8} for n, length in enumerate(documents)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / documents_file({"file": file}), row_group_size=3)
    return {"tokens": size, "documents": len(documents), "text_bytes": 2 * size}
