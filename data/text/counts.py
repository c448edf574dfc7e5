"""Row counts: what each step of data preparation did with the rows of a source, for the manifest and the report."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

Kind = Literal["read", "dropped", "changed_chars", "changed", "language", "written"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HELD_OUT = "held_out"  # counted as dropped, but set aside for evaluation, not lost


class RowCounts:
    """Counts by kind and name, in the order in which they first occur.

    | kind            | name     | counts                                                                   |
    |-----------------|----------|--------------------------------------------------------------------------|
    | `read`          |          | rows read                                                                |
    | `dropped`       | rule     | rows dropped by a rule                                                   |
    | `changed`       | operator | documents that an operator changed, including documents dropped later    |
    | `changed_chars` | operator | characters that it removed, added or replaced                            |
    | `language`      | language | documents that cleaning kept, if it detects their language               |
    | `written`       |          | documents written to the training shards                                 |
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[Kind, str]] = Counter()

    def add(self, kind: Kind, name: str = "", count: int = 1) -> None:
        """Add to the count of a kind and name."""
        self._counts[kind, name] += count

    def update(self, other: "RowCounts") -> None:
        """Add all counts of `other`."""
        self._counts.update(other._counts)

    def by_name(self, kind: Kind) -> Counter[str]:
        """Return the counts of one kind by name, except rows held out, which [`RowCounts.held_out`] gives."""
        counts = {name: count for (each, name), count in self._counts.items() if each == kind and name != HELD_OUT}
        return Counter(counts)

    @property
    def read(self) -> int:
        """Rows read."""
        return self._counts["read", ""]

    @property
    def written(self) -> int:
        """Documents written to the training shards."""
        return self._counts["written", ""]

    @property
    def held_out(self) -> int:
        """Documents set aside for evaluation."""
        return self._counts["dropped", HELD_OUT]

    @property
    def dropped(self) -> Counter[str]:
        """Rows lost, by rule."""
        return self.by_name("dropped")

    def to_json(self) -> dict[str, int]:
        """Return the counts as the manifest has them: {"read": 3, "dropped_empty": 1, ...}."""
        return {f"{kind}_{name}" if name else kind: count for (kind, name), count in self._counts.items()}

    @classmethod
    def from_json(cls, labels: dict[str, int]) -> "RowCounts":
        """Read what [`RowCounts.to_json`] returned."""
        counts = cls()
        for label, count in labels.items():
            # `changed_chars` comes before its prefix `changed` in KINDS, so the first match is right.
            kind = next(kind for kind in KINDS if f"{label}_".startswith(f"{kind}_"))
            counts.add(kind, label[len(kind) + 1 :], count)
        return counts


def sum_counts(counts: Iterable[RowCounts]) -> RowCounts:
    """Return the sum of all counts."""
    total = RowCounts()
    for each in counts:
        total.update(each)
    return total


class CountWriter(PipelineStep):
    """The last step of a task: writes the sum of what its steps counted to FOLDER/{rank:05d}.json.

    Args:
        folder: The folder for the tasks of one stage.
        steps: The steps of the same pipeline that have `counts`, in order. (datatrove copies the pipeline for each
            task as a whole, so the counts are those of the task.)
    """

    type, name = "WRITER", "counts"

    def __init__(self, folder: Path, steps: list[Any]) -> None:
        super().__init__()
        self.folder, self.steps = folder, steps

    def run(self, data: Iterator[Document] | None, rank: int = 0, world_size: int = 1) -> None:
        # The counts are complete once the last document has passed every step.
        if data is not None:
            for _ in data:
                pass
        total = sum_counts(step.counts for step in self.steps)
        self.folder.mkdir(parents=True, exist_ok=True)
        counts_file(self.folder, rank).write_text(json.dumps(total.to_json()), encoding="utf-8")


def read_counts(folder: Path, rank: int) -> RowCounts:
    """Read what a [`CountWriter`] wrote for one task."""
    return RowCounts.from_json(json.loads(counts_file(folder, rank).read_bytes()))


def counts_file(folder: Path, rank: int) -> Path:
    """Return the path of a task's counts."""
    return folder / f"{rank:05d}.json"
