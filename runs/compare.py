"""Compare the checkpoints of a run in two tables: by the answers to questions, and by tool calls.

    python runs/compare.py --run outputs/alignment

Reads what runs/alignment.sh wrote: `seconds.tsv`, `eval*/scores.json` and the answers next to it. Writes `table.md`
and `table.json`. Brackets hold 95% intervals. A gain is that over the first row, on the same questions. CPU seconds
are those of all processes of a stage, the start of Python included.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import Any, NamedTuple

from scipy.stats import binomtest

import buddygpt.model  # noqa: F401  registers the model, so that its tokenizer loads without a question
from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, reading, run_script
from buddygpt.cli.files import read_json, write_atomically
from buddygpt.cli.tables import markdown_table

Z = NormalDist().inv_cdf(0.975)
Row = dict[str, Any]


class Comparison(NamedTuple):
    """A folder of run_eval.py, the task whose answers are compared, the checkpoint that the others started from."""

    folder: str
    task: str
    start: str
    columns: dict[str, str]  # headings of the keys of a row


COMPARISONS = {
    "answers": Comparison(
        "eval",
        "sample_qa",
        "sft",
        {"exact_match": "exact match", "gain": "gain, points", "pairs": "pairs", "tokens": "tokens"}
        | {"repeats": "repeat", "ends": "end", "cpu_seconds": "CPU seconds"},
    ),
    # Calls repeat themselves in any case: two of them have the same names.
    "calls": Comparison(
        "eval-calls",
        "sample_calls",
        "tools_more",
        {"exact_match": "exact calls", "gain": "gain, points", "tokens": "tokens"}
        | {"ends": "end", "cpu_seconds": "CPU seconds"},
    ),
}


@dataclass
class CompareArguments:
    run: str = field(metadata={"help": "Folder of a run, such as outputs/alignment."})


def main() -> None:
    (args,) = parse_arguments(CompareArguments, description=__doc__)
    run = Path(args.run)
    try:
        seconds = read_seconds(run / "seconds.tsv")
        rows = {name: compare(run, comparison, seconds) for name, comparison in COMPARISONS.items()}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: {run} is not a finished run of runs/alignment.sh") from error
    tables = "\n".join(to_markdown(rows[name], comparison) for name, comparison in COMPARISONS.items())
    with write_atomically(run / "table.json") as partial:
        partial.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with write_atomically(run / "table.md") as partial:
        partial.write_text(tables, encoding="utf-8")
    print(tables)


def compare(run: Path, comparison: Comparison, seconds: dict[str, int]) -> list[Row]:
    """Return a row per checkpoint in the order of the evaluation, the start first.

    Raises:
        UserError: A file is damaged, or the start was not evaluated.
        FileNotFoundError: A file is missing.
    """
    folder, task, start, columns = comparison
    scores = read_json(run / folder / "scores.json")
    if start not in scores:
        raise UserError(f"{run / folder}: {start} was not evaluated; there are {', '.join(scores)}")
    answers = {name: read_answers(run / folder / name, task) for name in scores}
    rows = []
    for name in sorted(scores, key=lambda name: name != start):
        with reading(run / folder / "scores.json"):
            row: Row = {"method": name, **read_score("exact_match", scores[name][task]["exact_match"])}
            if "pairs" in columns:
                row |= read_score("pairs", scores[name]["sample_pairs"]["acc"])
        with reading(run / folder / name):
            gains = [answers[name][i]["exact_match"] - answers[start][i]["exact_match"] for i in answers[start]]
            row["gain"] = None if name == start else with_interval(gains)
            row |= describe_answers(list(answers[name].values()), run / name)
        rows.append({**row, "cpu_seconds": seconds.get(name)})
    return rows


def read_score(key: str, score: dict[str, Any]) -> Row:
    return {key: [score["value"], *score["ci95"]], f"n_{key}": score["n"]}


def read_answers(folder: Path, task: str) -> dict[int, dict[str, Any]]:
    """Return the newest answers of a checkpoint by the number of the question."""
    files = sorted(folder.glob(f"**/samples_{task}_[0-9]*.jsonl"), key=lambda path: path.name)
    if not files:
        raise UserError(f"{folder} holds no samples_{task}_*.jsonl; run eval/run_eval.py with the task {task}")
    with reading(files[-1]), files[-1].open(encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
        return {sample["doc_id"]: sample for sample in samples}


def describe_answers(answers: list[dict[str, Any]], checkpoint: Path) -> Row:
    """Return mean tokens, the share of answers that repeat themselves, and the share that end before the limit.

    lm-eval removes the mark at the end; an answer of as many tokens as it may have is one without end.
    """
    tokenizer = load_tokenizer(str(checkpoint))
    lengths, repeats, ends = [], [], []
    for answer in answers:
        text = answer["resps"][0][0]
        limit = answer["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"]
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        repeats.append(repeats_itself(text))
        ends.append(lengths[-1] < limit)
    return {"tokens": with_interval(lengths), "repeats": proportion(repeats), "ends": proportion(ends)}


def repeats_itself(text: str) -> bool:
    """Return whether some 8 characters occur twice, or 4 characters three times in a row."""
    pieces = [text[i : i + 8] for i in range(len(text) - 7)]
    return len(set(pieces)) < len(pieces) or bool(re.search(r"(.{1,4}?)\1\1\1", text, re.DOTALL))


def with_interval(values: list[float]) -> list[float]:
    """Return the mean of `values` and its 95% interval."""
    half = Z * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [mean(values), mean(values) - half, mean(values) + half]


def proportion(successes: list[bool]) -> list[float]:
    """Return the share of successes and its 95% Wilson interval."""
    interval = binomtest(sum(successes), len(successes)).proportion_ci(method="wilson")
    return [mean(successes), float(interval.low), float(interval.high)]


def read_seconds(path: Path) -> dict[str, int]:
    """Return the CPU seconds of each stage, with all attempts at it."""
    seconds: dict[str, int] = {}
    with reading(path):
        for line in path.read_text(encoding="utf-8").splitlines():
            stage, _, _, value = line.split("\t")
            seconds[stage] = seconds.get(stage, 0) + int(value)
    return seconds


def to_markdown(rows: list[Row], comparison: Comparison) -> str:
    """Return the table of a comparison."""
    header, lines = ["method"], [[row["method"]] for row in rows]
    for key, heading in comparison.columns.items():
        count = rows[0].get(f"n_{key}")
        header.append(heading if count is None else f"{heading} (n = {count})")
        for row, cells in zip(rows, lines, strict=True):
            cells.append(to_cell(key, row[key]))
    return markdown_table(header, lines) + "\n"


def to_cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "cpu_seconds":
        return str(value)
    if key == "gain":
        return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in value))
    return ("{:.1f} [{:.1f}, {:.1f}]" if key == "tokens" else "{:.1%} [{:.1%}, {:.1%}]").format(*value)


if __name__ == "__main__":
    run_script(main)
