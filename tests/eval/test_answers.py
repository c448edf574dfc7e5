"""Settings of generated answers, their room in the context, and the scores of open answers."""

import pytest
from conftest import ROOT
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from buddygpt.eval.running.answers import Answer, fit_to_context, read_gen_kwargs


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, None),
        ("max_gen_toks=64", {"max_gen_toks": 64}),
        ("max_new_tokens=64,temperature=0.8", {"max_gen_toks": 64, "temperature": 0.8, "do_sample": True}),
        ('{"until": ["\\n", ","], "temperature": 0}', {"until": ["\n", ","], "temperature": 0.0, "do_sample": False}),
        ({"do_sample": True}, {"do_sample": True, "temperature": 1.0}),
    ],
)
def test_settings_are_read_from_all_forms_and_sampling_is_never_ignored(given, read):
    assert read_gen_kwargs(given) == read


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("max_gen_tok=3", "did you mean `max_gen_toks`"),
        ("max_gen_toks=0", "max_gen_toks is 0"),
        ("max_gen_toks=2,max_tokens=3", "mean the same"),
        ("temperature=-1", "temperature is -1"),
        ("temperature=nan", "temperature is nan"),
        ("do_sample=false,temperature=0.5", "leave one of them out"),
        ("do_sample=perhaps", "do_sample is perhaps"),
        ("max_gen_toks", "max_gen_toks is ;"),
        ('{"until": [3]}', "until is"),
        ("{", "neither key=value"),
    ],
)
def test_impossible_settings_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        read_gen_kwargs(given)


def test_answers_are_shortened_to_what_the_longest_prompt_of_their_task_leaves():
    settings = {"long": {"max_new_tokens": 90, "until": ["x"]}, "short": {"max_gen_toks": 30}, "huge": {}}
    requests = [
        Instance("generate_until", {}, (prompt, settings[task]), 0, (task, 0, 1))
        for task, prompt in [("long", "a" * 20), ("long", "a" * 30), ("short", "a" * 99), ("huge", "a" * 99)]
    ]
    shortened = fit_to_context(requests, [len(request.args[0]) for request in requests], context=100, default=256)
    assert shortened == {"long": [90, 70], "huge": [256, 50]}  # at least half of the context
    assert requests[0].args[1] == requests[1].args[1] == {"max_gen_toks": 70, "until": ["x"]}
    assert requests[2].args[1] == {"max_gen_toks": 30}


@pytest.fixture(scope="module")
def open_answers():
    """The tasks open_answers and open_answers_sampled."""
    manager = TaskManager(include_path=ROOT / "eval/tasks", include_defaults=False)
    return manager.load(["open_answers", "open_answers_sampled"])["tasks"]


def test_prompts_are_balanced_and_rendered_for_chats_and_as_beginnings(open_answers):
    task = open_answers["open_answers"]
    docs = list(task.eval_docs)
    assert len(docs) == len({doc["question"] for doc in docs}) == 40
    assert [doc["language"] for doc in docs] == ["zh", "en"] * 20
    assert task.fewshot_context(docs[0]) == docs[0]["beginning"]
    rendered = task.fewshot_context(docs[1], apply_chat_template=True, chat_template=str)
    assert rendered == str([{"role": "user", "content": docs[1]["question"]}])
    assert not task.config.generation_kwargs["do_sample"]
    assert open_answers["open_answers_sampled"].config.generation_kwargs["temperature"] == 0.8


def test_lengths_alone_have_no_direction(open_answers):
    for task in open_answers.values():
        directions = task.higher_is_better()
        assert {name for name, is_better in directions.items() if is_better is None} == {"n_chars", "n_tokens"}
        assert [name for name, is_better in directions.items() if is_better is False] == ["loop"]


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "The sun is warm, and the sea is blue.", {"distinct_1": 9 / 11, "loop": 0, "same_language": 1}),
        ("zh", "春天来了，花都开了。", {"distinct_1": 9 / 10, "distinct_2": 1, "loop": 0, "same_language": 1}),
        ("zh", "The sun is warm.", {"same_language": 0, "n_chars": 16}),
        ("en", "It is " + "very, " * 3 + "good.", {"loop": 0}),
        ("en", "Yes. " + "I like it. " * 5, {"loop": 21 / 22, "distinct_3": 5 / 20}),
        ("zh", "好的。" + "我是小布，" * 2 + "谢谢", {"loop": 0}),
        ("zh", "哈" * 30, {"loop": 1, "distinct_2": 1 / 29}),
        ("zh", "北京的春天来了。" * 2 + "完", {"loop": 16 / 17}),
        ("en", "ton" * 20, {"loop": 1, "distinct_1": 3 / 60}),
        ("en", "", {"distinct_1": 0, "distinct_3": 0, "loop": 0, "same_language": 0, "n_chars": 0}),
    ],
)
def test_open_answers_are_scored_by_hand_counts(language, text, expected, open_answers):
    scores = open_answers["open_answers"].process_results({"language": language}, [text])
    assert {key: scores[key] for key in expected} == pytest.approx(expected)
    assert "ended" not in scores  # bare lm_eval passes text only
    told = open_answers["open_answers"].process_results({"language": language}, [Answer(text, True, 7)])
    assert told == scores | {"ended": 1, "n_tokens": 7}


def test_ends_of_answers_survive_the_order_in_which_lm_eval_generates():
    from buddygpt.eval.running.models import Ends

    ends = Ends()
    for prompt, text, ended in [("long", "a", True), ("b", "a", False), ("b", "a", True), ("b", "c", True)]:
        ends.generated.append((ended, len(text)))
        ends.add_partial("generate_until", (prompt, {}), text)
    assert [ends.pop(*pair).ended for pair in [("b", "c"), ("b", "a"), ("long", "a"), ("b", "a")]] == [
        True, False, True, True]  # fmt: skip
    assert not any(ends.seen.values())
