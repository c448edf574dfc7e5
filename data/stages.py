"""The stages of data preparation, and the executors that run them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep


class Stage(NamedTuple):
    """One pipeline and the number of tasks it is split into; a stage begins when the one before it is complete."""

    name: str
    steps: list[PipelineStep]
    tasks: int


class DocumentReader(PipelineStep):
    """Yields the documents that an earlier stage left for this task in FOLDER/{rank:05d}.jsonl."""

    type, name = "READER", "documents"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with open(self.folder / f"{rank:05d}.jsonl", "rb") as file:
            for line in file:
                row = json.loads(line)
                yield Document(row["text"], id=row["id"], metadata=row["metadata"])
