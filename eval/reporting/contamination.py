"""Search the questions of an evaluation in the text of the training shards, with the index of decontamination.

data/text/steps/decontaminate.py says when a text contains a question. Only questions that are long enough to be
recognized can be found.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, reading
from buddygpt.data.shards.format import MANIFEST, TokenShards
from buddygpt.data.text.benchmarks import QUESTION_KEYS
from buddygpt.data.text.counts import RowCounts, sum_counts
from buddygpt.eval.reporting.results import Run, leaf_tasks, read_samples, reported_tasks

if TYPE_CHECKING:
    from buddygpt.data.text.steps.decontaminate import BenchmarkIndex

BATCH = 256  # documents to decode at once


class Found(NamedTuple):
    """The questions of a task in the training shards.

    Attributes:
        n: Different questions.
        searched: Those that are long enough to be recognized.
        found: Those that some training document contains.
        example: One of them, and the document.
    """

    n: int
    searched: int
    found: int
    example: str


def search_shards(runs: dict[str, list[Run]], shards: Path) -> dict[str, Found]:
    """Return for each task which of its questions the training documents contain.

    Raises:
        UserError: The shards or their tokenizer cannot be read.
    """
    from buddygpt.data.text.steps.decontaminate import build_index  # an optional step

    tokens = TokenShards(shards)
    tokenizer = load_tokenizer(tokens.manifest["tokenizer"])
    tokens.check_tokenizer(tokenizer)
    rows, tasks = _distinct_rows(runs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.jsonl"
        file.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # one line for each question that is too short
                index = build_index([str(file)], Path(folder) / "index")
        except UserError:  # all of them are
            return {task: Found(len(numbers), 0, 0, "") for task, numbers in tasks.items()}
        searched = {_row_number(place) for place in index.places}
        found = _search(tokens, tokenizer, index)
    return {task: _count(numbers, searched, found) for task, numbers in tasks.items()}


def removed_documents(shards: Path) -> dict[str, int]:
    """Return how many documents were left out when the shards were made, by the benchmark they contain."""
    manifest = TokenShards(shards).manifest
    with reading(shards / MANIFEST):
        dropped = sum_counts(map(RowCounts.from_json, manifest.get("cleaning", {}).values())).dropped
        return {rule.removeprefix("exam_"): n for rule, n in sorted(dropped.items()) if rule.startswith("exam_")}


def _distinct_rows(runs: dict[str, list[Run]]) -> tuple[list[str], dict[str, list[int]]]:
    """Return the different questions of all tasks as lines of JSON, and their numbers, from 1, by task."""
    numbers: dict[str, int] = {}
    tasks: dict[str, dict[int, None]] = {}
    for of_checkpoint in runs.values():
        for path, results in of_checkpoint:
            with reading(path):
                for task in reported_tasks(results):
                    for leaf in leaf_tasks(task, results["group_subtasks"]):
                        for sample in read_samples(path, leaf, results):
                            row = json.dumps(_as_question(sample["doc"]), ensure_ascii=False)
                            number = numbers.setdefault(row, len(numbers) + 1)
                            tasks.setdefault(task, {})[number] = None
    return list(numbers), {task: list(of_task) for task, of_task in tasks.items()}


def _as_question(doc: dict[str, Any]) -> dict[str, Any]:
    """Return a question in a form that `read_benchmarks` knows.

    Without a column of that name, the question is what a person says last in `prompt`, or all texts of the row.
    """
    row = {str(key).lower(): value for key, value in doc.items()}
    if "a" in row:
        row.pop("choices", None)  # the same options again
    if any(isinstance(row.get(key), str) and row[key].strip() for key in QUESTION_KEYS):
        return row
    turns = row.get("prompt")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        options = row.get("choices") or [row[key] for key in ("answer",) if isinstance(row.get(key), str)]
        return {"question": str(turns[-1].get("content")), "options": options}
    return {"question": "\n".join(value for value in row.values() if isinstance(value, str))}


def _row_number(place: str) -> int:
    """Return the number of a question from `BENCHMARK/FILE:ROW: BEGINNING`."""
    return int(place.split(":", 2)[1])


def _search(shards: TokenShards, tokenizer: Any, index: "BenchmarkIndex") -> dict[int, str]:
    """Return a document that contains it for each question, by number; none for the questions of no document."""
    found: dict[int, str] = {}
    with tqdm(total=shards.documents, desc="searching the training documents", unit="doc", leave=False) as bar:
        for text in _documents(shards, tokenizer):
            for place in index.find(text):
                found.setdefault(_row_number(place), text)
            bar.update()
    return found


def _documents(shards: TokenShards, tokenizer: Any) -> Iterator[str]:
    """Yield the text of every training document."""
    for shard in shards.shards:
        ends = np.fromfile(shards.folder / f"{shard['file']}.index", "<u8").astype(np.int64)
        ids = np.memmap(shards.folder / shard["file"], shards.dtype, "r")
        starts = np.concatenate([[0], ends[:-1]])
        for first in range(0, len(ends), BATCH):
            batch = zip(starts[first : first + BATCH], ends[first : first + BATCH], strict=True)
            yield from tokenizer.backend_tokenizer.decode_batch(
                [ids[start : end - 1].tolist() for start, end in batch]
            )


def _count(numbers: list[int], searched: set[int], found: dict[int, str]) -> Found:
    contained = [number for number in numbers if number in found]
    example = min((found[number] for number in contained), key=len, default="")
    return Found(len(numbers), len(searched & set(numbers)), len(contained), example[:200])


def describe(found: dict[str, Found]) -> list[list[str]]:
    """Return a row per task: task, questions, searched, found, share, the shortest document with one."""
    rows = []
    for task, each in found.items():
        share = f"{each.found / each.searched:.1%}" if each.searched else ""
        rows.append([task, str(each.n), str(each.searched), str(each.found), share, each.example])
    return rows
