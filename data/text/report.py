"""What data preparation has dropped and changed, as report.md and report.png that a person can read and judge."""

import inspect
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.writers import JsonlWriter

from buddygpt.data.text.operators import MEASURES

EXAMPLES = 3  # of each rule: kept by every task, and shown
EXCERPT = 240  # characters
RULES_IN_PICTURE = 9  # the others are summed up
HELD_OUT = "held_out"  # set aside, not lost
NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
MARKDOWN = re.compile(r"[\\`*\[\]<>|&]")


class ExampleWriter(JsonlWriter):
    """An exclusion writer of filters: keeps an excerpt of the first documents of every rule and task.

    Args:
        folder: For one filter alone; gets {rank:05d}.jsonl.
    """

    name = "examples"

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), compression=None, adapter=_example)
        self.seen: Counter = Counter()

    def write(self, document: Document, rank: int = 0, **kwargs: Any) -> None:
        key = (rank, document.metadata.get("filter_reason"))
        self.seen[key] += 1
        if self.seen[key] <= EXAMPLES:
            super().write(document, rank, **kwargs)


def _example(writer: ExampleWriter, document: Document) -> dict[str, Any]:
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


def write_report(folder: Path, manifest: dict[str, Any], examples: Path) -> None:
    """Write FOLDER/report.md and FOLDER/report.png.

    Args:
        folder: It exists.
        manifest: With `sources`, the `profiles` of its `generations`, and `cleaning`: by source, the counts `read`,
            `written`, `dropped_*`, `changed_*`, `changed_chars_*` and `language_*`.
        examples: Folder of folders that [`ExampleWriter`]s have written to.
    """
    counts = {name: Counter(rules) for name, rules in manifest["cleaning"].items()}
    profiles = {name: profile for run in manifest["generations"] for name, profile in run["profiles"].items()}
    sections = [
        f"# Data report\n\n{manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{manifest['text_bytes'] / 1e6:,.1f} MB of text from {len(manifest['sources'])} sources.",
        f"## Mixture\n\n{_mixture(manifest['sources'])}",
        f"## What became of the rows\n\n{_rows(counts)}\n\n![not written, by source and rule](report.png)",
        f"## Dropped by rule\n\nRows, and their share of those read.\n\n{_matrix(counts, 'dropped_')}",
        f"## Changed by operator\n\nDocuments, dropped ones too, and their share of the rows read.\n\n"
        f"{_matrix(counts, 'changed_', 'changed_chars_')}",
        f"## Languages\n\nDocuments that cleaning has let pass, where it looks for the language.\n\n"
        f"{_matrix(counts, 'language_')}",
        f"## Examples\n\n{_examples(examples, profiles)}",
    ]
    (folder / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    _draw(counts, folder / "report.png")


def _mixture(sources: list[dict[str, Any]]) -> str:
    languages: Counter = Counter()
    for source in sources:
        languages[source["language"] or "not given"] += source["share"]
    rows = [
        [
            _escape(source["name"]),
            _escape(source["language"] or ""),
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            f"{source['text_bytes'] / 1e6:,.2f}",
            f"{source['epochs']:.3g}",
            f"{source['share']:.2%}",
        ]
        for source in sources
    ]
    table = _table(["source", "language", "documents", "tokens", "MB", "epochs", "share of tokens read"], rows)
    shares = ", ".join(f"{_escape(name)} {share:.1%}" for name, share in languages.most_common())
    return f"{table}\n\nTokens read by language: {shares}."


def _rows(counts: dict[str, Counter]) -> str:
    rows = []
    for name, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        dropped, read = sum(_dropped(count).values()), max(count["read"], 1)
        cells = [count["read"], count["written"], count[f"dropped_{HELD_OUT}"], dropped]
        rows.append([_escape(name), *(f"{cell:,}" for cell in cells), f"{dropped / read:.2%}"])
    return _table(["source", "read", "written", "held out", "dropped", "share dropped"], rows)


def _dropped(count: Counter) -> Counter:
    """Return the rows lost, by rule."""
    rules = {label.removeprefix("dropped_"): n for label, n in count.items() if label.startswith("dropped_")}
    return Counter({rule: n for rule, n in rules.items() if rule != HELD_OUT})


def _matrix(counts: dict[str, Counter], prefix: str, amount: str | None = None) -> str:
    """Return a table with the labels of this prefix as rows and the sources as columns.

    Args:
        counts: By source.
        prefix: Of the labels.
        amount: Prefix of the labels of a second count, shown as characters.
    """
    total = sum(counts.values(), Counter())
    elsewhere = (f"dropped_{HELD_OUT}", *([amount] if amount else []))
    labels = [label for label, _ in total.most_common() if label.startswith(prefix)]
    labels = [label for label in labels if not label.startswith(elsewhere)]
    if not labels:
        return "None."

    def cell(count: Counter, label: str) -> str:
        return f"{count[label]:,} ({count[label] / max(count['read'], 1):.2%})" if count[label] else ""

    rows = []
    for label in labels:
        name = label.removeprefix(prefix)
        chars = [f"{total[amount + name]:,}"] if amount else []
        rows.append([_escape(name), *chars, cell(total, label), *(cell(count, label) for count in counts.values())])
    return _table(["", *(["characters"] if amount else []), "all", *map(_escape, counts)], rows)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _examples(folder: Path, profiles: dict[str, dict[str, Any]]) -> str:
    rules: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.rglob("*.jsonl")):
        with open(path, "rb") as file:
            for line in file:
                example = json.loads(line)
                rules[example["rule"]].append(example)
    sections = []
    for rule, found in sorted(rules.items()):
        sections.append(f"### {_escape(rule)}{_meaning(rule, profiles)}")
        for example in islice(_spread(found), EXAMPLES):
            value = "" if example["value"] is None else f": {_escape(str(example['value']))}"
            sections.append(f"{_escape(example['id'])}{value}\n\n{_block(example['text'])}")
            if example["exam_item"]:
                sections.append(f"Exam item:\n\n{_block(str(example['exam_item']))}")
            if original := example["copy_of"]:
                text = f"\n\n{_block(original['text'])}" if original["text"] else ""
                sections.append(f"Copy of {_escape(original['id'])}{text}")
    return "\n\n".join(sections) or "None."


