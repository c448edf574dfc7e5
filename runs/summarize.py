"""Gather what a run of the whole chain measured into `summary.json` and a `report.md` with pictures.

    python runs/summarize.py --run outputs/quickstart

Reads what the stages left: `seconds.tsv`, the run cards, `eval/scores.json` and `chat.json`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script

STAGES = {"base": "pretrain", "sft": "sft", "dpo": "dpo"}  # name of a checkpoint -> its folder
INSTALL_SECONDS = Path(__file__).resolve().parents[1] / ".venv" / "installed"


@dataclass
class SummarizeArguments:
    run: str = field(metadata={"help": "Folder of a finished run, such as outputs/quickstart."})


def read_seconds(run: Path) -> dict[str, int]:
    """Seconds of each stage; of the installation too, where `make setup` did it."""
    rows = (line.split("\t") for line in (run / "seconds.tsv").read_text(encoding="utf-8").splitlines())
    seconds = {name: int(value) for name, value in rows}
    return ({"install": int(INSTALL_SECONDS.read_text())} if INSTALL_SECONDS.exists() else {}) | seconds


def by_checkpoint(scores: dict[str, Any], task: str, metric: str) -> dict[str, dict[str, Any]]:
    """`{checkpoint: {acc, n, ci95}}` of one task."""
    found = {name: scores[name][task][metric] for name in STAGES}
    return {name: {"acc": score["value"], "n": score["n"], "ci95": score["ci95"]} for name, score in found.items()}


def summarize(run: Path) -> dict[str, Any]:
    """Everything the chain measured, as it goes into `summary.json`."""
    scores = json.loads((run / "eval" / "scores.json").read_text(encoding="utf-8"))
    cards = {name: json.loads((run / folder / "run.json").read_text()) for name, folder in STAGES.items()}
    chance = scores["sft"]["sample_exam_text"]["acc"]["chance"]
    questions = by_checkpoint(scores, "sample_qa", "exact_match")
    pairs = by_checkpoint(scores, "sample_pairs", "acc")
    bits_per_byte = {name: scores[name]["heldout_text"]["bits_per_byte"]["value"] for name in STAGES}
    return {
        "exam": {"chance": chance, **by_checkpoint(scores, "sample_exam_text", "acc")},
        "exam_letter": {"chance": chance, **by_checkpoint(scores, "sample_exam_letter", "acc")},
        "qa_exact_match": questions["dpo"]["acc"],
        "qa_exact_match_by_checkpoint": questions,
        "dpo_pair_accuracy": pairs["dpo"]["acc"],
        "pair_accuracy_by_checkpoint": pairs,
        "pair_accuracy_rejected_not_longer": by_checkpoint(scores, "sample_pairs/rejected_not_longer", "acc"),
        "dpo_reward_accuracy": cards["dpo"]["metrics"]["eval_rewards/accuracies"],
        "bits_per_byte": bits_per_byte["base"],
        "bits_per_byte_by_checkpoint": bits_per_byte,
        "parameters": cards["base"]["parameters"],
        "tokens_seen": cards["base"]["tokens_seen"],
        "seconds": read_seconds(run),
        "checkpoints": {name: str(run / folder) for name, folder in STAGES.items()} | {"native": str(run / "native")},
    }


def report(run: Path, summary: dict[str, Any]) -> str:
    """The same for people: scores, curves, a transcript, times."""
    bits = summary["bits_per_byte_by_checkpoint"]
    percent = lambda score: f"{score['acc']:.1%} [{score['ci95'][0]:.1%}, {score['ci95'][1]:.1%}]"  # noqa: E731
    rows = {
        f"exam, by the option's text (chance {summary['exam']['chance']:.0%})": summary["exam"],
        f"exam, by its letter (chance {summary['exam_letter']['chance']:.0%})": summary["exam_letter"],
        "free-form answers, exact match": summary["qa_exact_match_by_checkpoint"],
        "preference pairs": summary["pair_accuracy_by_checkpoint"],
        "preference pairs whose wrong answer is not longer": summary["pair_accuracy_rejected_not_longer"],
    }
    lines = [
        f"# {run.name}",
        "",
        f"{summary['parameters']:,} parameters, pretrained on {summary['tokens_seen']:,} tokens. "
        "All questions are worded in ways that never occur in training; in brackets the 95% interval.",
        "",
        f"| measured | n | {' | '.join(STAGES)} |",
        "|---|--:|" + "--:|" * len(STAGES),
        *(
            f"| {title} | {found['base']['n']} | {' | '.join(percent(found[name]) for name in STAGES)} |"
            for title, found in rows.items()
        ),
        "| bits per byte, held-out text | | " + " | ".join(f"{bits[name]:.3f}" for name in STAGES) + " |",
        "",
        "A model this small knows the words of the answer, not which letter stands before them. Preference pairs: "
        "is the chosen answer likelier? DPO's own measure, whether it gained more than the rejected "
        f"one, holds for {summary['dpo_reward_accuracy']:.1%} of them.",
        "By subject: [eval/report.md](eval/report.md).",
        "",
        "![scores](eval/scores.png)",
        "",
        "## Chat",
        "",
        *(f"> **{turn['question']}**\n> {turn['answer']}\n" for turn in json.loads((run / "chat.json").read_text())),
        "## Curves",
        "",
        *(f"{name}: ![{name}]({folder}/loss_curve.png)\n" for name, folder in STAGES.items()),
        "## Seconds",
        "",
        "| " + " | ".join(summary["seconds"]) + " |",
        "|" + "--:|" * len(summary["seconds"]),
        "| " + " | ".join(str(value) for value in summary["seconds"].values()) + " |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    (args,) = parse_arguments(SummarizeArguments, description=__doc__)
    run = Path(args.run)
    try:
        summary = summarize(run)
        told = report(run, summary)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: {run} is not a finished run") from error
    (run / "report.md").write_text(told, encoding="utf-8")
    (run / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(told)


if __name__ == "__main__":
    run_script(main)
