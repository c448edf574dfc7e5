"""What data/doctor.py has found, in words: the figures, two examples with the loss mask, the verdict."""

import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from buddygpt.data.chat.tokens import TokenSequence, find_faults

PLACES = 5  # shown of each fault
EXAMPLES = 2  # shown, of two languages if there are two
HEAD, TAIL = 240, 80  # characters shown of a piece of an example
GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # also what turns text round


@dataclass
class Findings:
    """Counts of all files together; of places, the first few."""

    kind: str  # of the rows: sft, preference, kto or text
    max_length: int
    tokenizer: PreTrainedTokenizerBase | None
    exams: list[str]
    rows: int = 0
    not_standard: int = 0
    faults: Counter = field(default_factory=Counter)
    remarks: Counter = field(default_factory=Counter)
    languages: Counter = field(default_factory=Counter)
    copies: Counter = field(default_factory=Counter)
    exam_rows: int = 0
    places: dict[str, list[tuple]] = field(default_factory=dict)  # file and row of a fault, copies, exam items
    lengths: array = field(default_factory=lambda: array("I"))  # of every sequence, in tokens or characters
    cut: int = 0  # sequences above max_length
    untrained: int = 0  # sequences whose first max_length tokens carry no loss
    tokens_kept: int = 0
    tokens_with_loss: int = 0
    seen: dict[str, set[int]] = field(default_factory=lambda: {"rows": set(), "questions": set()})
    examples: dict[str, list[tuple]] = field(default_factory=dict)  # language: place, text, sequences of the first

    def note(self, what: str, place: tuple) -> None:
        """Remember the first few places of something."""
        if len(places := self.places.setdefault(what, [])) < PLACES:
            places.append(place)

    def add_example(self, language: str, example: tuple) -> None:
        """Remember the first rows of each language."""
        if len(examples := self.examples.setdefault(language, [])) < EXAMPLES:
            examples.append(example)

    def add_fault(self, reason: str, place: tuple) -> None:
        self.faults[reason] += 1
        self.note(reason, place)

    def add_text(self, of: str, fingerprint: int, place: tuple) -> None:
        """Count a row or a question that has been seen before."""
        if fingerprint in self.seen[of]:
            self.copies[of] += 1
            self.note(of, place)
        self.seen[of].add(fingerprint)

    def add_sequence(self, ids: list[int], loss: list[int]) -> None:
        self.lengths.append(len(ids))
        kept = loss[: self.max_length]
        self.cut += len(ids) > self.max_length
        self.untrained += not any(kept)
        self.tokens_kept += len(kept)
        self.tokens_with_loss += sum(kept)

    def reasons(self) -> list[str]:
        """Return why the rows are not fit to train on; nothing if they are."""
        trained_on = self.tokenizer is None or self.untrained < len(self.lengths)
        uncut = self.tokenizer is None or self.kind == "text" or self.cut < len(self.lengths)
        bad = sum(self.faults.values())
        reasons = find_faults(bad, trained_on, uncut, self.max_length) if self.rows else ["no row is fit"]
        return reasons + [f"{self.exam_rows:,} rows hold exam items"] * bool(self.exam_rows)