def _meaning(rule: str, profiles: dict[str, dict[str, Any]]) -> str:
    """Say what a rule of a measure measures, and its bound in each profile; nothing of rules of another step."""
    measure, _, side = rule.rpartition("_")
    if measure not in MEASURES:
        return ""
    bound = {"below": "min", "above": "max"}.get(side, "keep")
    bounds = [
        f"{_escape(str(step['bounds'][bound]))} in {_escape(name)}"
        for name, profile in profiles.items()
        for step in profile["steps"]
        if step["operator"] == measure and bound in step["bounds"]
    ]
    about = " ".join(inspect.getdoc(MEASURES[measure]).partition("\n\n")[0].split())
    return f"\n\n{about} `{bound}` is {', '.join(bounds)}."


def _spread(examples: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Yield one example of each input file first, then the others."""
    files: set[str] = set()
    first, others = [], []
    for example in examples:
        file = example["id"].rpartition(":")[0]
        (others if file in files else first).append(example)
        files.add(file)
    return [*first, *others]


def _escape(text: str) -> str:
    """Return the text as one line in which nothing is Markdown or HTML."""
    return MARKDOWN.sub(lambda match: f"&#{ord(match[0])};", NO_TEXT.sub(" ", text))


def _block(text: str) -> str:
    """Return the beginning of the text as a code block of one line, which nothing in it can end."""
    line = NO_TEXT.sub(" ", text.replace("\n", " ⏎ "))
    line = line if len(line) <= EXCERPT else f"{line[:EXCERPT]} ..."
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", line)), 3)
    return f"{fence}text\n{line}\n{fence}"


def _draw(counts: dict[str, Counter], path: Path) -> None:
    """Draw for each source a bar of what was not written: held out, and dropped by rule."""
    total = sum((_dropped(count) for count in counts.values()), Counter())
    rules = [rule for rule, _ in total.most_common(RULES_IN_PICTURE - 1 if len(total) > RULES_IN_PICTURE else None)]
    parts: dict[str, Callable[[Counter], int]] = {
        "held out": lambda count: count[f"dropped_{HELD_OUT}"],
        **{rule.replace("_", " "): lambda count, rule=rule: _dropped(count)[rule] for rule in rules},
    }
    if len(rules) < len(total):
        parts["other rules"] = lambda count: sum(n for rule, n in _dropped(count).items() if rule not in rules)
    # Fonts may lack Han; the number is the row in the report's first tables.
    names = [name if name.isascii() else f"source {number}" for number, name in enumerate(counts, 1)]
    bars = {
        label: [100 * part(count) / max(count["read"], 1) for count in counts.values()]
        for label, part in parts.items()
    }
    command = [sys.executable, "-I", str(Path(__file__).with_name("plot_bars.py")), str(path)]
    subprocess.run(command, input=json.dumps({"names": names, "bars": bars}), text=True, check=True)
