"""Categories of the subjects of C-Eval, CMMLU and MMLU: STEM, humanities and others, see subjects.yaml.

    categories_of("ceval-valid_cloze", "law")  # ["humanities"]

A report can so add up subjects, also of lm-eval's own tasks, whose rows do not name a category.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def read_subjects() -> dict[str, dict[str, Any]]:
    """Return benchmark -> category -> subjects, as a list or by their Chinese names."""
    return yaml.safe_load(Path(__file__).with_name("subjects.yaml").read_text(encoding="utf-8"))


def subjects_of(benchmark: str) -> list[str]:
    """Return all subjects of `ceval`, `cmmlu` or `mmlu`, sorted by name."""
    return sorted({subject for subjects in read_subjects()[benchmark].values() for subject in subjects})


def categories_of(task: str, subject: str) -> list[str]:
    """Return the categories of a subject: several for C-Eval's hard and CMMLU's Chinese subjects, none if unknown.

    Args:
        task: `ceval`, `cmmlu` or `mmlu`, or a task over all its subjects, such as `ceval-valid` or `mmlu_cloze`.
        subject: As in the name of lm-eval's task: `college_physics`.
    """
    categories = read_subjects().get(re.sub("(-valid)?(_cloze|_ppl|_gen)?$", "", task), {})
    return [category for category, subjects in categories.items() if subject in subjects]


def chinese_name(subject: str) -> str:
    """Return the Chinese name of a subject of C-Eval. Raises KeyError if there is no such subject."""
    for subjects in read_subjects()["ceval"].values():
        if isinstance(subjects, dict) and subject in subjects:
            return subjects[subject]
    raise KeyError(subject)
