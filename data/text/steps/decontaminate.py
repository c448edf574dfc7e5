"""Optional step: drop documents that contain questions of the benchmarks on which a model will be evaluated.

Questions are cut into n-grams of the units of `ngrams` (Han characters and words), because copies differ in width,
case, spaces and punctuation. Single letters a to d are left out, because copies also mark the options differently. A
text contains a question if, within a span of a few times the question's length, it has at least `COVERED` of the
n-grams of the question and `COVERED` of the n-grams of its options. These are shares of the benchmark's item, as in
PaLM (Chowdhery et al. 2022, section 8: 70% of the 8-grams of a question), not of the document, and not a single n-gram
as in GPT-3. So a law or a novel that a benchmark quotes is kept: it has the words of the question, but not the wrong
options.

If an item has a passage that its question is about, the passage counts as part of the question, and `COVERED` of the
question without the passage must be there too: a text with the passage alone is kept.

A question is also found without its options if it has at least `MIN_UNITS` units, or `MIN_SHARED` if several items
share it ("which of the following is true" is no question), and if `COVERED_ALONE` of it is in a text of up to
`MAX_LENGTH` n-grams. In longer texts such a match is usually a quotation of the same source. Shorter questions ("the
capital of China is") occur in ordinary text.

The whole document is dropped: a text with benchmark items and their options seldom has any other content.
"""

import json
import sys
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from tqdm import tqdm

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import find_files
from buddygpt.data.text.benchmarks import BENCHMARK_TYPES, read_benchmarks
from buddygpt.data.text.counts import RowCounts
from buddygpt.data.text.steps.ngrams import hash_ngrams, hash_units

NGRAM = 6  # units: the length of the shortest items of MMLU
COVERED = 0.75
COVERED_ALONE, MIN_UNITS, MIN_SHARED = 0.9, 8, 12  # for a question without its options
MAX_LENGTH = 4000  # n-grams of a text
OPTION_MARKS = hash_units("a b c d")
FILTER_BITS = 23  # bits of a hash that one lookup checks, which rules out most n-grams that no benchmark has


class Decontaminator(BaseFilter):
    """Drops documents that contain a benchmark item, by the rule `exam_NAME`, and adds the item as `exam_item`.

    Args:
        folder: Folder of the index that a [`BenchmarkIndexer`] wrote.
        exclusion_writer: Gets the dropped documents.
    """

    name = "decontamination"

    def __init__(self, folder: Path, exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.folder = folder
        self.counts = RowCounts()

    @cached_property
    def index(self) -> "BenchmarkIndex":
        """The index, opened by the task that needs it."""
        return BenchmarkIndex(self.folder)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        items = self.index.find(doc.text)
        if not items:
            return True
        doc.metadata["exam_item"] = items[0]
        benchmark = items[0].split("/")[0]
        self.counts.add("dropped", f"exam_{benchmark}")
        return False, f"exam_{benchmark}"


class BenchmarkIndexer(PipelineStep):
    """Runs [`build_index`] as a stage of one task.

    Raises:
        UserError: A benchmark has no files.
    """

    type, name = "DECONT", "benchmarks"

    def __init__(self, paths: list[str], folder: Path) -> None:
        super().__init__()
        find_files(paths, BENCHMARK_TYPES)  # raises before any stage runs
        self.paths, self.folder = paths, folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        build_index(self.paths, self.folder)


def build_index(paths: list[str], folder: Path) -> "BenchmarkIndex":
    """Write the n-grams of all items of the benchmarks to a folder, and open it.

    Args:
        paths: The benchmarks, as [`read_benchmarks`] takes them.
        folder: Where to write the index.

    Raises:
        UserError: A benchmark cannot be read, or every question is too short.
    """
    items = _hash_items(paths)
    uses = Counter(item.units[: item.question].tobytes() for item in items)

    # For each item: the number of n-grams of its question and of the whole, whether the question is enough, and the
    # first n-gram that is not of the passage only.
    table, grams = [], []
    for item in items:
        grams.append(hash_ngrams(item.units, NGRAM))
        is_shared = uses[item.units[: item.question].tobytes()] > 1
        is_enough = item.question >= (MIN_SHARED if is_shared else MIN_UNITS)
        last = max(0, item.question - NGRAM)
        table.append((max(0, item.question - NGRAM + 1), len(grams[-1]), is_enough, min(item.context, last)))

    # For each n-gram: its hash, item and position in the item, sorted by hash.
    counts = np.array([len(each) for each in grams])
    numbers = np.repeat(np.arange(len(grams)), counts)
    positions = np.concatenate([np.arange(count) for count in counts])
    hashes = np.concatenate(grams)
    order = np.argsort(hashes, kind="stable")
    postings = np.stack([numbers, positions], axis=1)[order]

    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "hashes.npy", hashes[order])
    np.save(folder / "postings.npy", postings.astype(np.uint32))
    np.save(folder / "items.npy", np.array(table, np.uint32))
    places = json.dumps([item.place for item in items], ensure_ascii=False, indent=1)
    (folder / "items.json").write_text(places, encoding="utf-8")
    return BenchmarkIndex(folder)


