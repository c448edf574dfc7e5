"""Know before the long stages whether `eval_fraction` holds out any document."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from buddygpt.cli.errors import UserError


def is_held_out(text: str, fraction: float) -> bool:
    """Choose a share of all texts by their hash: not by their order, and equal texts alike."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def none_held_out(fraction: float, documents: int) -> UserError:
    """Return the error of an `eval_fraction` that holds out nothing."""
    return UserError(
        f"eval_fraction {fraction} holds out none of {documents} documents; raise it, or split long .txt files with "
        "`txt_sample_by` or `txt_separator`"
    )


class HoldOutCounter(PipelineStep):
    """Passes documents on, and writes how many there are and how many would be held out to FOLDER/{rank:05d}.json."""

    type, name = "STAT", "count held out"

    def __init__(self, fraction: float, folder: Path) -> None:
        super().__init__()
        self.fraction, self.folder = fraction, folder

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        documents, held_out = 0, 0
        for document in data:
            documents += 1
            held_out += is_held_out(document.text, self.fraction)
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{rank:05d}.json").write_text(json.dumps([documents, held_out]), encoding="utf-8")


class HoldOutCheck(PipelineStep):
    """Raises UserError if the files of a [`HoldOutCounter`] say that no document, or every one, is held out.

    Deduplication may still drop the last one that is held out.
    """

    type, name = "STAT", "check held out"

    def __init__(self, fraction: float, folder: Path) -> None:
        super().__init__()
        self.fraction, self.folder = fraction, folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        counts = [json.loads(file.read_bytes()) for file in self.folder.iterdir()]
        documents, held_out = (sum(column) for column in zip(*counts, strict=True))
        if not documents:
            return  # the report of the last stage says why
        if not held_out:
            raise none_held_out(self.fraction, documents)
        if held_out == documents:
            raise UserError(f"eval_fraction {self.fraction} holds out all of {documents} documents; lower it")
