"""Exams of multiple choice in forms that lm-eval lacks: options by their text, filled in, or generated.

The task files `eval/tasks/*_cloze.yaml`, `*_ppl.yaml` and `*_gen.yaml` name what they take from here. A task holds all
subjects of an exam, so bits per byte are those of all answers together. Subjects take turns, so the first N questions
cover all of them. Examples come from `dev`, in their order, and from the subject of the question.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import datasets
from datasets import Dataset
from lm_eval.api.instance import Instance

from buddygpt.cli.errors import UserError
from buddygpt.eval.benchmarks.local_rows import read_files
from buddygpt.eval.harness import Task
from buddygpt.eval.reporting.subjects import categories_of, chinese_name, subjects_of

LETTERS = "ABCD"
# The letter that an answer names, the surest form first.
NAMED = [
    re.compile(r"^[\s:：(（]*([A-D])(?![A-Za-z])"),
    re.compile(r"答案[^A-Za-z\n]{0,6}([A-D])(?![A-Za-z])"),
    re.compile(r"[Aa]nswer(?: is|:)? \(?([A-D])(?![A-Za-z])"),
    re.compile(r"(?<![A-Za-z])([A-D])(?![A-Za-z])"),
]


class Exam(NamedTuple):
    """Where an exam lies on the Hub, and how its rows are read.

    Attributes:
        repository: As in lm-eval's own task.
        test: The split that is evaluated.
        dev: The split of the examples.
        read: Turns a row of the Hub into question, choices and the number of the right one.
        reader: Reads local files as rows of the Hub; a key of `buddygpt.eval.benchmarks.local_rows.READERS`.
        subset: The part of the repository; None: one for each subject.
    """

    repository: str
    test: str
    dev: str
    read: Callable[[dict[str, Any]], tuple[str, list[str], int]]
    reader: str
    subset: str | None = None


def read_lettered(row: dict[str, Any]) -> tuple[str, list[str], int]:
    question, answer = ("question", "answer") if "question" in row else ("Question", "Answer")
    return row[question], [row[letter] for letter in LETTERS], LETTERS.index(row[answer])


def read_arc(row: dict[str, Any]) -> tuple[str, list[str], int]:
    return row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])


def read_arc_zh(row: dict[str, Any]) -> tuple[str, list[str], int]:
    options = [row[f"option_{letter}"] for letter in "abcde"]
    return row["instruction"], [option for option in options if option], "ABCDE".index(row["answer"].upper())


EXAMS = {
    "cmmlu": Exam("haonan-li/cmmlu", "test", "dev", read_lettered, "cmmlu"),
    "ceval": Exam("ceval/ceval-exam", "val", "dev", read_lettered, "ceval"),
    "mmlu": Exam(
        "cais/mmlu", "test", "dev", lambda row: (row["question"], row["choices"], int(row["answer"])), "mmlu"
    ),
    "arc_easy": Exam("allenai/ai2_arc", "test", "validation", read_arc, "arc", "ARC-Easy"),
    "arc_challenge": Exam("allenai/ai2_arc", "test", "validation", read_arc, "arc", "ARC-Challenge"),
    "arc_zh": Exam("alexandrainst/m_arc", "test", "validation", read_arc_zh, "arc_zh", "zh"),
}


def load(benchmark: str, files: Mapping[str, Mapping[str, str]] | None = None, **_: Any) -> dict[str, Dataset]:
    """Return the splits `test` and `dev` of an exam, for lm-eval's `custom_dataset`.

    Rows: question, choices, answer (number of the right choice), and for exams with subjects: subject, categories, and
    for C-Eval the Chinese `name` of the subject.

    Args:
        benchmark: A key of `EXAMS`.
        files: Local files instead of the Hub: of each split (`test`, `dev`), by subject, or by "" without subjects.

    Raises:
        UserError: The data cannot be downloaded, or a local file cannot be read.
    """
    exam = EXAMS[benchmark]
    splits: dict[str, dict[str, list[dict[str, Any]]]] = {"test": {}, "dev": {}}
    if files:
        for split, of_split in files.items():
            splits[split] = {subject: read_files(exam.reader, file) for subject, file in of_split.items()}
    else:
        for subject in subjects_of(benchmark) if exam.subset is None else [""]:
            data = _download(exam, exam.subset or subject)
            splits["test"][subject], splits["dev"][subject] = list(data[exam.test]), list(data[exam.dev])

    result = {}
    for split, by_subject in splits.items():
        rows = [[_to_row(benchmark, subject, row) for row in of_subject] for subject, of_subject in by_subject.items()]
        in_turns = [row for row in chain.from_iterable(zip_longest(*rows)) if row]
        result[split] = Dataset.from_list(in_turns)
    return result


def _download(exam: Exam, subset: str) -> Any:
    try:
        return datasets.load_dataset(exam.repository, subset)
    except Exception as error:  # the Hub's client raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{exam.repository} ({subset}) cannot be downloaded ({reason}); set HF_HUB_OFFLINE=0, or write task files "
            "for a local copy with eval/local_exams.py and give their folder as include_path"
        ) from error


def _to_row(benchmark: str, subject: str, row: dict[str, Any]) -> dict[str, Any]:
    question, choices, answer = EXAMS[benchmark].read(row)
    result = {"question": question, "choices": choices, "answer": answer}
    if subject:
        result |= {"subject": subject, "categories": categories_of(benchmark, subject)}
    if benchmark == "ceval":
        result["name"] = chinese_name(subject)
    return result


class ExamTask(Task):
    """A task over the rows of [`load`]: examples of the same subject, and bits per byte of the right answer."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.examples = defaultdict(list)
        for row in self.dataset["dev"]:
            self.examples[row.get("subject")].append(row)

    def fewshot_context(self, doc, num_fewshot=0, **options) -> str:
        """Return the prompt. A subject without examples is asked zero-shot.

        Raises:
            UserError: There are examples of the subject, but fewer than `num_fewshot`.
        """
        examples = self.examples[doc.get("subject")]
        if 0 < len(examples) < num_fewshot:
            raise UserError(
                f"{self.task_name}: num_fewshot is {num_fewshot}, but `dev` has {len(examples)} examples"
                + (f" of {doc['subject']}" if doc.get("subject") else "")
            )
        self.sampler.replace_df(examples)
        return super().fewshot_context(doc, num_fewshot=num_fewshot if examples else 0, **options)

    def construct_requests(self, doc, ctx, *, apply_chat_template=False, **options) -> list[Instance] | Instance:
        # Tokenizers join a space or a mark with the letter after it, so a prompt for generation must not end in one.
        if self.OUTPUT_TYPE == "generate_until" and not apply_chat_template:
            ctx = ctx.rstrip(" :：")
        return super().construct_requests(doc, ctx, apply_chat_template=apply_chat_template, **options)

    def process_results(self, doc, results) -> dict[str, Any]:
        """Return the value of each metric, in the order of `metric_list`.

        `bits_per_byte` is (log-likelihood of the right choice in nats, its bytes), as in lm-eval's own tasks; they are
        summed over all questions. A space between prompt and choice counts in the likelihood only, as for acc_bytes.
        """
        scores = super().process_results(doc, results)
        if "bits_per_byte" in self.aggregation():
            likelihood, _ = results[doc["answer"]]
            scores["bits_per_byte"] = (likelihood, len(doc["choices"][doc["answer"]].encode()))
        return {metric: scores[metric] for metric in self.aggregation()}


def grade_letter(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether a generated answer names the right letter, and whether it names one at all."""
    letter = find_letter(results[0])
    return {"exact_match": float(letter == LETTERS[doc["answer"]]), "answered": float(letter is not None)}


def find_letter(answer: str) -> str | None:
    """Return the letter that an answer names: at its start, after 答案 or "answer is", else the first on its own."""
    for pattern in NAMED:
        if found := pattern.search(answer):
            return found[1]
    return None
