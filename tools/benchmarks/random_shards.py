"""Token shards of random tokens and a tokenizer that fits them, for benchmarks that need the real file format."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from buddygpt.data.shards.format import FORMAT_VERSION, MANIFEST, documents_file, hash_shard, tokenizer_fingerprint


def make_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` words, 0 the end of a text and 1 the padding; saved in `folder`."""
    words = {f"w{number}": number for number in range(vocab_size)}
    backend = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", pad_token="w1", unk_token="w2")
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def make_shards(folder: Path, tokens: int, vocab_size: int, document: int = 200) -> Path:
    """`folder/shards` with `tokens` random tokens in documents of `document` tokens; `folder/tokenizer` beside it."""
    tokenizer, shards = make_tokenizer(folder / "tokenizer", vocab_size), folder / "shards"
    shards.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(3, vocab_size, tokens)
    ends = np.arange(document, tokens + 1, document, dtype="<u8")
    ids[ends.astype(int) - 1] = 0
    dtype = "uint16" if vocab_size < 2**16 else "uint32"
    ids.astype(f"<{dtype[0]}{2 if dtype == 'uint16' else 4}").tofile(shards / "random.ds")
    ends.tofile(shards / "random.ds.index")
    sizes = {"tokens": tokens, "documents": len(ends), "text_bytes": 4 * tokens}
    rows = {"id": [f"random:{number}" for number in range(len(ends))], "chars": [4 * document] * len(ends)}
    pq.write_table(pa.table(rows), shards / documents_file({"file": "random.ds"}))
    shard = {"file": "random.ds", "source": "random", **sizes, **hash_shard(shards, "random.ds")}
    source = {"name": "random", "language": None, **sizes, "epochs": 1, "share": 1}
    manifest = {"format_version": FORMAT_VERSION, "dtype": dtype, "eos_id": 0, "shards": [shard], "sources": [source]}
    manifest |= {"tokenizer": str(folder / "tokenizer"), "tokenizer_sha256": tokenizer_fingerprint(tokenizer), **sizes}
    (shards / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return shards