class HashedItem(NamedTuple):
    """The units of an item: of its passage, question and options."""

    place: str
    units: np.ndarray
    context: int  # units of the passage
    question: int  # units of the passage and the question


def _hash_items(paths: list[str]) -> list[HashedItem]:
    """Return each different item. Items that are too short to recognize are skipped with a warning."""
    items: dict[bytes, HashedItem] = {}
    for item in read_benchmarks(paths):
        parts = [_hash_words(part) for part in (item.context, item.question, "\n".join(item.options))]
        units = np.concatenate(parts)
        if len(units) < (NGRAM if item.options else MIN_UNITS):
            tqdm.write(f"skipped {item.place}: too short to recognize", file=sys.stderr)
        else:
            context, question = len(parts[0]), len(parts[0]) + len(parts[1])
            items.setdefault(units.tobytes(), HashedItem(item.place, units, context, question))
    if not items:
        raise UserError(f"{', '.join(paths)}: every question is too short to recognize")
    return list(items.values())


def _hash_words(text: str) -> np.ndarray:
    """Return the hashes of a text's units, without single letters a to d."""
    units = hash_units(text)
    return units[~np.isin(units, OPTION_MARKS)]


class BenchmarkIndex:
    """The index that [`build_index`] wrote.

    Attributes:
        hashes: uint64, (n-grams,): sorted hashes, memory-mapped.
        postings: uint32, (n-grams, 2): item and position in the item of each n-gram, memory-mapped.
        items: int64, (items, 4): n-grams of passage and question, n-grams of the item, 1 if the question alone is
            enough, the first n-gram of the question proper.
        places: BENCHMARK/FILE:ROW and the beginning of each item.
    """

    def __init__(self, folder: Path) -> None:
        self.hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self.postings = np.load(folder / "postings.npy", mmap_mode="r")
        self.items = np.load(folder / "items.npy").astype(np.int64)
        self.places = json.loads((folder / "items.json").read_text(encoding="utf-8"))
        self.known = np.zeros(2**FILTER_BITS, bool)  # by the first bits of a hash: whether any n-gram has them
        self.known[self.hashes >> np.uint64(64 - FILTER_BITS)] = True

    def find(self, text: str) -> list[str]:
        """Return the place of each item that the text contains: `BENCHMARK/FILE:ROW: BEGINNING`."""
        # Keep the n-grams of the text that some item may have; for most texts there are none.
        grams = hash_ngrams(_hash_words(text), NGRAM)
        spots = np.flatnonzero(self.known[grams >> np.uint64(64 - FILTER_BITS)])
        if not spots.size:
            return []

        # List each match of an n-gram: its place in the text, its item and its position in the item.
        starts = np.searchsorted(self.hashes, grams[spots], "left")
        counts = np.searchsorted(self.hashes, grams[spots], "right") - starts
        places = np.repeat(spots, counts)
        within = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        items, positions = self.postings[np.repeat(starts, counts) + within].astype(np.int64).T

        found = []
        for item in self._candidates(items, positions):
            matches = items == item
            if self._contains(item, places[matches], positions[matches], len(grams)):
                found.append(self.places[item])
        return found

    def _candidates(self, items: np.ndarray, positions: np.ndarray) -> list[int]:
        """Return the items with enough different n-grams anywhere in the text."""
        found, counts = np.unique(np.unique(items << 32 | positions) >> 32, return_counts=True)
        question, total, _, _ = self.items[found].T
        return found[counts >= COVERED * np.where(question, question, total)].tolist()

    def _contains(self, item: int, places: np.ndarray, positions: np.ndarray, length: int) -> bool:
        """Return True if enough of an item is within one span of the text.

        Args:
            item: Number of the item.
            places: Where in the text its n-grams match, sorted.
            positions: Which n-gram of the item matches there.
            length: Number of n-grams of the text.
        """
        question, total, is_enough, asked = self.items[item].tolist()
        question_is_enough = is_enough and length <= MAX_LENGTH

        # Overlapping spans: each match is within the first half of one of them.
        span = 2 * (total + NGRAM)
        for start in np.unique(places // span) * span:
            low, high = np.searchsorted(places, [start, start + 2 * span])
            found = np.unique(positions[low:high])
            in_question = (found < question).sum()
            in_asked = ((found >= asked) & (found < question)).sum()
            if in_question < COVERED * question or in_asked < COVERED * (question - asked):
                continue
            in_options = len(found) - in_question
            if in_options >= COVERED * (total - question):
                return True
            if question_is_enough and in_question >= COVERED_ALONE * question:
                return True
        return False
