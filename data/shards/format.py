"""Pretraining data on disk: a folder of token files with a manifest.

A shard holds documents of one source, as datatrove's token files do: `NAME.ds` has the token ids (little-endian uint16
or uint32) with a separator after every document, and `NAME.ds.index` the end of every document in tokens (uint64).
`NAME.documents.parquet` describes each document (see buddygpt.data.shards.trace). `manifest.json` lists the shards,
the mixture in which sources are read, and the inputs. data/prepare_pretrain.py writes all of it.
"""

import hashlib
import json
import math
import reprlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from buddygpt.cli.checkpoints import tokenizer_rules
from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_sha256, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "manifest.json"
FORMAT_VERSION = 3
REMEDY = "Prepare the shards again with data/prepare_pretrain.py."
INDEX_ENTRY_BYTES = 8
SIZES = ("tokens", "documents", "text_bytes")
DTYPES = ("uint16", "uint32")

# The fields that training and the commands read, with their types.
MANIFEST_FIELDS = dict.fromkeys((*SIZES, "eos_id"), int) | dict.fromkeys(
    ("dtype", "tokenizer", "tokenizer_sha256"), str
)
MANIFEST_FIELDS |= dict.fromkeys(("shards", "sources", "generations"), list)
SHARD_FIELDS = dict.fromkeys(SIZES, int) | dict.fromkeys(("file", "source", "sha256"), str)
SHARD_FIELDS |= dict.fromkeys(("index_sha256", "documents_sha256"), str)
SOURCE_FIELDS = dict.fromkeys(SIZES, int) | {"name": str, "epochs": object, "share": float, "language": str | None}


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a hash that is equal for two tokenizers exactly if both turn text into the same ids.

    It is the sha256 of the normalizer, the pre-tokenizer, the vocabulary, the merges and the added tokens with their
    ids, and does not depend on the file format of the tokenizer.

    Raises:
        UserError: The tokenizer has no `tokenizers` backend.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: only tokenizers with a `tokenizers` backend are supported")
    return _hash(tokenizer_rules(tokenizer.backend_tokenizer.to_str()))


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a folder of token shards.

    Raises:
        UserError: The manifest is missing, unreadable or of another version, lacks a source or its epochs, or has
            numbers that are not the sums of its shards.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a folder of token shards: it has no {MANIFEST}. {REMEDY}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {version}, this code reads {FORMAT_VERSION}. {REMEDY}")

    check_fields(path, manifest)
    described = {source["name"] for source in manifest["sources"]}
    for shard in manifest["shards"]:
        if shard["source"] not in described:
            raise UserError(f"{path}: `sources` lacks {shard['source']}, the source of {shard['file']}. {REMEDY}")
    for source in manifest["sources"]:
        epochs = source["epochs"]
        if not isinstance(epochs, int | float) or not 0 < epochs < math.inf:
            raise UserError(f"{path}: source {source['name']} has {epochs} epochs; write a number above 0")
    if wrong := find_wrong_sums(manifest):
        raise UserError(f"{path} was changed: {'; '.join(wrong)}. {REMEDY}")
    return manifest


def check_fields(path: Path, manifest: dict[str, Any]) -> None:
    """Raise UserError if a field of a manifest, of a shard or of a source is missing or has another type."""
    entries = [("", manifest, MANIFEST_FIELDS)]
    for key, fields in (("shards", SHARD_FIELDS), ("sources", SOURCE_FIELDS)):
        if isinstance(manifest.get(key), list):
            entries += [(f"{key}[{number}].", entry, fields) for number, entry in enumerate(manifest[key])]
    for place, entry, fields in entries:
        for key, kind in fields.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, kind) or (kind is int and value < 0):
                raise UserError(f"{path}: `{place}{key}` is {reprlib.repr(value)}. {REMEDY}")
    if manifest["dtype"] not in DTYPES:
        raise UserError(f"{path}: `dtype` is {manifest['dtype']}, must be one of {', '.join(DTYPES)}. {REMEDY}")
    for shard in manifest["shards"]:
        if Path(shard["file"]).name != shard["file"]:
            raise UserError(f"{path}: shard {shard['file']} is not in the folder of the manifest. {REMEDY}")


def find_wrong_sums(manifest: dict[str, Any]) -> list[str]:
    """Return one message for each number of a manifest that is not the sum of what its shards say."""
    parts = [("the manifest", manifest, manifest["shards"])]
    for source in manifest["sources"]:
        shards = [shard for shard in manifest["shards"] if shard["source"] == source["name"]]
        parts.append((f"source {source['name']}", source, shards))
    wrong = []
    for name, part, shards in parts:
        for key in SIZES:
            total = sum(shard[key] for shard in shards)
            if part[key] != total:
                wrong.append(f"{name} has {part[key]} {key}, its shards have {total}")
    return wrong


def documents_file(shard: dict[str, Any]) -> str:
    """Return the name of the table that describes a shard's documents."""
    return str(Path(shard["file"]).with_suffix(".documents.parquet"))


def shard_files(shard: dict[str, Any]) -> dict[str, str]:
    """Return the names of a shard's files, each under the manifest key of its sha256."""
    file = shard["file"]
    return {"sha256": file, "index_sha256": f"{file}.index", "documents_sha256": documents_file(shard)}


def hash_shard(folder: Path, file: str) -> dict[str, str]:
    """Return the sha256 of each of a shard's files, under its manifest key."""
    return {key: file_sha256(folder / name) for key, name in shard_files({"file": file}).items()}


