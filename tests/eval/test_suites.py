"""Suites: tasks that lm-eval or this project has, printed in the README, and what to do about missing data."""

import lm_eval
import pytest
from conftest import ROOT
from lm_eval.tasks import TaskManager

from buddygpt.cli.errors import UserError
from buddygpt.eval.running.task_loading import load_tasks
from buddygpt.eval.suites import SUITES, explain_missing, load_rows, suite_tasks, to_markdown

STOCK = ROOT / lm_eval.__path__[0] / "tasks"
FOLDERS = "arc aclue belebele blimp ceval cmmlu global_piqa hellaswag lambada okapi openbookqa piqa sciq super_glue"
FOLDERS += " wikitext winogrande xcopa xstorycloze xwinograd zhoblimp"


def test_every_row_can_be_read_and_each_suite_contains_the_smaller_ones():
    for row in load_rows():
        assert row.language in ("zh", "en", "both") and row.form in ("text", "letter", "loss", "answers"), row
        assert (row.chance is None) == (row.form in ("loss", "answers")), row
        assert row.data in ("hub", "exams", "text", "bundled") and set(row.suites) <= set(SUITES) and row.source, row
    names = [row.task for row in load_rows()]
    assert len(names) == len(set(names))
    tiny, small, base = (set(suite_tasks(suite)) for suite in SUITES)
    assert tiny < small < base


@pytest.mark.slow
def test_the_installed_lm_eval_or_this_project_has_every_task():
    folders = [STOCK / folder for folder in FOLDERS.split()]  # all of lm-eval's take ten times as long
    manager = TaskManager(include_path=[*folders, ROOT / "eval/tasks"], include_defaults=False)
    assert {row.task for row in load_rows()} <= set(manager.all_tasks)


def test_the_readme_shows_the_table():
    readme = (ROOT / "eval/README.md").read_text(encoding="utf-8")
    assert to_markdown() in readme, "replace the table of suites in eval/README.md by what eval/suites.py prints"


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """A folder with a local task under the name of one of lm-eval's, and its rows."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text('{"text": "a"}\n' * 3)
    for name in ("blimp", "piqa"):
        file = folder / ("rows.jsonl" if name == "blimp" else "nowhere.jsonl")
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
            "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
        )
    return folder


def test_missing_data_is_named_with_the_way_to_get_it_or_left_out(own_tasks, capsys):
    manager = TaskManager(include_path=[own_tasks, ROOT / "eval/tasks"], include_defaults=False)
    with pytest.raises(UserError) as raised:
        load_tasks(manager, [], "tiny", skip_missing=False)
    n_tasks = len(suite_tasks("tiny"))
    assert f"suite tiny: {n_tasks - 2} of its {n_tasks} tasks have no data here" in str(raised.value)
    for words in ("HF_HUB_OFFLINE=0 to download zhoblimp", "piqa", "eval/local_exams.py", "--skip_missing"):
        assert words in str(raised.value)
    loaded = load_tasks(manager, [], "tiny", skip_missing=True)
    assert loaded.names == ["open_answers", "blimp"] and "piqa" in loaded.missing  # the local blimp counts
    assert "They are left out" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"tasks: piqa: .*nowhere\.jsonl"):  # the user has named its data
        load_tasks(manager, [], "tiny", skip_missing=True, given={"blimp", "piqa"})
    nothing = TaskManager(include_path=[own_tasks / "empty"], include_defaults=False)
    with pytest.raises(UserError, match="no data here"):
        load_tasks(nothing, [], "tiny", skip_missing=True)


def test_every_missing_task_has_a_way_to_get_it():
    for suite in SUITES:
        text = explain_missing(suite, suite_tasks(suite))
        assert "\n" not in text and all(task in text for task in suite_tasks(suite))


def test_an_unknown_suite_is_refused():
    with pytest.raises(UserError, match="there is no suite `tinny`; did you mean `tiny`"):
        suite_tasks("tinny")
