"""Finds documents that are there twice: exact copies, or near-duplicates by MinHash, across all tasks and sources.

datatrove's MinHash stages, with five things of our own.

- A shingle is `SHINGLE` units of `text_units`, Han characters or words: datatrove's word tokenizers need to know the
  language, and libraries for it. Pages that have nothing to do with each other are then no more than 0.07 similar in
  Chinese and 0.11 in English, where shingles of five letters would make it 0.28 (500 pages of each, all pairs).
- The hashes of a bucket are folded into one, which finds the same pairs in a third of the space.
- Pairs that meet in a bucket are compared by their sketches, the low bytes of all 192 hashes (b-bit minwise hashing,
  Li and Konig 2010). Two documents whose shingles have the Jaccard similarity s meet with probability
  1 - (1 - s^8)^24: 0.988 at 0.8 (datatrove's 14 buckets: 0.924), but still 0.002 at 0.3, and a site with 1,000 pages
  of one frame has many such pairs.
- Of every cluster the first document by task and row is kept, whatever the executor and the number of workers.
- An index holds signatures and sketches, where datatrove's has hashes alone: what is added is compared as it would be
  within one run.

`exact` goes the same way with one bucket, a hash of the text, and no sketches.
"""

import hashlib
import resource
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from buddygpt.cli.errors import UserError
from buddygpt.data.text.pipeline import DocumentReader, Stage, documents_path
from buddygpt.data.text.report import EXAMPLES, EXCERPT
from buddygpt.data.text.steps.ngrams import hash_ngrams, hash_units

Method = Literal["exact", "minhash"]
SHINGLE = 5  # units
BUCKETS, HASHES = 24, 8
SIMILAR = 0.65  # Jaccard similarity from which a pair counts; the estimate's standard error is 0.03
CHUNK = 256  # shingles permuted at once: what stays in a core's cache
COMPARED = 2**16  # pairs compared at once
READ_AHEAD = 1000  # signatures of each task that a bucket reads at once
SPARE_FILES = 100  # that a process has open besides
ROWS = 2**32  # a document is known by task x ROWS + row


def duplicate_stages(method: Method, work: Path, tasks: int, index: Path | None = None, known: int = 0) -> list[Stage]:
    """Return the stages that find what [`DuplicateFilter`] removes among WORK/documents.

    Leaves an index of the documents in WORK/duplicates/index, 480 bytes a document (`exact`: 12). Copied into one
    folder, the indexes of a corpus and of all that was appended to it are what the next text is compared with.

    Args:
        method: `exact`: the same text; `minhash`: nearly the same, as the module says.
        work: Holds documents/{rank:05d}.jsonl; everything goes to WORK/duplicates.
        tasks: Files of documents.
        index: Such a folder. Documents like those in it are removed too.
        known: Tasks that left something in it.

    Raises:
        UserError: `index` lacks a task, or is of another method.
    """
    index = Index(method, work / "duplicates" / "index", index, known)
    for file in (index.signatures("bucket_000", number) for number in range(known)):
        if not file.is_file():
            raise UserError(f"{file} is missing: copies of what was there before cannot be found. Bring it back")
    folder = _folder(work, method)
    return [
        Stage("signatures", [DocumentReader(work / "documents"), DuplicateSignature(index)], tasks),
        Stage("buckets", [DuplicatePairs(index, tasks, folder / "pairs")], _config(method).num_buckets),
        Stage("clusters", [DuplicateClusters(index, folder)], 1),
    ]


def _folder(work: Path, method: Method) -> Path:
    return work / "duplicates" / method


def shingles(text: str) -> np.ndarray:
    """Return a uint64 for every shingle of the text; for a text of no letter or digit, a hash of it."""
    grams = hash_ngrams(hash_units(text), SHINGLE)
    return grams if grams.size else np.array([_hash(text.encode())], np.uint64)


