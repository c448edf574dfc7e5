"""Optional step: find exact copies or near-duplicates (MinHash) across all tasks and sources, and drop them.

The stages are those of datatrove's MinHash deduplication, with six changes:

- A shingle is `SHINGLE` units of `ngrams` (Han characters or words). datatrove's word tokenizers must know the
  language and need more libraries. With these shingles, unrelated pages have a similarity of at most 0.07 in Chinese
  and 0.11 in English; with shingles of five letters it would be 0.28 (500 pages of each language, all pairs).
- The hashes of a bucket are combined into one, which finds the same pairs in a third of the space.
- Pairs that share a bucket are compared by their sketches, the low bytes of all 192 hashes (b-bit minwise hashing, Li
  and König 2010). Two documents with Jaccard similarity s share a bucket with probability 1 - (1 - s^8)^24: 0.988 at
  0.8 (0.924 with datatrove's 14 buckets), but still 0.002 at 0.3, and a site with 1,000 pages of one layout has many
  such pairs.
- A pair below `SURE` is compared unit by unit: documents of one template with other names are no duplicates.
- The first document of each cluster by task and row is kept, with any executor and number of workers.
- The index holds signatures and sketches (datatrove's has hashes only), so an append round compares its documents as
  if all rounds were one run. Only names are not compared: the index has no units.

`exact` uses the same stages with one bucket, a hash of the text, and no sketches.
"""

import hashlib
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from buddygpt.cli.errors import UserError
from buddygpt.data.text.counts import RowCounts
from buddygpt.data.text.pipeline import DocumentReader, Stage, documents_path
from buddygpt.data.text.plan import FINGERPRINTS
from buddygpt.data.text.report import EXAMPLES, EXCERPT
from buddygpt.data.text.steps.ngrams import find_units, hash_ngrams, hash_units
from buddygpt.data.text.steps.templates import differ_in_names, pack_units

Method = Literal["exact", "minhash"]
SHINGLE = 5  # units
BUCKETS, HASHES = 24, 8  # HASHES are those of one bucket
SIMILAR = 0.65  # Jaccard similarity from which a pair counts as duplicates; the standard error of the estimate is 0.03
SURE = 0.9  # from which a pair counts as duplicates whatever it differs in
CHUNK = 256  # shingles permuted at once: as many as fit in the cache of a core
COMPARED = 2**16  # pairs compared at once
READ_AHEAD = 1000  # signatures of each task that a bucket reads at once
SPARE_FILES = 100  # files that a process may open in addition to the signatures
# Folders of the index. Fingerprints that other hashes made would match nothing.
INDEX_FOLDERS = {"exact": "exact", "minhash": f"minhash-{FINGERPRINTS}"}
ROWS = 2**32  # a document's number is task * ROWS + row


def duplicate_stages(method: Method, work: Path, tasks: int, index: Path | None = None, known: int = 0) -> list[Stage]:
    """Return the stages that find the documents of WORK/documents that [`DuplicateFilter`] drops.

    They leave an index of the documents in WORK/duplicates/index: 480 bytes per document, or 12 for `exact`. Copied
    into one folder, the indexes of all append rounds are what the next round is compared with.

    Args:
        method: `exact` finds equal texts; `minhash` finds similar texts, as the top of this file describes.
        work: Folder with documents/{rank:05d}.jsonl; the results go to WORK/duplicates.
        tasks: Number of files of documents.
        index: Folder with the index of earlier rounds. Duplicates of its documents are dropped too.
        known: Number of tasks in that index.

    Raises:
        UserError: A task is missing in `index`, or it was made with another method or by an older version.
    """
    index = Index(method, work / "duplicates" / "index", index, known)
    for number in range(known):
        file = index.signatures("bucket_000", number)
        if not file.is_file():
            if any(index.old.glob(f"{method}*")) and not (index.old / INDEX_FOLDERS[method]).is_dir():
                raise UserError(
                    f"{index.old} was made by an older version, with other fingerprints: duplicates of earlier "
                    "documents cannot be found. Prepare all text again, into another `output`"
                )
            raise UserError(f"{file} is missing: duplicates of earlier documents cannot be found. Restore the file")
    folder = _folder(work, method)
    return [
        Stage("signatures", [DocumentReader(work / "documents"), DuplicateSignature(index)], tasks),
        Stage("buckets", [DuplicatePairs(index, tasks, folder / "pairs")], _config(method).num_buckets),
        Stage("clusters", [DuplicateClusters(index, folder)], 1),
    ]


def _folder(work: Path, method: Method) -> Path:
    return work / "duplicates" / method


def shingles(text: str) -> np.ndarray:
    """Return a uint64 for each shingle of a text, or one hash of the text if it has no letter and no digit."""
    return _shingles(text, hash_units(text))


