"""Compare checkpoints on the questions that both answered: better, worse, or cannot tell."""

from collections.abc import Callable, Iterable
from typing import Any

from buddygpt.eval.reporting.intervals import Difference, adjust, compare_proportions, compare_ratios, compare_unpaired
from buddygpt.eval.reporting.page import Table
from buddygpt.eval.reporting.results import by_run
from buddygpt.eval.reporting.scores import FROM_RATIO, Outcomes, TaskOutcomes, TaskScores, format_numbers

ALPHA = 0.05
UNSURE = "cannot tell"
VERDICTS = {  # as reports show them
    "better": "better / 更好",
    "worse": "worse / 更差",
    "higher": "higher / 更高",
    "lower": "lower / 更低",
    UNSURE: "cannot tell / 无法判断",
}

# task, metric, n: common questions, a and b: scores of these, difference: B - A, ci95, p, verdict, kind, paired
Comparison = dict[str, Any]


def compared_pairs(names: list[str], baseline: str | None = None) -> list[tuple[str, str]]:
    """Return which checkpoints to compare: each with the baseline, and with the one before it.

    Of a run with `RUN@STEP`, only the last step counts.

    Args:
        names: The checkpoints in their order.
        baseline: The first one, if None.
    """
    earlier = {name for of_run in by_run(names).values() for name in of_run[:-1]} - {baseline}
    names = [name for name in names if name not in earlier]
    baseline = baseline or names[0]
    pairs = [(baseline, name) for name in names if name != baseline]
    before = [(a, b) for a, b in zip(names, names[1:], strict=False) if baseline not in (a, b)]
    return pairs + before


def compare_outcomes(a: TaskOutcomes, b: TaskOutcomes) -> list[Comparison]:
    """Compare two checkpoints in every task and metric that both have, on their common questions."""
    rows = []
    for task, metric in _common(a, b):
        row = compare_metric(a[task][metric], b[task][metric])
        rows.append({"task": task, "metric": metric, "paired": True, **row})
    return _with_verdicts(rows, lambda row: _direction(a, b, row))


def compare_scores(a: TaskScores, b: TaskScores) -> list[Comparison]:
    """Compare two checkpoints of which only scores and intervals are known, as if their questions were different."""
    rows = []
    for task, metric in _common(a, b):
        one, other = a[task][metric], b[task][metric]
        if one["ci95"] and other["ci95"]:
            found = compare_unpaired((one["value"], *one["ci95"]), (other["value"], *other["ci95"]))
            n = one["n"] if one["n"] == other["n"] else min(one["n"], other["n"])
            row = {"n": n, "n_a": one["n"], "n_b": other["n"], **_as_row(found, one["value"], other["value"])}
            rows.append({"task": task, "metric": metric, "paired": False, "kind": one.get("kind", "share"), **row})
    return _with_verdicts(rows, lambda row: {"share": True, "number": None}.get(row["kind"], False))


def compare_metric(a: Outcomes, b: Outcomes) -> Comparison:
    """Compare one metric of two checkpoints on their common questions; without any, there is no difference."""
    common = [question for question in a.values if question in b.values]
    kind = a.kind if a.kind == b.kind else "number"  # such as 0 or 1 for all questions of one, and 0.5 for the other
    counts = {"n": len(common), "n_a": len(a.values), "n_b": len(b.values), "kind": kind}
    if not common:
        return {**counts, "a": None, "b": None, "difference": None, "ci95": None, "p": None}
    a, b = a.only(common), b.only(common)
    if a.is_binary and b.is_binary:
        pairs = [(bool(a.values[question][0]), bool(b.values[question][0])) for question in common]
        cells = [pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))]
        return {**counts, **_as_row(compare_proportions(*cells), a.total(), b.total())}
    columns = [column for each in (a, b) for column in zip(*each.values.values(), strict=True)]
    found = compare_ratios(*columns)
    if found is None:
        return {**counts, "a": a.total(), "b": b.total(), "difference": b.total() - a.total(), "ci95": None, "p": None}
    if a.kind == "perplexity":  # compared as its logarithm, which is a ratio of sums
        found = Difference(-found.value, -found.high, -found.low, found.p)
    elif a.kind == "bits_per_byte":
        to_bits = FROM_RATIO["bits_per_byte"]
        found = Difference(to_bits(found.value), to_bits(found.high), to_bits(found.low), found.p)
    return {**counts, **_as_row(found, a.total(), b.total())}