def _hash(data: bytes) -> int:
    """Hash to 60 bits: datatrove reads no signature from 2^61 - 1 on."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 4


def _config(method: Method) -> MinhashConfig:
    return MinhashConfig(num_buckets=BUCKETS if method == "minhash" else 1, hashes_per_bucket=1)


class Index(NamedTuple):
    """Where the signatures and sketches of a task lie; tasks are numbered through all that was ever appended.

    Attributes:
        method: By which they are made.
        new: Folder for the tasks of this run.
        old: Folder with those of what was there before.
        known: How many these are.
    """

    method: Method
    new: Path
    old: Path | None
    known: int

    def signatures(self, bucket: str, number: int) -> Path:
        """Return a file as datatrove writes it."""
        return self._folder(number) / "signatures" / bucket / f"{number:05d}.minhash.sig"

    def sketches(self, number: int) -> Path:
        """Return a file with `BUCKETS` x `HASHES` bytes for every document of a task."""
        return self._folder(number) / "sketches" / f"{number:05d}.sketch"

    def _folder(self, number: int) -> Path:
        return (self.old if number < self.known else self.new) / self.method


class DuplicateSignature(MinhashDedupSignature):
    """Writes for every document a number for each bucket, and its sketch, to the index."""

    name = "signatures"

    def __init__(self, index: Index) -> None:
        # The tokenizer is never asked; datatrove's default needs spaCy.
        super().__init__(str(index.new / index.method / "signatures"), _config(index.method), WhitespaceTokenizer())
        self.index, self.file = index, None
        random = np.random.RandomState(self.config.seed)
        self.factors, self.offsets = random.randint(0, 2**32, (2, BUCKETS * HASHES), dtype=np.uint32)
        self.factors |= np.uint32(1)  # x -> factor x + offset permutes the numbers below 2^32 if the factor is odd

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        number = self.index.known + rank
        self.index.sketches(number).parent.mkdir(parents=True, exist_ok=True)
        with open(self.index.sketches(number), "wb") as self.file:
            super().run(data, number, world_size)
        self.file = None

    def get_shingles(self, text: str) -> np.ndarray:
        """Return [`shingles`], or for exact duplicates one hash of the text."""
        return shingles(text) if self.index.method == "minhash" else np.array([_hash(text.encode())], np.uint64)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Return for every bucket a hash of its permutations' smallest values."""
        if self.index.method == "exact":
            return [shingles.tolist()]
        values, smallest = shingles.astype(np.uint32), np.full(BUCKETS * HASHES, 2**32 - 1, np.uint32)
        for start in range(0, len(values), CHUNK):
            permuted = values[start : start + CHUNK, None] * self.factors + self.offsets
            np.minimum(smallest, permuted.min(axis=0), out=smallest)
        self.file.write(smallest.astype(np.uint8).tobytes())
        return [[_hash(bucket.tobytes())] for bucket in smallest.reshape(BUCKETS, HASHES)]


class DuplicatePairs(MinhashDedupBuckets):
    """Writes the pairs that meet in a bucket, of this run's documents and of those in the index."""

    name = "buckets"

    def __init__(self, index: Index, tasks: int, folder: Path) -> None:
        super().__init__(str(index.new), str(folder), config=_config(index.method), lines_to_buffer=READ_AHEAD)
        self.only_dedup_in_index = False
        self.input_folder = _Signatures(index, index.known + tasks)


