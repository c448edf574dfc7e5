"""The report of data/doctor.py: counts, two examples with the loss mask, and the verdict."""

import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from buddygpt.data.chat.tokens import TokenSequence, Truncation, find_faults

PLACES = 5  # shown of each fault
EXAMPLES = 2  # shown, of two languages if there are two
HEAD, TAIL = 240, 80  # characters shown of a piece of an example
GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # includes marks of text direction

Place = tuple[Path, int]  # file and row


@dataclass
class Findings:
    """Counts of all rows of all files, and the first few places of each fault."""

    kind: str  # of the rows: sft, preference, kto or text
    max_length: int
    tokenizer: PreTrainedTokenizerBase | None
    benchmarks: list[str]
    rows: int = 0
    not_standard: int = 0  # rows that the converter would change
    faults: Counter = field(default_factory=Counter)
    remarks: Counter = field(default_factory=Counter)
    unread: Counter = field(default_factory=Counter)  # columns and keys that nothing reads
    languages: Counter = field(default_factory=Counter)
    copies: Counter = field(default_factory=Counter)  # of rows and of questions
    benchmark_rows: int = 0
    places: dict[str, list[tuple]] = field(default_factory=dict)  # of faults, copies, benchmark items
    lengths: array = field(default_factory=lambda: array("I"))  # of every sequence, in tokens or characters
    fingerprints: dict[str, set[int]] = field(default_factory=lambda: {"rows": set(), "questions": set()})
    examples: dict[str, list[tuple]] = field(default_factory=dict)  # language -> place, text, sequences

    def __post_init__(self):
        self.truncation = Truncation(self.max_length)  # of the rows that were tokenized

    def note(self, name: str, place: tuple) -> None:
        """Remember the first few places of something."""
        places = self.places.setdefault(name, [])
        if len(places) < PLACES:
            places.append(place)

    def add_fault(self, reason: str, place: Place) -> None:
        self.faults[reason] += 1
        self.note(reason, place)

    def add_seen(self, name: str, fingerprint: int, place: Place) -> None:
        """Count a row or a question that has been seen before."""
        if fingerprint in self.fingerprints[name]:
            self.copies[name] += 1
            self.note(name, place)
        self.fingerprints[name].add(fingerprint)

    def add_example(self, language: str, example: tuple[Place, str, list[TokenSequence]]) -> None:
        """Remember the first rows of each language."""
        examples = self.examples.setdefault(language, [])
        if len(examples) < EXAMPLES:
            examples.append(example)

    def add_sequences(self, sequences: list[TokenSequence], place: Place) -> None:
        """Count the sequences of a row."""
        self.lengths.extend(len(ids) for ids, _ in sequences)
        if not self.truncation.add(sequences):
            self.note("untrained", place)

    @property
    def bad_rows(self) -> int:
        return sum(self.faults.values())

    def reasons(self) -> list[str]:
        """Return why the rows are not fit to train on; an empty list if they are."""
        if not self.rows:
            return ["no row is fit"]
        reasons = find_faults(self.bad_rows, None if self.kind == "text" else self.truncation)
        if self.benchmark_rows:
            reasons.append(f"{self.benchmark_rows:,} rows contain benchmark items")
        return reasons


# --- Counts ---


def format_findings(findings: Findings) -> list[str]:
    """Return one line per count, each followed by the first few places if it has any."""
    bad = findings.bad_rows
    lines = [f"rows         {findings.rows + bad:,} read, {findings.rows:,} good, {bad:,} bad"]
    for reason, count in findings.faults.most_common():
        lines.append(f"  {count:>8,}  {reason} ({_format_places(findings.places[reason])})")

    if findings.rows:
        shares = [f"{name} {findings.languages[name] / findings.rows:.1%}" for name in ("zh", "en", "other")]
        lines.append(f"language     {', '.join(shares)} of the rows, by script")
        lines += _format_lengths(findings)

    for name, count in findings.copies.items():
        lines.append(f"duplicates   {count:,} {name} seen before ({_format_places(findings.places[name])})")
    if not findings.copies:
        lines.append("duplicates   none")

    if findings.benchmarks:
        names = ", ".join(findings.benchmarks)
        lines.append(f"benchmarks   {findings.benchmark_rows:,} rows contain items of {names}")
        for path, row, item in findings.places.get("benchmarks", []):
            lines.append(f"  {path}:{row}: {item}")

    if findings.unread:
        lines.append(f"not read     {format_unread(findings.unread)}")

    for remark, count in findings.remarks.items():
        if count:
            lines.append(f"warning      {count:,} {remark}")
    return [printable(line) for line in lines]


