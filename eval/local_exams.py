"""Write lm-eval task files that read CMMLU and C-Eval from local CSV folders instead of the Hub.

    python eval/local_exams.py --cmmlu DIR --ceval DIR --output outputs/eval_tasks
    lm_eval --model hf --model_args pretrained=CHECKPOINT,trust_remote_code=True \
        --include_path outputs/eval_tasks --tasks cmmlu,ceval-valid

Prompts, metrics and task names stay lm-eval's own; only the data comes from the folders, so nothing is downloaded:

    cmmlu: DIR/test/SUBJECT.csv, DIR/dev/SUBJECT.csv            columns Question, A, B, C, D, Answer
    ceval: DIR/val/SUBJECT_val.csv, DIR/dev/SUBJECT_dev.csv     columns question, A, B, C, D, answer

`dev` holds the few-shot examples. A subject without a dev file is evaluated zero-shot, also with `--num_fewshot`. The
groups `cmmlu` and `ceval-valid` average over the subjects found, weighted by their questions.
"""

import importlib.resources
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import write_atomically
from buddygpt.data.text.benchmarks import read_multiple_choice


@dataclass(frozen=True)
class Benchmark:
    """Names that a benchmark uses in its files and in lm-eval."""

    folder: str  # in lm_eval/tasks
    group: str  # lm-eval's name for all subjects together
    split: str  # the split that is evaluated, and its folder
    file: str  # pattern of file names
    question: str  # column names
    answer: str


CMMLU = Benchmark("cmmlu", "cmmlu", "test", "{subject}.csv", "Question", "Answer")
CEVAL = Benchmark("ceval", "ceval-valid", "val", "{subject}_{split}.csv", "question", "answer")


@dataclass
class BenchmarkArguments:
    cmmlu: str | None = field(default=None, metadata={"help": "Folder of CMMLU, with test/ and dev/."})
    ceval: str | None = field(default=None, metadata={"help": "Folder of C-Eval, with val/ and optionally dev/."})
    output: str = field(default="outputs/eval_tasks", metadata={"help": "Folder of task files, for --include_path."})


def main() -> None:
    (args,) = parse_arguments(BenchmarkArguments, description=__doc__)
    if not (args.cmmlu or args.ceval):
        raise UserError("give a folder of a benchmark: --cmmlu DIR, --ceval DIR or both.")
    for benchmark, folder in ((CMMLU, args.cmmlu), (CEVAL, args.ceval)):
        if not folder:
            continue
        tasks = build_tasks(benchmark, Path(folder))
        write_tasks(tasks, Path(args.output))
        zero_shot = [name for name, config in tasks.items() if "num_fewshot" in config]
        n_subjects = len(tasks) - 1  # without the group
        print(f"{benchmark.group}: {n_subjects} subjects ({len(zero_shot)} without dev: zero-shot) -> {args.output}")


def build_tasks(benchmark: Benchmark, folder: Path) -> dict[str, dict[str, Any]]:
    """Return lm-eval configurations by file name: one per subject in `folder`, and one for their group.

    Raises:
        UserError: There are no questions, lm-eval does not know a subject, or a row is malformed.
    """
    suffix = benchmark.file.format(subject="", split=benchmark.split)
    files = sorted((folder / benchmark.split).glob(f"*{suffix}"))
    if not files:
        raise UserError(f"{benchmark.group}: {folder / benchmark.split} has no *{suffix}.")
    others = sorted({path.name for path in files[0].parent.iterdir() if path.name[0] != "."} - {p.name for p in files})
    if others:
        print(
            f"skipped {len(others):,} of {len(files) + len(others):,} files in {files[0].parent}, whose names do not "
            f"end in {suffix}: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}",
            file=sys.stderr,
        )

    stock_folder = Path(str(importlib.resources.files("lm_eval"))) / "tasks" / benchmark.folder
    tasks: dict[str, dict[str, Any]] = {}
    for questions in files:
        subject = questions.name.removesuffix(suffix)
        name = f"{benchmark.group}_{subject}"
        stock = stock_folder / f"{name}.yaml"
        if not stock.is_file():
            raise UserError(
                f"{benchmark.group}: {questions} is not a subject of this benchmark: lm-eval has no task {name}."
            )
        dev = folder / "dev" / benchmark.file.format(subject=subject, split="dev")
        tasks[name] = build_task(benchmark, stock, questions, dev if dev.is_file() else None)

    group_name = f"_{benchmark.group}"
    group = {"include": str(stock_folder / f"{group_name}.yaml"), "task": list(tasks)}
    return {**tasks, group_name: group}


def build_task(benchmark: Benchmark, stock: Path, questions: Path, dev: Path | None) -> dict[str, Any]:
    """Return the configuration of one subject: lm-eval's own file, with the data replaced.

    Args:
        benchmark: The benchmark of the subject.
        stock: lm-eval's task file of the subject.
        questions: CSV file of the questions.
        dev: CSV file of the few-shot examples, or None to evaluate zero-shot.
    """
    files = {benchmark.split: questions}
    if dev:
        files["dev"] = dev
    for file in files.values():
        for _ in read_multiple_choice(file, benchmark.question, benchmark.answer):
            pass  # reading to the end checks every row
    config = {
        "include": str(stock),
        "task": stock.stem,
        "dataset_path": "csv",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(file.resolve()) for split, file in files.items()},
            "keep_default_na": False,  # an option may be "None" or "NA"
        },
    }
    if dev is None:
        config |= {"fewshot_split": None, "num_fewshot": 0}
    return config


def write_tasks(tasks: dict[str, dict[str, Any]], output: Path) -> None:
    """Write each configuration to `output`/NAME.yaml."""
    for name, config in tasks.items():
        with write_atomically(output / f"{name}.yaml") as partial:
            partial.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
