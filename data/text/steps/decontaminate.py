"""Removes documents that hold questions of the exams by which a model is judged.

The questions are cut into n-grams of `text_units` (Han characters and words), because width, case, spaces and
punctuation differ between copies; single letters a to d are left out, because the marks of options do too. A text
holds a question where, within a stretch of a few times its length, at least `COVERED` of the question's n-grams and
`COVERED` of its options' are found: shares of the exam's item, as in PaLM (Chowdhery et al. 2022, section 8: 70% of a
question's 8-grams), not of the document, and no single n-gram as in GPT-3. So a statute or a novel that an exam
quotes stays: it has the question's words, but not the wrong options.

Questions are found without their options too, if they have `MIN_UNITS`, or `MIN_SHARED` where several items ask them
("which of the following is true" is no question), and are there nearly word by word in a text of up to `MAX_LENGTH`.
In longer ones they are a quotation of the same source, as a rule. Shorter stems ("the capital of China is") are what
anybody writes.

The whole document is removed: a text that holds an exam's items with their options seldom holds anything else.
"""

import csv
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from tqdm import tqdm

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_type, find_files
from buddygpt.data.text.rows import read_rows
from buddygpt.data.text.steps.ngrams import hash_ngrams, hash_units

QUESTION_KEYS = ("question", "problem", "prompt", "query", "q_main", "instruction", "content", "text", "问题", "题目")
SPLITS = ("test", "val", "valid", "dev", "train", "data")
OPTION_KEY = re.compile("(option_?|选项)?[a-h]")
NGRAM = 6  # units: the length of the shortest items of MMLU
COVERED = 0.75
COVERED_ALONE, MIN_UNITS, MIN_SHARED = 0.9, 8, 12  # of a question without its options
MAX_LENGTH = 4000  # of the text around it, in n-grams
OPTION_MARKS = hash_units("a b c d")
FILTER_BITS = 23  # of a hash, to tell most n-grams of a text that no exam has at the cost of one look


class ExamItem(NamedTuple):
    """A question with its options."""

    place: str  # EXAM/FILE:ROW: how the question begins
    question: str
    options: list[str]


def read_exams(exams: list[str]) -> Iterator[ExamItem]:
    """Yield the questions of exams: folders, files or globs of .csv, .jsonl, .json, .parquet, or .txt with one a line.

    A row has a question in one of `QUESTION_KEYS` and options in A, B, ..., option_a, ..., `options` or `choices`. A
    .csv without header is read as MMLU's: question, options, letter of the answer. Files of another form are named
    and left out.

    Raises:
        UserError: There is no such exam, or no question in it, or a row cannot be read.
    """
    for exam, name in zip(exams, _name_exams(exams), strict=True):
        found = False
        for file in find_files([exam]):
            count = 0
            for number, row in _read_rows(file):
                question = next((row[key] for key in QUESTION_KEYS if isinstance(row.get(key), str)), "").strip()
                if question:
                    count += 1
                    yield ExamItem(f"{name}/{file.name}:{number}: {question[:40]}", question, _find_options(row))
            if not count:
                tqdm.write(f"{file}: no questions found; left out", file=sys.stderr)
            found |= bool(count)
        if not found:
            raise UserError(f"{exam}: no file has a column of questions; name it one of {', '.join(QUESTION_KEYS)}")


def _name_exams(exams: list[str]) -> list[str]:
    """Call each exam by its file or folder, with the folder above where that says too little, or two are alike."""
    paths = [Path(exam).absolute() for exam in exams]
    for parts in (1, 2, 3):
        words = [[*path.parts[:-1], path.name.split(".")[0]] for path in paths]
        words = [each[-parts - (each[-1] in SPLITS) :] for each in words]
        names = [re.sub(r"[^\w-]+", "_", "_".join(each)) for each in words]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"exams are named twice, or alike: {', '.join(exams)}")


def _read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and columns of every row, names in lower case."""
    if file_type(file) == ".csv":
        yield from _read_csv(file)
        return
    text_key = ["question"] if file_type(file) == ".txt" else None
    for row in read_rows(file, text_key, txt_sample_by="line"):
        if row.error and row.number == 1:  # JSON of another form, as the settings beside many an exam
            return
        if row.error:
            raise UserError(f"{file}:{row.number}: {row.error}")
        content = row.content if isinstance(row.content, dict) else {"question": row.content}
        yield row.number, {key.lower(): value for key, value in content.items()}


def _read_csv(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="") as stream:
            reader = rows = csv.reader(stream)
            first = next(reader, [])
            header = [cell.strip().lower() for cell in first]
            if not set(header) & set(QUESTION_KEYS):
                if not re.fullmatch("[a-h]", header[-1] if header else ""):
                    return
                rows = chain([first], reader)
                header = ["question", *"abcdefgh"[: len(first) - 2], "answer"]
            for row in rows:
                yield reader.line_num, dict(zip(header, row, strict=False))
    except (csv.Error, OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _find_options(row: dict[str, Any]) -> list[str]:
    listed = row.get("options") or row.get("choices") or []
    if isinstance(listed, dict):
        listed = listed.get("text") or list(listed.values())
    listed = [listed] if isinstance(listed, str) else listed
    named = [row[key] for key in sorted(row) if OPTION_KEY.fullmatch(key)]
    return [str(option) for option in [*named, *listed] if option is not None]


def _hash_words(text: str) -> np.ndarray:
    units = hash_units(text)
    return units[~np.isin(units, OPTION_MARKS)]


def _hash_items(exams: list[str]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return place, units of the question and units of all of each item, once; those too short to tell are named."""
    items: dict[bytes, tuple[str, np.ndarray, np.ndarray]] = {}
    for item in read_exams(exams):
        question = _hash_words(item.question)
        units = np.concatenate([question, _hash_words("\n".join(item.options))])
        if len(units) < (NGRAM if item.options else MIN_UNITS):
            tqdm.write(f"{item.place}: too short to look for", file=sys.stderr)
        else:
            items.setdefault(units.tobytes(), (item.place, question, units))
    if not items:
        raise UserError(f"{', '.join(exams)}: every question is too short to look for")
    return list(items.values())


