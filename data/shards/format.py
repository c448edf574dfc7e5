"""Pretraining data on disk: a folder of token files with a manifest.

A shard is a datatrove token file with documents of one source: `NAME.ds` holds token ids one after another
(little-endian uint16 or uint32), a separator after every document, `NAME.ds.index` the end of every document in tokens
(uint64), and `NAME.documents.parquet` what each document is (see buddygpt.data.provenance). `manifest.json` says what
is in the folder, in which proportion it is to be read, and what it was made from; data/prepare_pretrain.py writes it.
"""

import hashlib
import json
import math
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_sha256

MANIFEST = "manifest.json"
FORMAT_VERSION = 3
REMEDY = "Make the shards again with data/prepare_pretrain.py."


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what two tokenizers share exactly when text means the same ids to both.

    It is the sha256 of the vocabulary, the merges and the added tokens with their ids, whatever file or format they
    were read from.

    Raises:
        UserError: The tokenizer has no `tokenizers` backend.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: only tokenizers with a `tokenizers` backend are supported")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    added = [[token["id"], token["content"]] for token in state["added_tokens"]]
    content = [model["vocab"], model.get("merges"), added]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a folder of token shards.

    Raises:
        UserError: It is missing, unreadable or of another version, or does not say how a source is to be read.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no folder of token shards: it has no {MANIFEST}. {REMEDY}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}. {REMEDY}") from error
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {found}, this code reads {FORMAT_VERSION}. {REMEDY}")
    described = {source["name"] for source in manifest["sources"]}
    for shard in manifest["shards"]:
        if shard["source"] not in described:
            raise UserError(f"{path}: `sources` lacks {shard['source']}, the source of {shard['file']}. {REMEDY}")
    for source in manifest["sources"]:
        epochs = source["epochs"]
        if not isinstance(epochs, int | float) or not 0 < epochs < math.inf:
            raise UserError(f"{path}: source {source['name']} has {epochs} epochs; write a number above 0")
    return manifest


def documents_file(shard: dict[str, Any]) -> str:
    """Return the name of the table of a shard's documents."""
    return str(Path(shard["file"]).with_suffix(".documents.parquet"))


def shard_files(shard: dict[str, Any]) -> dict[str, str]:
    """Return the names of a shard's files, by the key of the manifest that has their sha256."""
    file = shard["file"]
    return {"sha256": file, "index_sha256": f"{file}.index", "documents_sha256": documents_file(shard)}


def hash_shard(folder: Path, file: str) -> dict[str, str]:
    """Return what the manifest says of the content of a shard's files."""
    return {key: file_sha256(folder / name) for key, name in shard_files({"file": file}).items()}


def find_damage(folder: Path, shard: dict[str, Any], dtype: np.dtype, read: bool = False) -> list[str]:
    """Say of every file of a shard that is not as the manifest has it what is wrong.

    Args:
        folder: Where it lies.
        shard: Its entry in the manifest.
        dtype: Of a token.
        read: Compare what the files hold, not only their sizes.
    """
    sizes = {"sha256": shard["tokens"] * dtype.itemsize, "index_sha256": shard["documents"] * 8}
    found = []
    for key, name in shard_files(shard).items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing, though {MANIFEST} names it")
        elif (size := path.stat().st_size) != sizes.get(key, size):
            found.append(f"{path} holds {size} bytes where {MANIFEST} promises {sizes[key]}")
        elif read and file_sha256(path) != shard[key]:
            found.append(f"{path} was changed: its sha256 is not the one in {MANIFEST}")
    return found


def verify_shards(folder: str | Path) -> dict[str, Any]:
    """Read every shard again; return the manifest.

    Raises:
        UserError: Naming all damaged files, or as [`read_manifest`].
    """
    manifest = read_manifest(folder)
    shards = tqdm(manifest["shards"], desc=f"hashing {folder}", unit="shard", leave=False)
    dtype = np.dtype(manifest["dtype"])
    damages = [damage for shard in shards if (damage := find_damage(Path(folder), shard, dtype, read=True))]
    if damages:
        told = "; ".join(chain.from_iterable(damages))
        raise UserError(f"{len(damages)} of {len(manifest['shards'])} shards are damaged: {told}. {REMEDY}")
    return manifest


class TokenShards:
    """A folder of token files, checked against its manifest.

    Args:
        folder: What data/prepare_pretrain.py wrote: `OUT/train` or `OUT/eval`.
        source: Take only the shards of this one of `sources`.

    Raises:
        UserError: As [`read_manifest`], or a shard is missing or cut short.
    """

    def __init__(self, folder: str | Path, source: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        if source is not None:
            shards = [shard for shard in self.manifest["shards"] if shard["source"] == source]
            sums = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "text_bytes")}
            self.manifest |= {"shards": shards, **sums}
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        for shard in self.shards:
            if damage := find_damage(self.folder, shard, self.dtype):
                raise UserError(f"{damage[0]}. {REMEDY}")

    @property
    def eos_id(self) -> int:
        """Id of the separator that ends every document."""
        return self.manifest["eos_id"]

    @property
    def tokens(self) -> int:
        """Tokens in all shards, separators included."""
        return self.manifest["tokens"]

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return self.manifest["documents"]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents' text: what bits per byte are counted over."""
        return self.manifest["text_bytes"]

    @property
    def sources(self) -> dict[str, int]:
        """Tokens of each source that has shards."""
        tokens: Counter = Counter()
        for shard in self.shards:
            tokens[shard["source"]] += shard["tokens"]
        return dict(tokens)

    @property
    def epochs(self) -> dict[str, float]:
        """How often each source is read in an epoch of the mixture: `sources` of the manifest."""
        return {source["name"]: source["epochs"] for source in self.manifest["sources"]}

    @property
    def tokens_per_byte(self) -> float:
        """Tokens to a byte of text, of the text as it is read: each source for its epochs."""
        epochs = self.epochs
        read = [(epochs[shard["source"]], shard) for shard in self.shards]
        return sum(n * shard["tokens"] for n, shard in read) / sum(n * shard["text_bytes"] for n, shard in read)

    def verify(self) -> None:
        """As [`verify_shards`]."""
        verify_shards(self.folder)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError where the shards were not made with this tokenizer."""
        self.check_fingerprint(tokenizer.name_or_path, tokenizer_fingerprint(tokenizer))

    def check_fingerprint(self, name_or_path: str, given: str) -> None:
        """As [`TokenShards.check_tokenizer`], of a tokenizer with this fingerprint."""
        made = self.manifest["tokenizer_sha256"]
        if given != made:
            raise UserError(
                f"tokenizer {name_or_path} ({given[:12]}) is not the one that {self.folder} was made with, "
                f"{self.manifest['tokenizer']} ({made[:12]}). Use that one, or make the shards again with this one."
            )
