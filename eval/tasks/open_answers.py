"""Quality of generated text without a judge, for lm-eval's `custom_dataset` and `class`.

Each answer gets these scores:

    distinct_1, _2, _3   share of its sequences of 1, 2 or 3 units that are different. A unit is a Chinese character, a
                         word, a number or a mark (Li et al. 2016, arXiv 1510.03055)
    loop                 share of its units in the longest part that is one cycle, twice or more; 0 if there is none
    ended                1 if the model ended it before `max_gen_toks`; only with eval/run_eval.py
    same_language        1 if it is in the language of the prompt
    n_chars, n_tokens    its length; tokens only with eval/run_eval.py

An empty answer scores 0 in all of them.
"""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from buddygpt.data.text.measures import language
from buddygpt.eval.benchmarks.rows import read_rows
from buddygpt.eval.harness import Task

PROMPTS = Path(__file__).parent / "open_answers.jsonl"
HAN = r"\u3400-\u9fff\uf900-\ufaff"
UNIT = re.compile(rf"[{HAN}]|[^\W\d_{HAN}]+(?:'[^\W\d_{HAN}]+)?|\d+|[^\w\s]|_")
LONGEST_WORD = 30
MIN_LOOP = 8  # units that repeat earlier ones; shorter repetitions, such as "very, very", are ordinary language


class OpenAnswers(Task):
    """Asks the question through the chat template, or lets the model continue the beginning of a text without one."""

    def fewshot_context(self, doc, num_fewshot=0, *, apply_chat_template=False, chat_template=None, **_) -> str:
        if apply_chat_template:
            return chat_template([{"role": "user", "content": doc["question"]}])
        return doc["beginning"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the scores of an answer, for lm-eval."""
    answer = results[0]
    scores = score(answer, doc["language"])
    if hasattr(answer, "ended"):  # see buddygpt.eval.running.answers.Answer
        scores["ended"] = float(answer.ended)
        if answer.n_tokens is not None:
            scores["n_tokens"] = float(answer.n_tokens)
    return scores


def prompts(**_) -> dict[str, Dataset]:
    """Return the bundled prompts. Rows: language, question, beginning, subject (the language)."""
    rows = read_rows(PROMPTS, "language", "question", "beginning")
    return {"test": Dataset.from_list([{**row, "subject": row["language"]} for row in rows])}


def score(answer: str, wanted: str) -> dict[str, float]:
    """Return the scores that depend on the text of an answer alone; `wanted` is its right language, zh or en."""
    units = split(answer)
    scores = {f"distinct_{n}": distinct(units, n) for n in (1, 2, 3)}
    found = language(answer, min_han=0.25, max_accented=0.01) if units else "none"
    return {
        **scores,
        "loop": longest_loop(units),
        "same_language": float(found == wanted),
        "n_chars": float(len(answer.strip())),
    }


def split(text: str) -> list[str]:
    """Return the units of a text. A word that is too long to be one is split into its letters."""
    return [unit for word in UNIT.findall(text.lower()) for unit in (word if len(word) > LONGEST_WORD else [word])]


def distinct(units: list[str], n: int) -> float:
    """Return the share of different ones of n units each; 1 for a text of fewer, 0 for an empty one."""
    if not units:
        return 0.0
    sequences = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    return len(set(sequences)) / len(sequences) if sequences else 1.0


def longest_loop(units: list[str]) -> float:
    """Return the share of the longest part that is one cycle, twice or more; 0 if there is none."""
    longest = 0
    for period in range(1, len(units) // 2 + 1):
        repeated = 0
        for before, after in zip(units, units[period:], strict=False):
            repeated = repeated + 1 if before == after else 0
            if repeated >= max(period, MIN_LOOP):
                longest = max(longest, period + repeated)
    return longest / len(units) if units else 0.0