def _as_row(found: Difference, a: float, b: float) -> dict[str, Any]:
    return {"a": a, "b": b, "difference": found.value, "ci95": [found.low, found.high], "p": found.p}


def _common(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the tasks and metrics that both have, without subjects and without the same figure in another unit."""
    found = []
    for task, metrics in a.items():
        for metric in metrics:
            is_repeated = metric.endswith("_perplexity") and "bits_per_byte" in metrics
            if "/" not in task and metric in b.get(task, {}) and not is_repeated:
                found.append((task, metric))
    return found


def _direction(a: TaskOutcomes, b: TaskOutcomes, row: Comparison) -> bool | None:
    return a[row["task"]][row["metric"]].higher_is_better


def _with_verdicts(rows: list[Comparison], higher_is_better: Callable[[Comparison], bool | None]) -> list[Comparison]:
    """Add the verdicts, with p-values that are adjusted for all rows."""
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, adjust([row["p"] for row in tested]), strict=True):
        row["p_adjusted"] = p
    for row in rows:
        if row.get("p_adjusted", 1) >= ALPHA or not row["difference"]:
            row["verdict"] = UNSURE
        else:
            is_up, direction = row["difference"] > 0, higher_is_better(row)
            words = ("lower", "higher") if direction is None else ("worse", "better")
            row["verdict"] = words[is_up if direction is not False else not is_up]
    return rows


def difference_table(a: str, b: str, rows: list[Comparison]) -> Table:
    """Return a table with a row per task and metric: the verdict on B, the difference, both scores."""
    cells = []
    for row in rows:
        scores = [format_value(row[key], row["kind"]) for key in ("a", "b")]
        verdict = VERDICTS[row["verdict"]]
        cells.append([row["task"], row["metric"], verdict, format_difference(row), *scores, format_n(row)])
    header = ["task", "metric", f"{b} is", "difference", a, b, "same questions"]
    return Table(header, cells, ["---", "---", "---", "--:", "--:", "--:", "--:"])


def format_value(value: float | None, kind: str) -> str:
    """Return `25.1%` or `0.231`."""
    if value is None:
        return ""
    return f"{value:.1%}" if kind == "share" else format_numbers(value)[0]


def format_difference(row: Comparison) -> str:
    """Return `+2.3 [-1.0, 5.6]`, in points for a share; of perplexities, the difference of their logarithms."""
    if row["difference"] is None:
        return "no common questions"
    values = [row["difference"], *(row["ci95"] or [])]
    if row["kind"] == "share":
        value, *bounds = [f"{100 * value:+.1f}" for value in values]
    else:
        value, *bounds = format_numbers(*values, digits=3, sign="+")
    return f"{value} [{', '.join(bounds)}]" if bounds else value


def format_n(row: Comparison) -> str:
    """Return `300`, or `300 of 355/400` if the checkpoints were asked other questions, too."""
    if row["n"] == row["n_a"] == row["n_b"]:
        return str(row["n"])
    return f"{row['n']} of {row['n_a']}/{row['n_b']}"


def explain(pairs: Iterable[list[Comparison]]) -> str:
    """Return how to read the verdicts of some tables."""
    text = (
        f"Verdicts hold for all tests of a table together: of those that are not “{UNSURE}”, at most 5% are expected "
        "to be wrong (Benjamini-Hochberg). Intervals are 95% for each difference alone, in points for percentages: "
        "one that just misses 0 is not yet a verdict. "
        "判定已对同一表中的多重比较作校正；区间为单项差异的 95% 置信区间，仅略不含 0 尚不足以下结论。"
    )
    if any(not row["paired"] for rows in pairs for row in rows):
        text += (
            " Where only scores were given, they are compared as if the questions were different, which is careful. "
            "只有分数而没有答案时，按不同题目比较，结论偏保守。"
        )
    return text