def _shingles(text: str, units: np.ndarray) -> np.ndarray:
    grams = hash_ngrams(units, SHINGLE)
    return grams if grams.size else np.array([_hash(text.encode())], np.uint64)


def _hash(data: bytes) -> int:
    """Return a hash of 60 bits: datatrove reads only signatures below 2^61 - 1."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 4


def _config(method: Method) -> MinhashConfig:
    return MinhashConfig(num_buckets=BUCKETS if method == "minhash" else 1, hashes_per_bucket=1)


class Index(NamedTuple):
    """The files with the signatures and sketches of each task. Tasks are numbered across all append rounds.

    Attributes:
        method: The method they are made with.
        new: Folder for the tasks of this round.
        old: Folder of the tasks of earlier rounds.
        known: Number of tasks of earlier rounds.
    """

    method: Method
    new: Path
    old: Path | None
    known: int

    def signatures(self, bucket: str, number: int) -> Path:
        """Return the file that datatrove writes for a bucket and a task."""
        return self._folder(number) / "signatures" / bucket / f"{number:05d}.minhash.sig"

    def sketches(self, number: int) -> Path:
        """Return the file with `BUCKETS` x `HASHES` bytes for each document of a task."""
        return self._folder(number) / "sketches" / f"{number:05d}.sketch"

    def units(self, number: int) -> Path:
        """Return the file with the units of each document of a task of this round. It is no part of the index."""
        return self.new.parent / "units" / f"{number:05d}.units"

    def _folder(self, number: int) -> Path:
        return (self.old if number < self.known else self.new) / INDEX_FOLDERS[self.method]


class DuplicateSignature(MinhashDedupSignature):
    """Writes a number per bucket and a sketch for each document to the index."""

    name = "signatures"

    def __init__(self, index: Index) -> None:
        # The tokenizer is not used; datatrove's default needs spaCy.
        super().__init__(
            str(index.new / INDEX_FOLDERS[index.method] / "signatures"), _config(index.method), WhitespaceTokenizer()
        )
        self.index, self.files = index, []  # sketches, units, ends of the units of each document
        self.end = 0
        random = np.random.RandomState(self.config.seed)
        self.factors, self.offsets = random.randint(0, 2**32, (2, BUCKETS * HASHES), dtype=np.uint32)
        self.factors |= np.uint32(1)  # x -> factor x + offset permutes the numbers below 2^32 if the factor is odd

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        number = self.index.known + rank
        sketches, units = self.index.sketches(number), self.index.units(number)
        self.end = 0
        with ExitStack() as stack:
            for path in (sketches, units, ends_file(units)):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.files.append(stack.enter_context(open(path, "wb")))
            super().run(data, number, world_size)
        self.files = []

    def get_shingles(self, text: str) -> np.ndarray:
        """Return the [`shingles`] of a text, or for exact duplicates one hash of it."""
        if self.index.method == "exact":
            return np.array([_hash(text.encode())], np.uint64)
        units, is_word = find_units(text)
        packed = pack_units(units, is_word)
        self.files[1].write(packed.tobytes())
        self.end += len(packed)
        self.files[2].write(self.end.to_bytes(8, "little"))
        return _shingles(text, units)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Return for each bucket a hash of the smallest values of its permutations."""
        if self.index.method == "exact":
            return [shingles.tolist()]
        values, smallest = shingles.astype(np.uint32), np.full(BUCKETS * HASHES, 2**32 - 1, np.uint32)
        for start in range(0, len(values), CHUNK):
            permuted = values[start : start + CHUNK, None] * self.factors + self.offsets
            np.minimum(smallest, permuted.min(axis=0), out=smallest)
        self.files[0].write(smallest.astype(np.uint8).tobytes())
        return [[_hash(bucket.tobytes())] for bucket in smallest.reshape(BUCKETS, HASHES)]


class DuplicatePairs(MinhashDedupBuckets):
    """Writes the pairs of documents that share a bucket, from this round and from the index of earlier rounds."""

    name = "buckets"

    def __init__(self, index: Index, tasks: int, folder: Path) -> None:
        super().__init__(str(index.new), str(folder), config=_config(index.method), lines_to_buffer=READ_AHEAD)
        self.only_dedup_in_index = False
        self.input_folder = _Signatures(index, index.known + tasks)