class _Signatures:
    """The files of both folders of an index, for datatrove to read as those of one."""

    def __init__(self, index: Index, tasks: int) -> None:
        self.index, self.tasks = index, tasks

    def list_files(self, subdirectory: str) -> list[Path]:
        return [self.index.signatures(subdirectory, number) for number in range(self.tasks)]

    def open_files(self, paths: list[Path], **options: Any) -> list[Any]:
        """Open all of them at once, for which a process has to be allowed many files."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = len(paths) + SPARE_FILES
        if hard != resource.RLIM_INFINITY and needed > hard:
            raise UserError(
                f"{len(paths)} tasks need {needed} open files of {hard}; set fewer `tasks`, or `ulimit -Hn`"
            )
        if soft != resource.RLIM_INFINITY and needed > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return [fsspec.filesystem("file").open(str(path), **options) for path in paths]


class DuplicateClusters(PipelineStep):
    """Joins the pairs that are similar to clusters and lists their documents, but the first, as what to remove.

    Memory grows with the duplicates, about 100 bytes each, not with the documents. datatrove's own step keeps
    Python objects, and of each cluster the document that its union by size makes the root.
    """

    type, name = "DEDUP", "clusters"

    def __init__(self, index: Index, folder: Path) -> None:
        super().__init__()
        self.index, self.folder = index, folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        links = np.empty((0, 2), np.uint64)
        for file in sorted((self.folder / "pairs").glob("*.dups")):
            pairs = np.fromfile(file, "<u4").reshape(-1, 2, 2)  # (task, row) of two documents
            pairs = pairs[pairs[:, :, 0].max(axis=1) >= self.index.known]  # the others are settled
            if self.index.method == "minhash":
                pairs = pairs[self._similarity(pairs) >= SIMILAR]
            pairs = pairs.astype(np.uint64)
            links = link_to_first(np.concatenate([links, pairs[:, :, 0] << np.uint64(32) | pairs[:, :, 1]]))
        links = links[links[:, 1] >> np.uint64(32) >= self.index.known]
        links = links[np.argsort(links[:, 1])]
        tasks, starts = np.unique(links[:, 1] >> np.uint64(32), return_index=True)
        (self.folder / "removed").mkdir(exist_ok=True)
        for task, part in zip(tasks.tolist(), np.split(links, starts[1:]), strict=False):
            part.astype("<u8").tofile(removed_file(self.folder, task - self.index.known))
        self.stat_update("duplicates", value=len(links))

    def _similarity(self, pairs: np.ndarray) -> np.ndarray:
        """Estimate the Jaccard similarity by the hashes in common."""
        found = np.empty(len(pairs))
        for start in range(0, len(pairs), COMPARED):
            part = slice(start, start + COMPARED)
            first, second = (self._read_sketches(pairs[part, side]) for side in (0, 1))
            found[part] = (first == second).mean(axis=1)
        return found

    def _read_sketches(self, documents: np.ndarray) -> np.ndarray:
        sketches = np.empty((len(documents), BUCKETS * HASHES), np.uint8)
        for number in np.unique(documents[:, 0]).tolist():
            file = np.memmap(self.index.sketches(number), mode="r").reshape(-1, BUCKETS * HASHES)
            sketches[documents[:, 0] == number] = file[documents[documents[:, 0] == number, 1]]
        return sketches


def removed_file(folder: Path, rank: int) -> Path:
    """Return the file of a task's duplicates: uint64, (duplicates, 2), as [`link_to_first`] has them, in order."""
    return folder / "removed" / f"{rank:05d}.links"


def link_to_first(pairs: np.ndarray) -> np.ndarray:
    """Turn pairs of documents into one pair (first of its cluster, document) for every document that is not first.

    Args:
        pairs: uint64, (pairs, 2); a document is task << 32 | row.
    """
    nodes, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(pairs.shape)
    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    _, clusters = connected_components(graph, directed=False)
    _, firsts = np.unique(clusters, return_index=True)  # the smallest, because nodes are sorted
    first = firsts[clusters]
    is_other = first != np.arange(len(nodes))
    return np.stack([nodes[first], nodes], axis=1)[is_other]


class DuplicateFilter(BaseFilter):
    """Drops the duplicates which [`duplicate_stages`] found, and says of the first in `copy_of` what was kept.

    It counts the documents: it has to stand right behind the reader of WORK/documents.

    Args:
        method, work, known: As of [`duplicate_stages`].
        exclusion_writer: Gets what is dropped, as `duplicate`.
    """

    name = "duplicates"

    def __init__(self, method: Method, work: Path, known: int = 0, exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.folder, self.documents, self.known = _folder(work, method), work / "documents", known

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        file = removed_file(self.folder, rank)
        self.links = (np.fromfile(file, "<u8") if file.exists() else np.empty(0, "<u8")).reshape(-1, 2)
        self.row, self.dropped = -1, 0
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        self.row += 1
        if self.dropped == len(self.links) or int(self.links[self.dropped, 1]) % ROWS != self.row:
            return True
        if self.dropped < EXAMPLES:
            doc.metadata["copy_of"] = self._describe(*divmod(int(self.links[self.dropped, 0]), ROWS))
        self.dropped += 1
        return False, "duplicate"

    def _describe(self, task: int, row: int) -> dict[str, str]:
        """Return `id` and `text` of a document; no text where it was there before this run."""
        if task < self.known:
            return {"id": "a document that was there before", "text": ""}
        with open(documents_path(self.documents, task - self.known), "rb") as file:
            document = orjson.loads(next(islice(file, row, None)))
        return {"id": document["id"], "text": document["text"][: EXCERPT + 1]}
