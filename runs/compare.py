"""Compare the checkpoints of a run in one table: exact match, pairs, length, repetition, ends, seconds.

    python runs/compare.py --run outputs/alignment --start sft

Reads what runs/alignment.sh wrote: `seconds.tsv`, `eval/scores.json` and the answers next to it. Writes `table.md` and
`table.json`. Brackets hold 95% intervals. The gain is that over the checkpoint `start` on the same questions.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import Any

import buddygpt.model  # noqa: F401  registers the model, so that its tokenizer loads without a question
from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, reading, run_script
from buddygpt.cli.files import read_json, write_atomically
from buddygpt.cli.tables import markdown_table

Z = NormalDist().inv_cdf(0.975)
Row = dict[str, Any]


@dataclass
class CompareArguments:
    run: str = field(metadata={"help": "Folder of a run, such as outputs/alignment."})
    start: str = field(default="sft", metadata={"help": "The checkpoint that all others started from."})


def main() -> None:
    (args,) = parse_arguments(CompareArguments, description=__doc__)
    run = Path(args.run)
    try:
        rows = compare(run, args.start)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: {run} is not a finished run of runs/alignment.sh") from error
    table = to_markdown(rows, args.start)
    with write_atomically(run / "table.json") as partial:
        partial.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with write_atomically(run / "table.md") as partial:
        partial.write_text(table, encoding="utf-8")
    print(table)


def compare(run: Path, start: str) -> list[Row]:
    """Return a row per checkpoint in the order of the evaluation, `start` first.

    Raises:
        UserError: A file is damaged, or `start` was not evaluated.
        FileNotFoundError: A file is missing.
    """
    scores = read_json(run / "eval" / "scores.json")
    seconds = read_seconds(run / "seconds.tsv")
    if start not in scores:
        raise UserError(f"start: {start} was not evaluated; there are {', '.join(scores)}")
    answers = {name: read_answers(run / "eval" / name) for name in scores}
    rows = []
    for name in sorted(scores, key=lambda name: name != start):
        with reading(run / "eval" / "scores.json"):
            exact, pairs = scores[name]["sample_qa"]["exact_match"], scores[name]["sample_pairs"]["acc"]
            row: Row = {"method": name, "n": exact["n"], "n_pairs": pairs["n"]}
            row |= {"exact_match": [exact["value"], *exact["ci95"]], "pairs": [pairs["value"], *pairs["ci95"]]}
        with reading(run / "eval" / name):
            gains = [answers[name][i]["exact_match"] - answers[start][i]["exact_match"] for i in answers[start]]
            row["gain"] = None if name == start else with_interval(gains)
            row |= describe_answers(list(answers[name].values()), run / name)
        rows.append({**row, "seconds": seconds.get(name)})
    return rows


def read_answers(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the newest answers of a checkpoint by the number of the question."""
    files = sorted(folder.glob("**/samples_sample_qa_*.jsonl"), key=lambda path: path.name)
    if not files:
        raise UserError(f"{folder} holds no samples_sample_qa_*.jsonl; run eval/run_eval.py with the task sample_qa")
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
    n, share = len(successes), mean(successes)
    centre, half = share + Z**2 / (2 * n), Z * (share * (1 - share) / n + Z**2 / (4 * n**2)) ** 0.5
    scale = 1 + Z**2 / n
    return [share, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def read_seconds(path: Path) -> dict[str, int]:
    """Return the seconds of each stage, with all attempts at it."""
    seconds: dict[str, int] = {}
    with reading(path):
        for line in path.read_text(encoding="utf-8").splitlines():
            stage, value, _ = line.split("\t")
            seconds[stage] = seconds.get(stage, 0) + int(value)
    return seconds


def to_markdown(rows: list[Row], start: str) -> str:
    """Return the table."""
    n, n_pairs = rows[0]["n"], rows[0]["n_pairs"]
    header = ["method", f"exact match (n = {n})", f"gain over {start}, points", f"pairs (n = {n_pairs})", "tokens"]
    header += ["repeat", "end", "seconds"]
    lines = []
    for row in rows:
        gain = "" if row["gain"] is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in row["gain"]))
        shares = [percent(row[key]) for key in ("exact_match", "pairs", "repeats", "ends")]
        tokens = "{:.1f} [{:.1f}, {:.1f}]".format(*row["tokens"])
        seconds = "" if row["seconds"] is None else str(row["seconds"])
        lines.append([row["method"], shares[0], gain, shares[1], tokens, shares[2], shares[3], seconds])
    return markdown_table(header, lines) + "\n"


def percent(share: list[float]) -> str:
    return "{:.1%} [{:.1%}, {:.1%}]".format(*share)


if __name__ == "__main__":
    run_script(main)
