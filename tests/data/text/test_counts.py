"""Row counts keep kind, name and order, and the command imports optional steps only if they are selected."""

import subprocess
import sys

import pytest

from buddygpt.data.text.counts import HELD_OUT, RowCounts, sum_counts


def test_counts_come_back_from_json_with_kind_name_and_order():
    counts = RowCounts()
    counts.add("read", count=5)
    counts.add("changed", "remove_links")
    counts.add("changed_chars", "remove_links", 77)
    counts.add("dropped", "text_length_below")
    counts.add("dropped", HELD_OUT)
    counts.add("language", "zh", 3)
    counts.add("written", count=3)
    labels = counts.to_json()
    assert list(labels.items()) == [
        ("read", 5),
        ("changed_remove_links", 1),
        ("changed_chars_remove_links", 77),
        ("dropped_text_length_below", 1),
        ("dropped_held_out", 1),
        ("language_zh", 3),
        ("written", 3),
    ]
    again = RowCounts.from_json(labels)
    assert list(again.to_json().items()) == list(labels.items())
    assert (again.read, again.written, again.held_out, again.dropped) == (5, 3, 1, {"text_length_below": 1})
    assert again.by_name("changed") == {"remove_links": 1} and again.by_name("changed_chars") == {"remove_links": 77}
    assert sum_counts([counts, again]).to_json() == {label: 2 * count for label, count in labels.items()}


@pytest.mark.slow
def test_optional_steps_are_not_imported_by_the_command():
    program = (
        "import sys, buddygpt.data.prepare_pretrain\n"
        "print([name for name in sys.modules if name.startswith('buddygpt.data.text.steps') or name == 'scipy'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