def format_unread(unread: Counter) -> str:
    """Return the keys that were not read, with the rows that have them."""
    return ", ".join(f"{key} ({count:,} rows)" for key, count in unread.most_common())


def _format_places(places: list[Place]) -> str:
    """Return the places as text, each file named once: `a.jsonl:1, 5; b.jsonl:2`."""
    files = []
    for path, group in groupby(places, lambda place: place[0]):
        files.append(f"{path}:{', '.join(str(row) for _, row in group)}")
    text = "; ".join(files)
    return f"first {text}" if len(places) == PLACES else text


def _format_lengths(findings: Findings) -> list[str]:
    """Return percentiles of the lengths and, if chats were tokenized, the tokens that are cut and that carry loss."""
    unit = "tokens" if findings.tokenizer else "characters"
    lengths = np.frombuffer(findings.lengths, np.uint32)
    percentiles = [1, 25, 50, 75, 95, 99]
    values = np.percentile(lengths, percentiles)
    shown = [f"{percentile} % {value:,.0f}" for percentile, value in zip(percentiles, values, strict=True)]
    lines = [f"{unit:12} {', '.join(shown)}, longest {lengths.max():,}"]
    if not findings.tokenizer:
        lines.append("             a tokenizer is needed for tokens, truncation and, for chats, loss and examples")
    elif findings.kind != "text":
        truncation = findings.truncation
        share = truncation.with_loss / max(truncation.kept, 1)
        lines.append(f"truncation   {str(truncation) or f'no row is longer than max_length {findings.max_length:,}'}")
        lines.append(f"loss         {share:.1%} of the {truncation.kept:,} tokens kept carry loss")
        if truncation.untrained:
            places = _format_places(findings.places["untrained"])
            lines.append(
                f"             {truncation.untrained:,} rows have no {truncation.missing} within max_length ({places})"
            )
    return lines


# --- Examples ---


def format_examples(findings: Findings, in_color: bool) -> list[str]:
    """Return two rows as the model reads them: the first Chinese and the first English one if there are both.

    Text that carries loss is green, or between ⟦ ⟧.
    """
    # The first example of each language, then the second ones.
    ranked = []
    for rank in range(EXAMPLES):
        for language in ("zh", "en", "other"):
            ranked += [(language, example) for example in findings.examples.get(language, [])[rank : rank + 1]]

    lines = []
    for language, ((path, row), text, sequences) in ranked[:EXAMPLES]:
        title = printable(f"\nexample      {language}, {path}:{row}")
        if findings.kind == "text":
            lines += [title, _shorten(text)]
            continue
        names = ("chosen, ", "rejected, ") if findings.kind == "preference" else ("",)
        for name, sequence in zip(names, sequences, strict=False):
            lines.append(f"{title}, {name}loss on what is {'green' if in_color else '⟦marked⟧'}")
            lines.append(mark_loss(sequence, findings.tokenizer, findings.max_length, in_color).rstrip("\n"))
    return lines


def mark_loss(sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase, max_length: int, in_color: bool) -> str:
    """Return the text of the first `max_length` tokens, with what carries loss in color or between marks."""
    loss_marks, other_marks = ((GREEN, RESET), (DIM, RESET)) if in_color else (("⟦", "⟧"), ("", ""))
    kept = zip(sequence.ids[:max_length], sequence.loss[:max_length], strict=True)
    text = ""
    for carries_loss, group in groupby(kept, key=lambda pair: bool(pair[1])):
        opening, closing = loss_marks if carries_loss else other_marks
        text += opening + _shorten(tokenizer.decode([token for token, _ in group])) + closing
    if len(sequence.ids) > max_length:
        text += f" (cut at {max_length:,} tokens)"
    return text


def _shorten(text: str) -> str:
    if len(text) > HEAD + TAIL:
        text = f"{text[:HEAD]} … {text[-TAIL:]}"
    return printable(text)


def printable(text: str) -> str:
    """Return the text with control characters written out, so that it cannot control the terminal."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# --- Verdict ---


def format_verdict(findings: Findings, convert_command: str) -> str:
    """Return the last line: fit, fit once converted by the command, or not fit and why."""
    if reasons := findings.reasons():
        return f"verdict: not fit: {'; '.join(reasons)}"
    truncation = "" if findings.kind == "text" else str(findings.truncation)
    but = f", but {truncation}" if truncation else ""
    if findings.not_standard:
        return f"verdict: fit once converted{but}: {convert_command}"
    return f"verdict: fit{but}"
