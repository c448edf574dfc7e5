"""Write report.md and report.png: what data preparation dropped and changed, with examples, for people to judge."""

import inspect
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.writers import JsonlWriter

from buddygpt.cli.tables import NO_TEXT, escape_markdown, markdown_table
from buddygpt.data.text.counts import Kind, RowCounts, sum_counts
from buddygpt.data.text.measures import MEASURES

EXAMPLES = 3  # examples of each rule that each task keeps, and that the report shows
EXCERPT = 240  # characters of an example
RULES_IN_PICTURE = 9  # the others are added up
PICTURE = "![not written, by source and rule](report.png)"


def write_report(folder: Path, manifest: dict[str, Any], examples: Path) -> None:
    """Write FOLDER/report.md and, if any row was dropped, FOLDER/report.png.

    Args:
        folder: An existing folder.
        manifest: A manifest of training shards, with `sources`, the `profiles` of its `generations`, and `cleaning`:
            the [`RowCounts`] of each source as JSON.
        examples: Folder of folders that [`ExampleWriter`]s have written to.
    """
    counts = {name: RowCounts.from_json(labels) for name, labels in manifest["cleaning"].items()}
    profiles: dict[str, dict[str, Any]] = {}
    for append_round in manifest["generations"]:
        profiles.update(append_round["profiles"])
    any_dropped = any(count.dropped for count in counts.values())
    sections = [
        f"# Data report\n\n{manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{manifest['text_bytes'] / 1e6:,.1f} MB of text from {len(manifest['sources'])} sources.",
        f"## Mixture\n\n{_mixture(manifest['sources'])}",
        f"## What became of the rows\n\n{_rows(counts)}" + (f"\n\n{PICTURE}" if any_dropped else ""),
        f"## Dropped by rule\n\nRows, and their share of the rows read.\n\n{_table_of(counts, 'dropped')}",
        "## Changed by operator\n\nDocuments, including those dropped later, and their share of the rows read.\n\n"
        f"{_table_of(counts, 'changed', with_chars=True)}",
        "## Languages\n\nDocuments that cleaning kept, for sources whose profile detects the language.\n\n"
        f"{_table_of(counts, 'language')}",
        f"## Examples\n\n{_examples(examples, profiles)}",
    ]
    (folder / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    if any_dropped:  # held-out rows alone would be one grey bar
        _draw(counts, folder / "report.png")


class ExampleWriter(JsonlWriter):
    """An exclusion writer for one filter: keeps an excerpt of the first documents of each rule and task.

    Args:
        folder: Gets {rank:05d}.jsonl; no other filter may write to it.
    """

    name = "examples"

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), compression=None, adapter=_example)
        self.seen: Counter = Counter()

    def write(self, document: Document, rank: int = 0, **kwargs: Any) -> None:
        """Write the excerpt, unless the rule has enough examples."""
        key = (rank, document.metadata.get("filter_reason"))
        self.seen[key] += 1
        if self.seen[key] <= EXAMPLES:
            super().write(document, rank, **kwargs)


def _example(writer: ExampleWriter, document: Document) -> dict[str, Any]:
    """Return what the report shows of a dropped document."""
    rule = document.metadata.get("filter_reason", "")
    measure = re.sub("^low_|_(below|above)$", "", rule)
    return {
        "rule": rule,
        "id": document.id,
        "text": document.text[: EXCERPT + 1],
        "value": document.metadata.get(measure),
        "exam_item": document.metadata.get("exam_item"),
        "copy_of": document.metadata.get("copy_of"),
    }


def _mixture(sources: list[dict[str, Any]]) -> str:
    """Return the table of sources, and the share of each language."""
    rows = []
    languages: Counter = Counter()
    for source in sources:
        languages[source["language"] or "not given"] += source["share"]
        rows.append(
            [
                escape_markdown(source["name"]),
                escape_markdown(source["language"] or ""),
                f"{source['documents']:,}",
                f"{source['tokens']:,}",
                f"{source['text_bytes'] / 1e6:,.2f}",
                f"{source['epochs']:.3g}",
                f"{source['share']:.2%}",
            ]
        )
    table = markdown_table(["source", "language", "documents", "tokens", "MB", "epochs", "share of tokens read"], rows)
    shares = ", ".join(f"{escape_markdown(name)} {share:.1%}" for name, share in languages.most_common())
    return f"{table}\n\nTokens read by language: {shares}."


def _rows(counts: dict[str, RowCounts]) -> str:
    """Return the table of what became of the rows of each source."""
    rows = []
    for name, count in [*counts.items(), ("all", sum_counts(counts.values()))]:
        dropped = count.dropped.total()
        cells = [count.read, count.written, count.held_out, dropped]
        rows.append([escape_markdown(name), *(f"{cell:,}" for cell in cells), f"{dropped / max(count.read, 1):.2%}"])
    return markdown_table(["source", "read", "written", "held out", "dropped", "share dropped"], rows)