def build_index(exams: list[str], folder: Path) -> "ExamIndex":
    """Write the n-grams of the exams' items to a folder and open it.

    Raises:
        UserError: As [`read_exams`], or every question is too short.
    """
    items = _hash_items(exams)
    uses = Counter(question.tobytes() for _, question, _ in items)
    table, grams = [], []
    for _, question, units in items:
        grams.append(hash_ngrams(units, NGRAM))
        alone = len(question) >= (MIN_UNITS if uses[question.tobytes()] == 1 else MIN_SHARED)
        table.append((max(0, len(question) - NGRAM + 1), len(grams[-1]), alone))
    counts = np.array([len(each) for each in grams])
    postings = np.stack([np.repeat(np.arange(len(grams)), counts), np.concatenate([np.arange(n) for n in counts])], 1)
    hashes = np.concatenate(grams)
    order = np.argsort(hashes, kind="stable")
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "hashes.npy", hashes[order])
    np.save(folder / "postings.npy", postings[order].astype(np.uint32))
    np.save(folder / "items.npy", np.array(table, np.uint32))
    places = json.dumps([place for place, _, _ in items], ensure_ascii=False, indent=1)
    (folder / "items.json").write_text(places, encoding="utf-8")
    return ExamIndex(folder)


class ExamIndex:
    """What [`build_index`] has written: `hashes`, sorted, with `postings` (item, position) that are read from disk,
    and of each item the n-grams of its question, of all of it, and whether the question is known without options.
    """

    def __init__(self, folder: Path) -> None:
        self.hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self.postings = np.load(folder / "postings.npy", mmap_mode="r")
        self.items = np.load(folder / "items.npy").astype(np.int64)
        self.places = json.loads((folder / "items.json").read_text(encoding="utf-8"))
        self.known = np.zeros(2**FILTER_BITS, bool)
        self.known[self.hashes >> np.uint64(64 - FILTER_BITS)] = True

    def find(self, text: str) -> list[str]:
        """Return the place of every item that the text holds: `EXAM/FILE:ROW: BEGINNING`."""
        grams = hash_ngrams(_hash_words(text), NGRAM)
        spots = np.flatnonzero(self.known[grams >> np.uint64(64 - FILTER_BITS)])
        if not spots.size:
            return []
        starts = np.searchsorted(self.hashes, grams[spots], "left")
        counts = np.searchsorted(self.hashes, grams[spots], "right") - starts
        places = np.repeat(spots, counts)
        within = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        items, positions = self.postings[np.repeat(starts, counts) + within].astype(np.int64).T
        held = [
            item
            for item in self._candidates(items, positions)
            if self._holds(item, places[items == item], positions[items == item], len(grams))
        ]
        return [self.places[item] for item in held]

    def _candidates(self, items: np.ndarray, positions: np.ndarray) -> list[int]:
        """Return the items of which enough is anywhere in the text."""
        found, counts = np.unique(np.unique(items << 32 | positions) >> 32, return_counts=True)
        question, total, _ = self.items[found].T
        return found[counts >= COVERED * np.where(question, question, total)].tolist()

    def _holds(self, item: int, places: np.ndarray, positions: np.ndarray, length: int) -> bool:
        """Whether enough of the item is in one stretch of the text."""
        question, total, alone = self.items[item].tolist()
        alone = alone and length <= MAX_LENGTH
        span = 2 * (total + NGRAM)
        for start in np.unique(places // span) * span:
            low, high = np.searchsorted(places, [start, start + 2 * span])
            found = np.unique(positions[low:high])
            asked = (found < question).sum()
            if asked < COVERED * question:
                continue
            if len(found) - asked >= COVERED * (total - question) or alone and asked >= COVERED_ALONE * question:
                return True
        return False


class ExamIndexer(PipelineStep):
    """[`build_index`] as a stage of one task.

    Raises:
        UserError: There is no file of an exam.
    """

    type, name = "DECONT", "exams"

    def __init__(self, exams: list[str], folder: Path) -> None:
        super().__init__()
        find_files(exams)
        self.exams, self.folder = exams, folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        self.stat_update("exam_items", value=len(build_index(self.exams, self.folder).items))


class Decontaminator(BaseFilter):
    """Drops documents that hold an exam's item as `dropped_exam_NAME`, and says which in `exam_item`."""

    name = "decontamination"

    def __init__(self, folder: Path, exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.folder = folder

    @cached_property
    def index(self) -> ExamIndex:
        """Opened by the task that needs it."""
        return ExamIndex(self.folder)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        items = self.index.find(doc.text)
        if items:
            doc.metadata["exam_item"] = items[0]
        return (False, f"exam_{items[0].split('/')[0]}") if items else True