class _Signatures:
    """Shows datatrove the signature files of both folders of an index as the files of one folder."""

    def __init__(self, index: Index, tasks: int) -> None:
        self.index, self.tasks = index, tasks

    def list_files(self, subdirectory: str) -> list[Path]:
        return [self.index.signatures(subdirectory, number) for number in range(self.tasks)]

    def open_files(self, paths: list[Path], **options: Any) -> list[Any]:
        """Open all files at once, after raising the limit of open files if necessary."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = len(paths) + SPARE_FILES
        if hard != resource.RLIM_INFINITY and needed > hard:
            raise UserError(
                f"{len(paths)} tasks need {needed} open files, but the limit is {hard}; set fewer `tasks`, or raise "
                "`ulimit -Hn`"
            )
        if soft != resource.RLIM_INFINITY and needed > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return [fsspec.filesystem("file").open(str(path), **options) for path in paths]


class DuplicateClusters(PipelineStep):
    """Groups similar pairs into clusters, and lists the documents of each cluster except the first as duplicates.

    Memory grows with the number of duplicates, about 100 bytes each, not with the number of documents. datatrove's
    step keeps Python objects, and keeps the document of a cluster that its union by size happens to make the root.
    """

    type, name = "DEDUP", "clusters"

    def __init__(self, index: Index, folder: Path) -> None:
        super().__init__()
        self.index, self.folder = index, folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        known = self.index.known

        # Add the pairs of one bucket after another, and keep one link per duplicate.
        links = np.empty((0, 2), np.uint64)
        for file in sorted((self.folder / "pairs").glob("*.dups")):
            pairs = np.fromfile(file, "<u4").reshape(-1, 2, 2)  # (task, row) of two documents
            has_new = pairs[:, :, 0].max(axis=1) >= known  # pairs of earlier rounds have been decided
            pairs = pairs[has_new]
            if self.index.method == "minhash":
                pairs = self._find_duplicates(pairs, links)
            links = link_to_first(np.concatenate([links, number_documents(pairs)]))

        # Write the duplicates of this round to one file per task, in the order of their rows.
        links = links[links[:, 1] >> np.uint64(32) >= known]
        links = links[np.argsort(links[:, 1])]
        tasks, starts = np.unique(links[:, 1] >> np.uint64(32), return_index=True)
        (self.folder / "removed").mkdir(exist_ok=True)
        for task, part in zip(tasks.tolist(), np.split(links, starts[1:]), strict=False):
            part.astype("<u8").tofile(removed_file(self.folder, task - known))

    def _find_duplicates(self, pairs: np.ndarray, links: np.ndarray) -> np.ndarray:
        """Return the pairs that are duplicates, and not of one template. Pairs that `links` decides are left out.

        Args:
            pairs: uint32, (pairs, 2, 2): task and row of two documents that are next to each other in one bucket.
            links: uint64, (duplicates, 2): as [`link_to_first`] returns them.
        """
        similarity = self._similarity(pairs)
        is_sure = similarity >= SURE
        doubtful = pairs[(similarity >= SIMILAR) & ~is_sure]
        firsts = find_first(number_documents(doubtful), links)
        doubtful = doubtful[firsts[:, 0] != firsts[:, 1]]
        confirmed = [not differ_in_names(*map(self._read_units, pair)) for pair in doubtful.tolist()]
        # Documents of one template may be between two copies of another one in the bucket.
        return np.concatenate([pairs[is_sure], doubtful[confirmed], self._pair_equal_sketches(pairs)])

    def _pair_equal_sketches(self, pairs: np.ndarray) -> np.ndarray:
        """Return pairs of the documents of `pairs` that have equal sketches."""
        documents = np.unique(pairs.reshape(-1, 2), axis=0)
        sketches = [self._read_sketches(part) for part in np.array_split(documents, len(documents) // COMPARED + 1)]
        hashes = np.concatenate([hash_ngrams(each.T.astype(np.uint64), BUCKETS * HASHES)[0] for each in sketches])
        order = np.argsort(hashes, kind="stable")
        is_equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        return np.stack([documents[order[is_equal]], documents[order[is_equal + 1]]], axis=1)

    def _read_units(self, document: list[int]) -> np.ndarray:
        """Return the packed units of a document (task, row); none for a document of an earlier round."""
        number, row = document
        if number < self.index.known:
            return np.empty(0, np.uint16)
        file = self.index.units(number)
        ends = np.fromfile(ends_file(file), "<u8", count=min(row + 1, 2), offset=8 * max(row - 1, 0)).tolist()
        start = ends[0] if row else 0
        return np.fromfile(file, np.uint16, count=ends[-1] - start, offset=2 * start)

    def _similarity(self, pairs: np.ndarray) -> np.ndarray:
        """Estimate the Jaccard similarity of each pair as the share of equal bytes in the sketches.

        Args:
            pairs: uint32, (pairs, 2, 2): task and row of two documents.
        """
        found = np.empty(len(pairs))
        for start in range(0, len(pairs), COMPARED):
            part = slice(start, start + COMPARED)
            first, second = self._read_sketches(pairs[part, 0]), self._read_sketches(pairs[part, 1])
            found[part] = (first == second).mean(axis=1)
        return found

    def _read_sketches(self, documents: np.ndarray) -> np.ndarray:
        """Return uint8, (documents, BUCKETS * HASHES), for documents given as (task, row)."""
        sketches = np.empty((len(documents), BUCKETS * HASHES), np.uint8)
        for number in np.unique(documents[:, 0]).tolist():
            file = np.memmap(self.index.sketches(number), mode="r").reshape(-1, BUCKETS * HASHES)
            of_task = documents[:, 0] == number
            sketches[of_task] = file[documents[of_task, 1]]
        return sketches


def ends_file(units: Path) -> Path:
    """Return the file with a uint64 for each document of a file of units: the end of its units."""
    return units.with_suffix(".ends")


def number_documents(documents: np.ndarray) -> np.ndarray:
    """Return the numbers, task << 32 | row, of documents that are given as uint32, (..., 2): task and row."""
    wide = documents.astype(np.uint64)
    return wide[..., 0] << np.uint64(32) | wide[..., 1]


def find_first(documents: np.ndarray, links: np.ndarray) -> np.ndarray:
    """Return the first document of the cluster of each document, by `links` as [`link_to_first`] returns them."""
    if not len(links):
        return documents
    places = np.minimum(np.searchsorted(links[:, 1], documents), len(links) - 1)
    return np.where(links[places, 1] == documents, links[places, 0], documents)


def removed_file(folder: Path, rank: int) -> Path:
    """Return the file of a task's duplicates: links as [`link_to_first`] returns them, sorted by the duplicate."""
    return folder / "removed" / f"{rank:05d}.links"


