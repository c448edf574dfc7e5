"""Every reward says what its docstring says, in Chinese and in English, and mistakes of users give one line."""

import json
from fractions import Fraction

import pytest
from tiny_tokenizer import train_tiny_tokenizer
from transformers import AutoTokenizer

from buddygpt.cli.errors import UserError
from buddygpt.rlhf import rewards
from buddygpt.rlhf.reward_arguments import NEEDS, REWARDS, RewardArguments, build_rewards, require_rewards


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


NUMBERS = {
    "答案是42。": 42,
    "The answer is 42.": 42,
    "所以一共是１，２００元": 1200,
    "They pay $1,200.50 in total": Fraction("1200.5"),
    "共有1,200,300人": 1200300,
    "10-3=7": 7,
    "5-3": 3,
    "零下 -3 度": -3,
    "it is −2.5": Fraction("-2.5"),
    "一半是1/2": Fraction(1, 2),
    "50%": 50,
    "½": Fraction(1, 2),
    "\\boxed{\\frac{3}{4}}": Fraction(3, 4),
    "即 -\\dfrac{1}{2}，不是 \\frac{-1}{3}": Fraction(-1, 3),
    "4 apples and 5 pears\n#### 9": 9,
    "#### 9 apples, 3 left": 3,
    "\\boxed{42}, so 7 is wrong": 42,
    "\\boxed{x} = 7": 7,
    "1/0": None,
    "没有数字": None,
    "": None,
    "1" * 5000: None,  # more digits than Python reads
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_number_of_an_answer_is_its_last_one(text):
    assert rewards.find_number(text) == NUMBERS[text]


def test_arithmetic():
    assert rewards.arithmetic("<think>也许是 3</think>等于 １２００。", "1,200") == 1
    assert rewards.arithmetic("It is 0.5", "1/2") == 1
    assert rewards.arithmetic("It is 7.", "48 / 2 = 24\n#### 24") == 0
    assert rewards.arithmetic("不知道", "3") == 0
    assert rewards.arithmetic("3", "三个") is None and rewards.arithmetic("3", None) is None


def test_exact_match():
    assert rewards.exact_match("巴黎。", "巴黎") == rewards.exact_match(" paris.\n", "Paris") == 1
    assert rewards.exact_match("８", "8") == rewards.exact_match("New  York", "new york") == 1
    assert rewards.exact_match("川", ["蜀", "川"]) == 1
    assert rewards.exact_match("<think>北京？</think><answer>巴黎</answer>", "巴黎") == 1
    assert rewards.exact_match("<think>巴黎", "巴黎") == rewards.arithmetic("<think>1 + 1 = 2", "2") == 0
    assert rewards.exact_match("巴黎是法国的首都", "巴黎") == rewards.exact_match("", "巴黎") == 0
    assert rewards.exact_match("巴黎", None) is None


def test_format():
    pattern = r"<think>.+</think>.+"
    assert rewards.matches_format("<think>想一\n想</think>\n巴黎\n", pattern) == 1
    assert rewards.matches_format("<think>Let me see</think>Paris", pattern) == 1
    assert rewards.matches_format("Paris", pattern) == rewards.matches_format("", pattern) == 0


def test_length():
    assert [rewards.fits_length(tokens, 2, 4) for tokens in (0, 1, 2, 4, 6, 8, 100)] == [0, 0.5, 1, 1, 0.5, 0, 0]
    assert rewards.fits_length(0, 0, 4) == 1


def test_language():
    assert rewards.is_in_language("巴黎在法国。", "zh") == rewards.is_in_language("Paris is in France.", "en") == 1
    assert rewards.is_in_language("Paris", "zh") == rewards.is_in_language("巴黎", "en") == 0
    assert rewards.is_in_language("Москва", "en") == rewards.is_in_language("", "zh") == 0
    assert rewards.is_in_language("42", "zh") == rewards.is_in_language("42", "en") == 1
    assert rewards.is_in_language("<think>Let me think about it</think>巴黎", "zh") == 1
    assert rewards.is_in_language("Москва", "other") is None


def test_repetition():
    assert rewards.repeats_little("床前明月光，疑是地上霜。举头望明月，低头思故乡。") == 1
    assert rewards.repeats_little("The quick brown fox jumps over the lazy dog.") == 1
    assert rewards.repeats_little("好的，我知道了。" * 5) < 0.1
    assert rewards.repeats_little("the cat sat on the mat. " * 5) < 0.1
    assert rewards.repeats_little("") == 0


def test_json():
    assert rewards.is_json('{"首都": "巴黎"}') == rewards.is_json('```json\n["Paris"]\n```') == 1
    for text in ("巴黎", '"Paris"', "1", '{"a": NaN}', "{'a': 1}", '{"a": 1} done', "", "[" * 100_000):
        assert rewards.is_json(text) == 0, text[:20]


def call(name: str, **arguments) -> str:
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>"


PARAMETERS = {"properties": {"city": {"type": "string"}, "day": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


def test_a_right_call():
    right = json.dumps([{"name": "weather", "arguments": {"city": "北京", "day": "today"}}])
    assert rewards.is_right_call("我查一下。" + call("weather", day="today", city="北京"), right) == 1
    assert rewards.is_right_call(call("weather", city="上海", day="today"), right) == 0
    assert rewards.is_right_call(call("weather", city="北京", day="today") * 2, right) == 0
    assert rewards.is_right_call("It is sunny", right) == rewards.is_right_call("<tool_call>{</tool_call>", right) == 0
    two = json.dumps([{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}])
    assert rewards.is_right_call(call("b") + call("a"), two) == 1
    assert rewards.is_right_call(call("weather"), "晴天") is rewards.is_right_call("42", "42") is None


def test_a_valid_call():
    assert rewards.is_valid_call(call("weather", city="Paris"), TOOLS) == 1
    assert rewards.is_valid_call(call("weather", city="巴黎", day="明天"), TOOLS) == 1
    for text in (call("weather"), call("weather", city="巴黎", unit="C"), call("time", city="巴黎"), "晴天", ""):
        assert rewards.is_valid_call(text, TOOLS) == 0, text
    assert rewards.is_valid_call(call("weather", city="Paris"), None) is None


def test_rewards_are_called_as_trl_calls_them(tokenizer):
    args = RewardArguments(rewards=["exact_match", "language", "length"], length_limits=[1, 2])
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("春天<|im_end|>", "The<|im_end|>")]
    prompts = [[{"role": "user", "content": question}] for question in ("院子里的是什么？", "桃花？")]
    batch = {"prompts": prompts, "completions": None, "completion_ids": ids, "answer": [["春天"], ["The"]]}
    batch |= {"tools": [None, None], "row": [{}, {}], "trainer_state": None}
    functions = build_rewards(args, tokenizer)
    assert [function.__name__ for function in functions] == args.rewards
    exact_match, language, length = (function(**batch) for function in functions)
    assert exact_match == [1, 1] and language == [1, 0]
    assert length == [rewards.fits_length(len(each), 1, 2) for each in ids]


def test_a_users_function_gets_the_columns_of_the_file(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def count(prompts, completions, answer, level, **_):\n"
        "    return [len(text[0]['content']) + len(right) + n for text, right, n in zip(completions, answer, level)]\n"
    )
    monkeypatch.chdir(tmp_path)
    (count,) = build_rewards(RewardArguments(rewards=["my_rewards:count"]), tokenizer)
    row = {"prompt": "x", "level": 10}
    completions = [[{"role": "assistant", "content": "abc"}]]
    assert count(prompts=[[]], completions=completions, answer=[["de"]], tools=[None], row=[row]) == [15]
    assert count.__name__ == "count"


MISTAKES = {
    "rewards: exact_matc is neither .* did you mean exact_match": dict(rewards=["exact_matc"]),
    "names one twice": dict(rewards=["json", "json"]),
    "needs format_pattern": dict(rewards=["format"]),
    "format_pattern is no regular expression": dict(rewards=["format"], format_pattern="("),
    "needs length_limits": dict(rewards=["length"], length_limits=[3]),
    "cannot load nowhere:f: No module named": dict(rewards=["nowhere:f"]),
    "cannot load json:f: module 'json' has no attribute 'f'": dict(rewards=["json:f"]),
    "json:__name__ is not a function": dict(rewards=["json:__name__"]),
    "reward_weights has 3 values for the 1 rewards": dict(rewards=["json"], weights=[1, 2, 3]),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told_in_one_line(message, tokenizer):
    fields = dict(MISTAKES[message])
    weights = fields.pop("weights", None)
    with pytest.raises(UserError, match=message):
        require_rewards(RewardArguments(**fields), weights)
        build_rewards(RewardArguments(**fields), tokenizer)


def test_a_folder_without_a_reward_model_is_told(tokenizer, tmp_path):
    with pytest.raises(UserError, match="is no reward model"):
        build_rewards(RewardArguments(rewards=[str(tmp_path)]), tokenizer)


def test_needs_name_rewards():
    assert NEEDS.keys() <= REWARDS.keys()