def printable(text: str) -> str:
    """Text whose control characters are written out, so that it cannot command the terminal."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def format_findings(findings: Findings) -> list[str]:
    """Return the figures, a line each, and below what has places its first few."""
    bad = sum(findings.faults.values())
    lines = [f"rows         {findings.rows + bad:,} read, {findings.rows:,} good, {bad:,} bad"]
    for reason, count in findings.faults.most_common():
        lines.append(f"  {count:>8,}  {reason} ({_first(findings, reason)})")
    if findings.rows:
        shares = (f"{name} {findings.languages[name] / findings.rows:.1%}" for name in ("zh", "en", "other"))
        lines.append(f"language     {', '.join(shares)} of the rows, by script")
        lines += _format_lengths(findings)
    for what, count in findings.copies.items():
        lines.append(f"duplicates   {count:,} {what} seen before ({_first(findings, what)})")
    if not findings.copies:
        lines.append("duplicates   none")
    if findings.exams:
        lines.append(f"exams        {findings.exam_rows:,} rows hold items of {', '.join(findings.exams)}")
        lines += [f"  {path}:{number}: {item}" for path, number, item in findings.places.get("exams", [])]
    lines += [f"warning      {count:,} {remark}" for remark, count in (+findings.remarks).items()]
    return [printable(line) for line in lines]


def _first(findings: Findings, what: str) -> str:
    """The places that were remembered, each file named once."""
    places = findings.places[what]
    files = [f"{path}:{', '.join(str(row) for _, row in rows)}" for path, rows in groupby(places, lambda at: at[0])]
    return "first " * (len(places) == PLACES) + "; ".join(files)


def _format_lengths(findings: Findings) -> list[str]:
    unit = "tokens" if findings.tokenizer else "characters"
    lengths = np.frombuffer(findings.lengths, np.uint32)
    points = [1, 25, 50, 75, 95, 99]
    shown = [f"{point} % {value:,.0f}" for point, value in zip(points, np.percentile(lengths, points), strict=True)]
    lines = [f"{unit:12} {', '.join(shown)}, longest {lengths.max():,}"]
    if not findings.tokenizer:
        return [*lines, "             give --tokenizer DIR for tokens, truncation and, of chats, loss and examples"]
    if findings.kind == "text":
        return lines
    total, limit = int(lengths.sum(dtype=np.int64)), findings.max_length
    cut, lost = findings.cut / len(lengths), 1 - findings.tokens_kept / total
    share = findings.tokens_with_loss / max(findings.tokens_kept, 1)
    return [
        *lines,
        f"truncation   {cut:.1%} of the sequences are above {limit:,}, which cuts {lost:.1%} of {total:,} tokens",
        f"loss         {share:.1%} of the tokens kept carry loss; {findings.untrained:,} sequences have none",
    ]


def format_examples(findings: Findings, colour: bool) -> list[str]:
    """Return two rows as the model reads them, the first Chinese and the first English one where there are both.

    What carries loss is green, or between ⟦ ⟧.
    """
    lines = []
    ranks = [
        (rank, language, example)
        for language in ("zh", "en", "other")
        for rank, example in enumerate(findings.examples.get(language, ()))
    ]
    for _, language, ((path, number), text, sequences) in sorted(ranks, key=lambda entry: entry[0])[:EXAMPLES]:
        title = printable(f"\nexample      {language}, {path}:{number}")
        if findings.kind == "text":
            lines += [title, _shorten(text)]
            continue
        names = ("chosen, ", "rejected, ") if findings.kind == "preference" else ("",)
        for name, sequence in zip(names, sequences, strict=False):
            lines.append(f"{title}, {name}loss on what is {'green' if colour else '⟦marked⟧'}")
            lines.append(mark_loss(sequence, findings.tokenizer, findings.max_length, colour).rstrip("\n"))
    return lines


def _shorten(text: str) -> str:
    text = text if len(text) <= HEAD + TAIL else f"{text[:HEAD]} … {text[-TAIL:]}"
    return printable(text)


def mark_loss(sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase, max_length: int, colour: bool) -> str:
    """Return the text of the tokens that are kept, with what carries loss in colour or between marks."""
    loss, rest = ((GREEN, RESET), (DIM, RESET)) if colour else (("⟦", "⟧"), ("", ""))
    pairs = list(zip(sequence.ids, sequence.loss, strict=True))[:max_length]
    pieces = []
    for carries_loss, group in groupby(pairs, key=lambda pair: bool(pair[1])):
        opening, closing = loss if carries_loss else rest
        pieces.append(opening + _shorten(tokenizer.decode([token for token, _ in group])) + closing)
    return "".join(pieces) + (f" (cut at {max_length:,} tokens)" if len(sequence.ids) > max_length else "")


def format_verdict(findings: Findings, command: str) -> str:
    """Return the last line: fit, fit once converted by `command`, or not fit and why."""
    if reasons := findings.reasons():
        return f"verdict: not fit: {'; '.join(reasons)}"
    return f"verdict: fit once converted: {command}" if findings.not_standard else "verdict: fit"