def link_to_first(pairs: np.ndarray) -> np.ndarray:
    """Turn pairs of documents into links from the first document of each cluster to each other document of it.

    Args:
        pairs: uint64, (pairs, 2): numbers of documents, task << 32 | row.

    Returns:
        uint64, (duplicates, 2): first document of the cluster, duplicate.
    """
    nodes, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(pairs.shape)
    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    _, clusters = connected_components(graph, directed=False)
    _, firsts = np.unique(clusters, return_index=True)  # the smallest node, because nodes are sorted
    first = firsts[clusters]
    is_other = first != np.arange(len(nodes))
    return np.stack([nodes[first], nodes], axis=1)[is_other]


class DuplicateFilter(BaseFilter):
    """Drops the duplicates that [`duplicate_stages`] found, by document id.

    The first dropped documents of a task get `copy_of` in their metadata: id and text of the document that was kept.
    Memory is about 250 bytes for each duplicate of the task.

    Args:
        method, work, known: The same as for [`duplicate_stages`].
        exclusion_writer: Gets the dropped documents, with the rule `duplicate`.
    """

    name = "duplicates"

    def __init__(self, method: Method, work: Path, known: int = 0, exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.folder, self.documents, self.known = _folder(work, method), work / "documents", known
        self.counts = RowCounts()
        self.first_by_id: dict[str, int] = {}  # id of a duplicate: number of the first document of its cluster

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.first_by_id = self._read_duplicates(rank)
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        first = self.first_by_id.get(doc.id)
        if first is None:
            return True
        if self.counts.dropped["duplicate"] < EXAMPLES:
            doc.metadata["copy_of"] = self._describe(*divmod(first, ROWS))
        self.counts.add("dropped", "duplicate")
        return False, "duplicate"

    def _read_duplicates(self, rank: int) -> dict[str, int]:
        """Return the id of each duplicate of a task with the first document of its cluster. (Files list rows.)"""
        file = removed_file(self.folder, rank)
        if not file.exists():
            return {}
        links = np.fromfile(file, "<u8").reshape(-1, 2)
        rows = (links[:, 1] % ROWS).tolist()
        ids = [document["id"] for document in self._read_rows(rank, rows)]
        return dict(zip(ids, links[:, 0].tolist(), strict=True))

    def _describe(self, task: int, row: int) -> dict[str, str]:
        """Return `id` and `text` of the document that was kept, without text if it is from an earlier round."""
        if task < self.known:
            return {"id": "a document of an earlier append round", "text": ""}
        (document,) = self._read_rows(task - self.known, [row])
        return {"id": document["id"], "text": document["text"][: EXCERPT + 1]}

    def _read_rows(self, rank: int, rows: list[int]) -> Iterator[dict[str, Any]]:
        """Yield some of the documents that a task of the stage before wrote; `rows` are in ascending order."""
        wanted = iter(rows)
        next_row = next(wanted, None)
        with open(documents_path(self.documents, rank), "rb") as file:
            for row, line in enumerate(file):
                if next_row is None:
                    return
                if row == next_row:
                    yield orjson.loads(line)
                    next_row = next(wanted, None)