def find_damage(folder: Path, shard: dict[str, Any], dtype: np.dtype, compare_hashes: bool = False) -> list[str]:
    """Return one message for each file of a shard that differs from the manifest.

    Args:
        folder: The folder of the shard.
        shard: The shard's entry in the manifest.
        dtype: Type of a token.
        compare_hashes: Read the files and compare their sha256, not only their sizes.
    """
    expected_sizes = {
        "sha256": shard["tokens"] * dtype.itemsize,
        "index_sha256": shard["documents"] * INDEX_ENTRY_BYTES,
    }
    damage = []
    for key, name in shard_files(shard).items():
        path = folder / name
        if not path.is_file():
            damage.append(f"{path} is missing, though {MANIFEST} names it")
            continue
        size = path.stat().st_size
        expected_size = expected_sizes.get(key, size)  # the manifest does not have the size of the table of documents
        if size != expected_size:
            damage.append(f"{path} holds {size} bytes, but {MANIFEST} says {expected_size}")
        elif compare_hashes and file_sha256(path) != shard[key]:
            damage.append(f"{path} was changed: its sha256 is not the one in {MANIFEST}")
    return damage


def verify_shards(folder: str | Path) -> dict[str, Any]:
    """Hash every file of every shard, compare `eos_id` and `share` with what they describe, and return the manifest.

    Raises:
        UserError: Files are damaged or these fields are wrong (the message names all of them), or as
            [`read_manifest`].
    """
    manifest = read_manifest(folder)
    dtype = np.dtype(manifest["dtype"])
    damaged_shards = 0
    messages: list[str] = []
    for shard in tqdm(manifest["shards"], desc=f"hashing {folder}", unit="shard", leave=False):
        damage = find_damage(Path(folder), shard, dtype, compare_hashes=True)
        if not damage:
            damage = _find_wrong_separator(Path(folder), shard, dtype, manifest["eos_id"])
        damaged_shards += bool(damage)
        messages.extend(damage)
    if messages:
        found = "; ".join(messages)
        raise UserError(f"{damaged_shards} of {len(manifest['shards'])} shards are damaged: {found}. {REMEDY}")
    _check_shares(Path(folder) / MANIFEST, manifest["sources"])
    return manifest


def _find_wrong_separator(folder: Path, shard: dict[str, Any], dtype: np.dtype, eos_id: int) -> list[str]:
    """Return a message if the tokens that end the documents of a shard are not the separator of the manifest."""
    if not shard["documents"]:
        return []
    ends = np.fromfile(folder / f"{shard['file']}.index", "<u8")
    if ends[-1] != shard["tokens"]:
        return [f"{folder / shard['file']}: its last document ends at token {ends[-1]} of {shard['tokens']}"]
    found = np.unique(np.memmap(folder / shard["file"], dtype.newbyteorder("<"), "r")[ends - 1])
    if found.tolist() == [eos_id]:
        return []
    return [
        f"{folder / shard['file']}: its documents end with token {found[0]}, but {MANIFEST} says `eos_id` {eos_id}"
    ]


def _check_shares(path: Path, sources: list[dict[str, Any]]) -> None:
    tokens_read = [source["epochs"] * source["tokens"] for source in sources]
    for source, tokens in zip(sources, tokens_read, strict=True):
        share = tokens / (sum(tokens_read) or 1)
        if not math.isclose(source["share"], share, abs_tol=1e-6):
            raise UserError(
                f"{path}: source {source['name']} has share {source['share']:.6g}, but its epochs and tokens give "
                f"{share:.6g}; correct it"
            )


class TokenShards:
    """A folder of token shards whose files have the sizes that its manifest says.

    Args:
        folder: A folder that data/prepare_pretrain.py wrote: `OUT/train` or `OUT/eval`.
        source: Take only the shards of this source.

    Raises:
        UserError: As [`read_manifest`], or a shard is missing or truncated.
    """

    def __init__(self, folder: str | Path, source: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        if source is not None:
            shards = [shard for shard in self.manifest["shards"] if shard["source"] == source]
            self.manifest["shards"] = shards
            for key in SIZES:
                self.manifest[key] = sum(shard[key] for shard in shards)
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        for shard in self.shards:
            damage = find_damage(self.folder, shard, self.dtype)
            if damage:
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
        """UTF-8 bytes of the documents' text, as used for bits per byte."""
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
        """Source epochs in one mixture epoch, by source."""
        return {source["name"]: source["epochs"] for source in self.manifest["sources"]}

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte of the text that a mixture epoch reads."""
        epochs = self.epochs
        tokens = sum(epochs[shard["source"]] * shard["tokens"] for shard in self.shards)
        text_bytes = sum(epochs[shard["source"]] * shard["text_bytes"] for shard in self.shards)
        return tokens / text_bytes

    def verify(self) -> None:
        """Hash every file of every shard, see [`verify_shards`]."""
        verify_shards(self.folder)

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise UserError if the shards were made with another tokenizer."""
        self.check_backend(tokenizer.name_or_path, tokenizer.backend_tokenizer.to_str())

    def check_backend(self, name_or_path: str, backend: str) -> None:
        """Raise UserError if the shards were made with another tokenizer.

        Args:
            name_or_path: The tokenizer's name in the message.
            backend: Its JSON.
        """
        expected = self.manifest["tokenizer_sha256"]
        rules = tokenizer_rules(backend)
        fingerprint = _hash(rules)
        # Manifests from before December 2026 have a hash without normalizer and pre-tokenizer.
        old = _hash([rules["vocab"], rules["merges"], rules["added"]])
        if expected not in (fingerprint, old):
            raise UserError(
                f"tokenizer {name_or_path} ({fingerprint[:12]}) is not the one that {self.folder} was made with, "
                f"{self.manifest['tokenizer']} ({expected[:12]}). Use that one, or prepare the shards again with this."
            )
