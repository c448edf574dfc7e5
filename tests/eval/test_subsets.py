"""Questions that fit into a time: nested, spread over the tasks of a group, and as many as the measurements allow."""

from types import SimpleNamespace

import pytest

from buddygpt.cli.errors import UserError
from buddygpt.eval.running.subsets import (
    MIN_QUESTIONS,
    Entry,
    choose_rows,
    describe,
    make_entries,
    order_questions,
    plan,
)


def entry(name, sizes):
    return Entry(name, dict.fromkeys(sizes), order_questions(sizes, seed=0))


def test_the_order_is_seeded_complete_and_covers_every_task_from_the_start():
    sizes = {"small": 5, "large": 50, "middle": 20}
    order = order_questions(sizes, seed=0)
    assert order == order_questions(sizes, seed=0) != order_questions(sizes, seed=1)
    assert sorted(order) == [(task, row) for task in sorted(sizes) for row in range(sizes[task])]
    assert {task for task, _ in order[:3]} == set(sizes)
    for n in (15, 30, 60):  # in proportion to the sizes
        counts = {task: len(rows) for task, rows in choose_rows(order[:n]).items()}
        assert all(abs(counts[task] - n * size / 75) <= 1 for task, size in sizes.items())
    assert [row for task, row in order_questions({"small": 5}, 0)] == [row for task, row in order if task == "small"]


def test_rows_are_in_the_order_of_the_data_as_lm_eval_needs_them():
    order = order_questions({"b": 9, "a": 9}, seed=3)
    assert all(rows == sorted(rows) for rows in choose_rows(order[:11]).values())


def test_groups_in_groups_are_one_entry():
    tasks = {name: SimpleNamespace(eval_docs=range(3)) for name in ("a1", "a2", "b")}
    loaded = {"tasks": tasks, "group_map": {"a": ["a1", "inner"], "inner": ["a2"]}}
    entries = make_entries(loaded, seed=0)
    assert [(each.name, list(each.tasks), len(each.order)) for each in entries] == [
        ("a", ["a1", "a2"], 6),
        ("b", ["b"], 3),
    ]


def test_time_is_shared_equally_and_what_a_short_task_leaves_goes_to_the_others():
    entries = [entry("short", {"s": 30}), entry("long", {"l": 5000}), entry("slow", {"w": 5000})]
    measured = [{"short": 0.1, "long": 0.1, "slow": 0.5}, {"short": 0.1, "long": 0.1, "slow": 0.5}]
    counts = plan(entries, 10, elapsed=50, measured=measured, fixed=54)  # 510 s are usable, 406 remain
    assert counts == {"short": 30, "long": 1000, "slow": 200}
    assert plan(entries, 1000, 0, measured, 0) == {"short": 30, "long": 5000, "slow": 5000}


def test_a_longer_run_asks_all_questions_of_a_shorter_one():
    entries = [entry("group", {"a": 400, "b": 70}), entry("task", {"task": 300})]
    measured, asked = [{"group": 0.5, "task": 1.0}], []
    for minutes in (2, 5, 8):
        rows, notes = describe(entries, plan(entries, minutes, 10, measured, 5), minutes, seed=0)
        asked.append({(task, row) for task, of_task in rows.items() for row in of_task})
        assert notes["doc_ids"] == rows and notes["questions"]["task"]["of"] == 300
        assert notes["questions"]["group"]["asked"] == len(rows["a"]) + len(rows["b"]) >= MIN_QUESTIONS
    assert asked[0] < asked[1] < asked[2]


def test_every_task_keeps_its_least_questions_or_the_run_is_refused():
    many = entry("many", {f"t{number}": 9 for number in range(50)})
    entries, measured = [many, entry("few", {"few": 7})], [{"many": 1.0, "few": 1.0}]
    assert plan(entries, 1.2, 0, measured, 0) == {"many": 54, "few": 7}
    with pytest.raises(UserError, match="1 are too few for 20 questions of each task on 1 checkpoints; give about 2"):
        plan(entries, 1, 0, measured, 0)
