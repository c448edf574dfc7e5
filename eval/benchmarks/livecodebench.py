"""LiveCodeBench: write a program that passes all tests, or predict the output of a call (arXiv 2403.07974).

The task files `eval/tasks/livecodebench*.yaml` name what they take from here. Prompts, limits and comparisons follow
lcb_runner of github.com/LiveCodeBench/LiveCodeBench. Generated programs run in `sandbox.py`, each test on its own; the
expected output stays outside.
"""

import ast
import json
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from itertools import chain
from typing import Any

from datasets import Dataset

from buddygpt.cli.errors import UserError
from buddygpt.eval.benchmarks.local_rows import read_files
from buddygpt.eval.benchmarks.sandbox import require_sandbox, run_program
from buddygpt.eval.harness import Task

SECONDS = 6  # for each test, as in lcb_runner
# lcb_runner also lets programs use these modules without importing them.
MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
PRELUDE = "".join(f"from {name} import *\n" for name in MODULES) + "".join(f"import {name}\n" for name in MODULES)
PRELUDE += "sys.setrecursionlimit(50000)\n"
MARK = "=> "  # before the result of a call, which is the last line
CALL = """

_arguments = [json.loads(line) for line in sys.stdin.read().split("\\n")]
_function = getattr(Solution(), {name!r}) if "Solution" in globals() else globals()[{name!r}]
print("\\n{mark}" + json.dumps(_function(*_arguments)))
"""


def load(reader: str, files: Mapping[str, Mapping[str, str]] | None = None, **_: Any) -> dict[str, Dataset]:
    """Return the problems, for lm-eval's `custom_dataset`; UserError if no local files are given or one is bad."""
    if not files:
        raise UserError(
            f"{reader} is read from local files: write its task file with eval/local_exams.py --{reader} FILE"
        )
    rows = chain.from_iterable(read_files(reader, file) for file in files["test"].values())
    return {"test": Dataset.from_list(list(rows))}


class CodeGeneration(Task):
    """Generated programs that must pass all tests. The tests are kept out of the rows, which lm-eval logs."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        require_sandbox()
        super().download(dataset_kwargs, **options)
        rows = self.dataset["test"]
        self.tests = dict(zip(rows["question_id"], rows["tests"], strict=True))
        self.dataset = {"test": rows.remove_columns("tests")}

    def process_results(self, doc, results) -> dict[str, float]:
        code = extract_code(results[0])
        return {"acc": float(all(passes(code, test, doc["function"]) for test in self.tests[doc["question_id"]]))}


def extract_code(answer: str) -> str:
    """Return the last block between lines with ```, or the whole answer if there is no such line."""
    lines = answer.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    if not fences:
        return answer
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


def passes(code: str, test: Mapping[str, str], function: str = "") -> bool:
    """Run a program on one test.

    Args:
        code: The program.
        test: `input` and `output`. With a `function`, the input has an argument as JSON on each line.
        function: A function, or a method of the class Solution, whose result is compared.
    """
    program = PRELUDE + code + (CALL.format(name=function, mark=MARK) if function else "")
    outcome = run_program(program, test["input"], SECONDS)
    if outcome.status != "passed":
        return False
    if not function:
        return same_output(outcome.stdout, test["output"])
    result = outcome.stdout.rstrip("\n").rpartition("\n")[2]
    try:
        return result.startswith(MARK) and json.loads(result.removeprefix(MARK)) == json.loads(test["output"])
    except (ValueError, RecursionError):  # the program wrote that line itself
        return False


def same_output(output: str, expected: str) -> bool:
    """Return whether lines are equal, without white space around them, or equal numbers."""
    lines, expected_lines = ([line.strip() for line in text.strip().split("\n")] for text in (output, expected))
    if len(lines) != len(expected_lines):
        return False
    return all(
        line == wanted or (_numbers(line) is not None and _numbers(line) == _numbers(wanted))
        for line, wanted in zip(lines, expected_lines, strict=True)
    )


def _numbers(line: str) -> list[Decimal] | None:
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None


def grade_output(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the last `assert call == OUTPUT` of an answer has the right output. Nothing is executed."""
    asserts = [line.strip() for line in results[0].split("\n") if line.strip().startswith("assert")]
    text = asserts[-1] if asserts else extract_code(results[0]).strip()
    try:
        if asserts:
            comparison = ast.parse(text).body[0].test
            value = ast.literal_eval(
                comparison.comparators[0] if isinstance(comparison.ops[0], ast.Eq) else comparison
            )
        else:
            value = ast.literal_eval(text)
    except (AttributeError, IndexError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"exact_match": 0.0}
    return {"exact_match": float(value == json.loads(doc["output"]))}
