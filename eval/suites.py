"""Suites of tasks that are informative for models of a size. Prints the table of suites.yaml:

python eval/suites.py
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from buddygpt.cli.errors import UserError, did_you_mean
from buddygpt.cli.tables import markdown_table

SUITES = ("tiny", "small", "base")
HOW_TO_GET = {
    "hub": "set HF_HUB_OFFLINE=0 to download {names}",
    "exams": "write task files for {names} with eval/local_exams.py and give their folder as include_path",
    "text": "give {names} its text with heldout_text",
    "bundled": "restore {names} in eval/tasks",
}


class SuiteTask(NamedTuple):
    """A row of suites.yaml, which explains the columns."""

    task: str
    language: str
    form: str
    metric: str
    chance: float | None
    smallest: str
    source: str
    suites: list[str]
    data: str


@cache
def load_rows() -> tuple[SuiteTask, ...]:
    """Return all rows of suites.yaml."""
    text = (Path(__file__).parent / "suites.yaml").read_text(encoding="utf-8")
    return tuple(SuiteTask(**row) for row in yaml.safe_load(text))


def suite_tasks(suite: str) -> list[str]:
    """Return the tasks of a suite; UserError if there is no such suite."""
    if suite not in SUITES:
        match = did_you_mean(suite, SUITES)
        hint = f"did you mean `{match}`?" if match else f"choose one of {', '.join(SUITES)}"
        raise UserError(f"suite: there is no suite `{suite}`; {hint}")
    return [row.task for row in load_rows() if suite in row.suites]


def explain_missing(suite: str, missing: Iterable[str]) -> str:
    """Return which tasks of a suite have no data here, and how to get it, in one line."""
    missing, ways = list(missing), []
    for data, how in HOW_TO_GET.items():
        names = [row.task for row in load_rows() if row.task in missing and row.data == data]
        if names:
            ways.append(how.format(names=", ".join(names)))
    return f"suite {suite}: {len(missing)} of its {len(suite_tasks(suite))} tasks have no data here: {'; '.join(ways)}"


def to_markdown() -> str:
    """Return the table of all rows."""
    header = ["task", "language", "form", "read", "chance", "from", "source of `from`", "suites"]
    rows = []
    for row in load_rows():
        chance = "" if row.chance is None else f"1/{1 / row.chance:.0f}"
        rows.append([f"`{row.task}`", row.language, row.form, row.metric, chance, row.smallest, row.source])
        rows[-1].append(", ".join(row.suites) or "none")
    return markdown_table(header, rows, align=["---"] * len(header))


if __name__ == "__main__":
    print(to_markdown())
