"""Tests that IFEval and MATH-500 have their packages, and run on local files without network."""

import json
from pathlib import Path

import lm_eval
import nltk
import pytest
from lm_eval.tasks import TaskManager

from buddygpt.cli.errors import UserError
from buddygpt.eval.running.task_loading import require_punkt

STOCK = Path(lm_eval.__file__).parent / "tasks"
PROBLEM = {"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}$.", "answer": "2", "subject": "Algebra"}
INSTRUCTION = {
    "key": 1,
    "prompt": "Write about a dog, without commas, in English.",
    "instruction_id_list": ["punctuation:no_comma", "language:response_language"],
    "kwargs": [{"language": None}, {"language": "en"}],
}


def load_local(folder, stock, split, row, **more):
    """Load one of lm-eval's tasks with the data of a local file."""
    name = Path(stock).stem
    (folder / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    task = {"include": str(STOCK / stock), "task": name, "dataset_path": "json"}
    task["dataset_kwargs"] = {"data_files": {split: str(folder / "rows.jsonl")}}
    (folder / "task.yaml").write_text(json.dumps(task | more), encoding="utf-8")
    return TaskManager(include_path=folder, include_defaults=False).load(name)["tasks"][name]


@pytest.mark.parametrize("stock", ["minerva_math/minerva_math500.yaml", "hendrycks_math/hendrycks_math500.yaml"])
def test_math_500_is_scored_from_a_local_file(stock, tmp_path):
    task = load_local(tmp_path, stock, "test", PROBLEM, dataset_name=None)
    scores = task.process_results(task.eval_docs[0], [r"Final Answer: The final answer is $2$. I hope it is correct."])
    assert scores["exact_match"] == 1 and scores.get("math_verify", 1) == 1


@pytest.mark.slow
def test_ifeval_is_scored_from_a_local_file_and_its_missing_data_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk, "download", lambda name: False)  # would wait for a network
    task = load_local(tmp_path, "ifeval/ifeval.yaml", "train", INSTRUCTION)
    for answer, followed in {"The dog sleeps in the old house.": True, "A dog, a cat, and a house.": False}.items():
        assert task.process_results(task.eval_docs[0], [answer])["prompt_level_strict_acc"] == followed

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="python -m nltk.downloader punkt_tab"):
        require_punkt()
