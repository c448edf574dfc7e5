"""Exam items in instruction and preference rows: a model that was tuned on them is judged by what it has read."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from buddygpt.data.chat.rules import FORMS, BadRow
from buddygpt.data.text.steps.decontaminate import ExamIndex, build_index


def open_exams(exams: Iterable[str]) -> ExamIndex | None:
    """Return an index of the items of exams, as [`read_exams`] takes them, in memory; None of no exams.

    Raises:
        UserError: As [`build_index`].
    """
    with TemporaryDirectory() as folder:  # the index stays open, and its files with it
        return build_index(list(exams), Path(folder)) if exams else None


def row_text(row: dict[str, Any], kind: str) -> str:
    """What is said in a standard row, turn below turn."""
    return "\n".join(turn["content"] for key in FORMS[kind] for turn in row[key])


def refuse_exam_items(row: dict[str, Any], kind: str, exams: ExamIndex | None) -> None:
    """Raise [`BadRow`] if a standard row holds items of exams, naming the file of the first."""
    if exams and (items := exams.find(row_text(row, kind))):
        raise BadRow(f"holds an item of {items[0].split(':')[0]}")
