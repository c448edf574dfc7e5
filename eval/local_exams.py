"""CMMLU and C-Eval from local CSV folders: task files that take the place of lm-eval's own.

    python eval/local_exams.py --cmmlu DIR --ceval DIR --output outputs/eval_tasks
    lm_eval --model hf --model_args pretrained=CHECKPOINT,trust_remote_code=True \
        --include_path outputs/eval_tasks --tasks cmmlu,ceval-valid

Prompts, metrics and names stay lm-eval's, only the data is read from the folders, so nothing is downloaded:

    cmmlu: DIR/test/SUBJECT.csv, DIR/dev/SUBJECT.csv            columns Question, A, B, C, D, Answer
    ceval: DIR/val/SUBJECT_val.csv, DIR/dev/SUBJECT_dev.csv     columns question, A, B, C, D, answer

`dev` holds the few-shot examples. A subject without it is asked zero-shot whatever `--num_fewshot` says. The groups
`cmmlu` and `ceval-valid` average over the subjects that are there, weighted by their questions.
"""

import csv
import importlib.resources
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script


@dataclass(frozen=True)
class Exam:
    """How an exam's files are named here and in lm-eval."""

    folder: str  # below lm_eval/tasks
    group: str
    split: str
    file: str
    question: str
    answer: str


CMMLU = Exam("cmmlu", "cmmlu", "test", "{subject}.csv", "Question", "Answer")
CEVAL = Exam("ceval", "ceval-valid", "val", "{subject}_{split}.csv", "question", "answer")


@dataclass
class ExamArguments:
    cmmlu: str | None = field(default=None, metadata={"help": "CMMLU's folder, holding test/ and dev/."})
    ceval: str | None = field(default=None, metadata={"help": "C-Eval's folder, holding val/ and perhaps dev/."})
    output: str = field(default="outputs/eval_tasks", metadata={"help": "Folder of task files, for --include_path."})


def main() -> None:
    (args,) = parse_arguments(ExamArguments, description=__doc__)
    if not (args.cmmlu or args.ceval):
        raise UserError("give a folder of exams: --cmmlu DIR, --ceval DIR or both.")
    for exam, folder in ((CMMLU, args.cmmlu), (CEVAL, args.ceval)):
        if folder:
            tasks = exam_tasks(exam, Path(folder))
            _write(tasks, Path(args.output))
            zero_shot = sum("num_fewshot" in config for config in tasks.values())
            print(f"{exam.group}: {len(tasks) - 1} subjects ({zero_shot} without dev: zero-shot) -> {args.output}")


def exam_tasks(exam: Exam, folder: Path) -> dict[str, dict[str, Any]]:
    """lm-eval configurations, by file name, for the subjects in `folder` and their group.

    Raises:
        UserError: The folder or its questions are missing, a subject is not the exam's, or a row is malformed.
    """
    suffix = exam.file.format(subject="", split=exam.split)
    files = sorted((folder / exam.split).glob(f"*{suffix}"))
    if not files:
        raise UserError(f"{exam.group}: {folder / exam.split} has no *{suffix}.")
    stock = Path(str(importlib.resources.files("lm_eval"))) / "tasks" / exam.folder
    tasks = {}
    for path in files:
        subject = path.name.removesuffix(suffix)
        name = f"{exam.group}_{subject}"
        if not (stock / f"{name}.yaml").is_file():
            raise UserError(f"{exam.group}: {path} is not a subject of this exam, lm-eval has no task {name}.")
        dev = folder / "dev" / exam.file.format(subject=subject, split="dev")
        tasks[name] = _task(stock / f"{name}.yaml", exam, path, dev if dev.is_file() else None)
    return tasks | {f"_{exam.group}": {"include": str(stock / f"_{exam.group}.yaml"), "task": list(tasks)}}


def _task(stock: Path, exam: Exam, questions: Path, dev: Path | None) -> dict[str, Any]:
    files = {exam.split: questions, "dev": dev} if dev else {exam.split: questions}
    for path in files.values():
        _check(path, exam)
    data_files = {split: str(path.resolve()) for split, path in files.items()}
    config = {
        "include": str(stock),
        "task": stock.stem,
        "dataset_path": "csv",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data_files, "keep_default_na": False},  # an option may read "None" or "NA"
    }
    return config if dev else {**config, "fewshot_split": None, "num_fewshot": 0}


def _check(path: Path, exam: Exam) -> None:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = (exam.question, "A", "B", "C", "D", exam.answer)
        missing = [column for column in columns if column not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: no column {', '.join(missing)}.")
        for row in rows:
            if not all(row[column] for column in columns):
                raise UserError(f"{path}, line {rows.line_num}: a question, option or answer is empty.")
            if row[exam.answer] not in ("A", "B", "C", "D"):
                raise UserError(f"{path}, line {rows.line_num}: the answer is `{row[exam.answer]}`, not A, B, C or D.")
        if rows.line_num < 2:
            raise UserError(f"{path} has no rows.")


def _write(tasks: dict[str, dict[str, Any]], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name, config in tasks.items():
        unfinished = output / f"{name}.yaml.tmp"
        unfinished.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
        unfinished.replace(output / f"{name}.yaml")


if __name__ == "__main__":
    run_script(main)