def _table_of(counts: dict[str, RowCounts], kind: Kind, with_chars: bool = False) -> str:
    """Return a table with the names of one kind of counts as rows, most frequent first, and the sources as columns.

    Args:
        counts: Counts by source.
        kind: The kind of counts.
        with_chars: Add a column with the number of characters changed.
    """
    total = sum_counts(counts.values())
    names = [name for name, _ in total.by_name(kind).most_common()]
    if not names:
        return "None."
    columns = [total, *counts.values()]
    by_name = [column.by_name(kind) for column in columns]
    rows = []
    for name in names:
        row = [escape_markdown(name)]
        if with_chars:
            row.append(f"{total.by_name('changed_chars')[name]:,}")
        for column, numbers in zip(columns, by_name, strict=True):
            share = numbers[name] / max(column.read, 1)
            row.append(f"{numbers[name]:,} ({share:.2%})" if numbers[name] else "")
        rows.append(row)
    header = ["", "characters"] if with_chars else [""]
    return markdown_table([*header, "all", *map(escape_markdown, counts)], rows)


def _examples(folder: Path, profiles: dict[str, dict[str, Any]]) -> str:
    """Return a section for each rule, with examples of what it dropped."""
    by_rule: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.rglob("*.jsonl")):
        with open(path, "rb") as file:
            for line in file:
                example = json.loads(line)
                by_rule[example["rule"]].append(example)
    sections = []
    for rule, examples in sorted(by_rule.items()):
        sections.append(f"### {escape_markdown(rule)}{_meaning(rule, profiles)}")
        for example in _spread(examples)[:EXAMPLES]:
            value = "" if example["value"] is None else f": {escape_markdown(str(example['value']))}"
            sections.append(f"{escape_markdown(example['id'])}{value}\n\n{_block(example['text'])}")
            if example["exam_item"]:
                sections.append(f"Benchmark item:\n\n{_block(str(example['exam_item']))}")
            if original := example["copy_of"]:
                text = f"\n\n{_block(original['text'])}" if original["text"] else ""
                sections.append(f"Copy of {escape_markdown(original['id'])}{text}")
    return "\n\n".join(sections) or "None."


def _meaning(rule: str, profiles: dict[str, dict[str, Any]]) -> str:
    """Return what the measure of a rule measures, and its bound in each profile; nothing for rules of other steps."""
    measure, _, side = rule.rpartition("_")
    if measure not in MEASURES:
        return ""
    bound = {"below": "min", "above": "max"}.get(side, "keep")
    bounds = []
    for name, profile in profiles.items():
        for step in profile["steps"]:
            if step["operator"] == measure and bound in step["bounds"]:
                bounds.append(f"{escape_markdown(str(step['bounds'][bound]))} in {escape_markdown(name)}")
    about = " ".join(inspect.getdoc(MEASURES[measure]).partition("\n\n")[0].split())
    return f"\n\n{about} `{bound}` is {', '.join(bounds)}."


def _spread(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first example of each input file, followed by the others."""
    files: set[str] = set()
    first, others = [], []
    for example in examples:
        file = example["id"].rpartition(":")[0]
        if file in files:
            others.append(example)
        else:
            first.append(example)
        files.add(file)
    return [*first, *others]


def _block(text: str) -> str:
    """Return the beginning of the text as a code block of one line, which nothing in the text can end."""
    line = NO_TEXT.sub(" ", text.replace("\n", " ⏎ "))
    if len(line) > EXCERPT:
        line = f"{line[:EXCERPT]} ..."
    longest_run = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest_run + 1)
    return f"{fence}text\n{line}\n{fence}"


def _draw(counts: dict[str, RowCounts], path: Path) -> None:
    """Draw a bar for each source: the share of its rows that was held out, and dropped by each rule."""
    total = sum_counts(counts.values()).dropped
    shown = [rule for rule, _ in total.most_common()]
    if len(shown) > RULES_IN_PICTURE:
        shown = shown[: RULES_IN_PICTURE - 1]

    # Collect the number of rows of each part of the bars, by source.
    parts = {"held out": [count.held_out for count in counts.values()]}
    for rule in shown:
        parts[rule.replace("_", " ")] = [count.dropped[rule] for count in counts.values()]
    if len(shown) < len(total):
        others = [rule for rule in total if rule not in shown]
        parts["other rules"] = [sum(count.dropped[rule] for rule in others) for count in counts.values()]

    bars = {}
    for label, rows in parts.items():
        bars[label] = [100 * n / max(count.read, 1) for n, count in zip(rows, counts.values(), strict=True)]

    # matplotlib takes 40 MB, so another process draws. `-I` keeps this folder, with its tokenize.py, off its path.
    command = [sys.executable, "-I", str(Path(__file__).with_name("plot_bars.py")), str(path)]
    subprocess.run(command, input=json.dumps({"names": list(counts), "bars": bars}), text=True, check=True)
