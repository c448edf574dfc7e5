"""Results files as lm-eval writes them, for tests of reports."""

import json

TIME = "2026-01-01T00-00-00"


def write_results(folder, scores, n_shot=0, time=TIME, metric="acc", **more):
    """Write a results file with one metric for each question of the tasks in `scores`.

    Args:
        folder: Folder of the checkpoint.
        scores: By task: values of questions 0, 1, ..., or {number: value}. A value may be (log-likelihood, bytes).
        n_shot: Examples before each question.
        time: In the names of the files.
        metric: Name of the metric.
        more: More content of the results file; `rows` replaces the content of all samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    changed = more.pop("rows", {})
    scores = {task: values if isinstance(values, dict) else dict(enumerate(values)) for task, values in scores.items()}
    figures = {}
    for task, values in scores.items():
        rows = []
        for number, value in values.items():
            row = {"doc_id": number, "doc": {}, "arguments": {"a": {}, "b": {}}, "metrics": [metric], "filter": "none"}
            rows.append(json.dumps(row | {metric: value} | changed) + "\n")
        (folder / f"samples_{task}_{time}.jsonl").write_text("".join(rows), encoding="utf-8")
        figures[task] = {}
        if all(isinstance(value, int | float) for value in values.values()):
            figures[task] = {f"{metric},none": sum(values.values()) / len(values)}
    results = {
        "results": figures,
        "group_subtasks": {},
        "n-shot": dict.fromkeys(scores, n_shot),
        "config": {"model_args": {"pretrained": "model"}, "limit": None},
        "lm_eval_version": "0.4.13",
    }
    path = folder / f"results_{time}.json"
    path.write_text(json.dumps(results | more), encoding="utf-8")
    return path
