"""Collect the measurements of a finished quickstart into `summary.json` and a `report.md` with pictures.

    python runs/summarize.py --run outputs/quickstart

Reads what the stages wrote: `seconds.tsv`, the run cards, `eval/scores.json` and `chat.json`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, reading, run_script
from buddygpt.cli.files import read_json, write_atomically
from buddygpt.cli.tables import escape_markdown, markdown_table

CHECKPOINTS = {"base": "pretrain", "sft": "sft", "dpo": "dpo"}  # name in the evaluation -> folder
INSTALL_SECONDS = Path(__file__).resolve().parents[1] / ".venv" / "installed"  # written by `make setup`


@dataclass
class SummarizeArguments:
    run: str = field(metadata={"help": "Folder of a finished run, such as outputs/quickstart."})


def main() -> None:
    (args,) = parse_arguments(SummarizeArguments, description=__doc__)
    run = Path(args.run)
    try:
        summary = summarize(run)
        chat = read_json(run / "chat.json")
        with reading(run / "chat.json"):
            if not isinstance(chat, list):
                raise TypeError(f"no list of questions, but {type(chat).__name__}")
            report = to_markdown(run.name, summary, chat)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: {run} is not a finished run") from error
    with write_atomically(run / "report.md") as partial:
        partial.write_text(report, encoding="utf-8")
    # runs/quickstart.sh takes this file as the sign of a finished run, so it is written last.
    with write_atomically(run / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(report)


def summarize(run: Path) -> dict[str, Any]:
    """Return the content of `summary.json`."""
    folders = {name: str(run / folder) for name, folder in CHECKPOINTS.items()}
    return {
        **read_scores(run / "eval" / "scores.json"),
        "dpo_reward_accuracy": read_number(run / "dpo" / "run.json", "metrics", "eval_rewards/accuracies"),
        "parameters": read_number(run / "pretrain" / "run.json", "parameters"),
        "tokens_seen": read_number(run / "pretrain" / "run.json", "tokens_seen"),
        "seconds": read_seconds(run),
        "checkpoints": {**folders, "native": str(run / "native")},
    }


def read_number(path: Path, *keys: str) -> float:
    """Return a number of a run card; `keys` lead to it."""
    value = read_json(path)
    with reading(path):
        for key in keys:
            value = value[key]
        if not isinstance(value, (int, float)):
            raise ValueError(f"{'/'.join(keys)} is {value}")
    return value


def read_scores(path: Path) -> dict[str, Any]:
    """Return the scores of `summary.json`."""
    scores = read_json(path)
    with reading(path):
        chance = float(scores["sft"]["sample_exam_text"]["acc"]["chance"])
        questions = by_checkpoint(scores, "sample_qa", "exact_match")
        pairs = by_checkpoint(scores, "sample_pairs", "acc")
        bits_per_byte = {name: float(scores[name]["heldout_text"]["bits_per_byte"]["value"]) for name in CHECKPOINTS}
        return {
            "exam": {"chance": chance, **by_checkpoint(scores, "sample_exam_text", "acc")},
            "exam_letter": {"chance": chance, **by_checkpoint(scores, "sample_exam_letter", "acc")},
            "qa_exact_match": questions["dpo"]["acc"],
            "qa_exact_match_by_checkpoint": questions,
            "dpo_pair_accuracy": pairs["dpo"]["acc"],
            "pair_accuracy_by_checkpoint": pairs,
            "pair_accuracy_rejected_not_longer": by_checkpoint(scores, "sample_pairs/rejected_not_longer", "acc"),
            "bits_per_byte": bits_per_byte["base"],
            "bits_per_byte_by_checkpoint": bits_per_byte,
        }


def by_checkpoint(scores: dict[str, Any], task: str, metric: str) -> dict[str, dict[str, Any]]:
    """Return one metric of one task as {checkpoint: {acc, n, ci95}}."""
    found = {}
    for name in CHECKPOINTS:
        score = scores[name][task][metric]
        low, high = score["ci95"]
        found[name] = {"acc": float(score["value"]), "n": int(score["n"]), "ci95": [float(low), float(high)]}
    return found


def read_seconds(run: Path) -> dict[str, int]:
    """Return the seconds of each stage, and of the installation if `make setup` did it.

    A stage that was stopped and resumed counts with all its attempts.
    """
    seconds = {}
    if INSTALL_SECONDS.exists():
        with reading(INSTALL_SECONDS):
            seconds["install"] = int(INSTALL_SECONDS.read_text())
    path = run / "seconds.tsv"
    with reading(path):
        for line in path.read_text(encoding="utf-8").splitlines():
            stage, value, *_ = line.split("\t")
            seconds[stage] = seconds.get(stage, 0) + int(value)
    return seconds


def to_markdown(title: str, summary: dict[str, Any], chat: list[dict[str, str]]) -> str:
    """Return the content of `report.md`: scores, a transcript, loss curves and times."""
    sections = [
        f"# {escape_markdown(title)}",
        f"{summary['parameters']:,} parameters, pretrained on {summary['tokens_seen']:,} tokens. The wording of the "
        "questions never occurs in training. Brackets hold the 95% interval.",
        score_table(summary),
        "A model this small knows the words of an answer, but not the letter of an option. Preference pairs: is the "
        "chosen answer more likely than the rejected one? DPO's own measure, whether training raised the chosen "
        f"answer more than the rejected one, holds for {summary['dpo_reward_accuracy']:.1%} of the pairs.\n"
        "By subject: [eval/report.md](eval/report.md).",
        "![scores](eval/scores.png)",
        "## Chat",
    ]
    for turn in chat:
        question, answer = (escape_markdown(turn[key]) for key in ("question", "answer"))
        sections.append(f"> **{question}**\n> {answer}")
    sections.append("## Curves")
    for name, folder in CHECKPOINTS.items():
        sections.append(f"{name}: ![{name}]({folder}/loss_curve.png)")
    seconds = summary["seconds"]
    times = [str(value) for value in seconds.values()]
    sections += [
        "## Seconds",
        markdown_table(list(map(escape_markdown, seconds)), [times], align=["--:"] * len(seconds)),
    ]
    return "\n\n".join(sections) + "\n"


def score_table(summary: dict[str, Any]) -> str:
    """Return a table with a row per measurement and a column per checkpoint."""
    measurements = {
        f"multiple choice, by option text (chance {summary['exam']['chance']:.0%})": summary["exam"],
        f"multiple choice, by letter (chance {summary['exam_letter']['chance']:.0%})": summary["exam_letter"],
        "free-form answers, exact match": summary["qa_exact_match_by_checkpoint"],
        "preference pairs": summary["pair_accuracy_by_checkpoint"],
        "preference pairs whose rejected answer is not longer": summary["pair_accuracy_rejected_not_longer"],
    }
    rows = []
    for title, scores in measurements.items():
        cells = []
        for name in CHECKPOINTS:
            low, high = scores[name]["ci95"]
            cells.append(f"{scores[name]['acc']:.1%} [{low:.1%}, {high:.1%}]")
        rows.append([title, str(scores["base"]["n"]), *cells])
    bits_per_byte = [f"{summary['bits_per_byte_by_checkpoint'][name]:.3f}" for name in CHECKPOINTS]
    rows.append(["bits per byte, held-out text", "", *bits_per_byte])
    return markdown_table(["measured", "n", *CHECKPOINTS], rows)


if __name__ == "__main__":
    run_script(main)
