"""Choose rewards by name, and turn them into the functions that TRL's trainers call."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError, did_you_mean
from buddygpt.rlhf import rewards


@dataclass
class RewardArguments:
    rewards: list[str] = field(
        metadata={
            "help": "Rewards of an answer: arithmetic, exact_match, format, length, language, repetition, json, "
            "tool_call, valid_tool_call (see rlhf/README.md); the folder of a reward model; or your own "
            "`module:function`. Their weights are `reward_weights`."
        }
    )
    format_pattern: str | None = field(
        default=None, metadata={"help": "For the reward `format`: the regular expression of a whole answer."}
    )
    length_limits: list[int] = field(
        default_factory=list,
        metadata={"help": "For the reward `length`: the fewest and the most tokens of an answer with its end mark."},
    )
    answer_language: Literal["question", "zh", "en"] = field(
        default="question", metadata={"help": "For the reward `language`: the wanted one, or that of the question."}
    )


class Case(NamedTuple):
    """An answer, and what is known about its prompt."""

    text: str
    tokens: int  # of the answer, with its end mark
    question: str  # the last turn of the prompt
    answer: rewards.Answer
    tools: list[dict[str, Any]] | None


Reward = Callable[[Case, RewardArguments], float | None]
REWARDS: dict[str, Reward] = {
    "arithmetic": lambda case, _: rewards.arithmetic(case.text, case.answer),
    "exact_match": lambda case, _: rewards.exact_match(case.text, case.answer),
    "format": lambda case, args: rewards.matches_format(case.text, args.format_pattern),
    "length": lambda case, args: rewards.fits_length(case.tokens, *args.length_limits),
    "language": lambda case, args: rewards.is_in_language(case.text, wanted_language(case, args)),
    "repetition": lambda case, _: rewards.repeats_little(case.text),
    "json": lambda case, _: rewards.is_json(case.text),
    "tool_call": lambda case, _: rewards.is_right_call(case.text, case.answer),
    "valid_tool_call": lambda case, _: rewards.is_valid_call(case.text, case.tools),
}
# What a row must have for a reward to judge an answer to it.
NEEDS = {
    "arithmetic": "an `answer` that is a number",
    "exact_match": "an `answer`",
    "language": "a question in Chinese or English",
    "tool_call": "an `answer` that is a tool call",
    "valid_tool_call": "`tools`",
}


def wanted_language(case: Case, args: RewardArguments) -> str:
    return rewards.find_language(case.question) if args.answer_language == "question" else args.answer_language


def require_rewards(args: RewardArguments, weights: list[float] | None) -> None:
    """Raise UserError if a reward does not exist, or lacks its setting or weight."""
    for name in args.rewards:
        if name in REWARDS or ":" in name or Path(name).is_dir():
            continue
        match = did_you_mean(name, REWARDS)
        raise UserError(
            f"rewards: {name} is neither a reward ({', '.join(REWARDS)}), nor the folder of a reward model, nor "
            f"module:function{f'; did you mean {match}?' if match else ''}"
        )
    if len(set(args.rewards)) < len(args.rewards):
        raise UserError(f"rewards: {', '.join(args.rewards)} names one twice; give it a larger weight instead")
    if weights is not None and len(weights) != len(args.rewards):
        raise UserError(f"reward_weights has {len(weights)} values for the {len(args.rewards)} rewards; give one each")
    if "format" in args.rewards:
        if not args.format_pattern:
            raise UserError("the reward `format` needs format_pattern: the regular expression of a whole answer")
        try:
            re.compile(args.format_pattern)
        except re.error as error:
            raise UserError(f"format_pattern is no regular expression: {error}") from error
    limits = args.length_limits
    if "length" in args.rewards and not (len(limits) == 2 and 0 <= limits[0] <= limits[1] and limits[1] > 0):
        raise UserError(f"the reward `length` needs length_limits: [fewest, most] tokens; it is {limits}")


def build_rewards(args: RewardArguments, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[Any]:
    """Return what TRL calls `reward_funcs`: functions, and reward models loaded with `options`.

    Raises:
        UserError: As [`require_rewards`]; or a user's function or a reward model cannot be loaded.
    """
    built = []
    for name in args.rewards:
        if name in REWARDS:
            built.append(score_with(name, args, tokenizer))
        elif Path(name).is_dir():
            built.append(load_reward_model(name, **options))
        else:
            built.append(with_columns(load_function(name)))
    return built


def score_with(name: str, args: RewardArguments, tokenizer: PreTrainedTokenizerBase) -> Callable:
    """Return a reward of `REWARDS` as a function that TRL calls with the answers of a batch."""

    def score(prompts, completion_ids, answer, tools, **_) -> list[float | None]:
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        lengths = map(len, completion_ids)
        questions = (prompt[-1]["content"] for prompt in prompts)
        return [
            REWARDS[name](Case(*values), args) for values in zip(texts, lengths, questions, answer, tools, strict=True)
        ]

    score.__name__ = name
    return score


def with_columns(function: Callable) -> Callable:
    """Return a user's function that gets all columns of the file, as a function for TRL expects.

    `answer` is a text, or a list if there are several right ones.
    """
    if inspect.iscoroutinefunction(function):
        return function

    def score(row, answer, **columns) -> list[float | None]:
        keys = dict.fromkeys(key for each in row for key in each)
        columns = {key: [each.get(key) for each in row] for key in keys} | columns
        columns["answer"] = [each[0] if each and len(each) == 1 else each for each in answer]
        return function(**columns)

    score.__name__ = function.__name__
    return score


def load_function(name: str) -> Callable:
    """Return the function `module:function`, found from the working directory or among installed packages."""
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(f"rewards: cannot load {name}: {error}") from error
    if not callable(function):
        raise UserError(f"rewards: {name} is not a function")
    return function


def load_reward_model(folder: str, **options: Any) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"rewards: {folder} is no reward model: {str(error).splitlines()[0]}") from error


def find_needs(args: RewardArguments) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Return for each reward a function of a row: what the row lacks to be judged by it; "" if nothing."""
    return {name: partial(_find_need, name, args) for name in args.rewards}


def _find_need(name: str, args: RewardArguments, row: dict[str, Any]) -> str:
    if name not in NEEDS:
        return ""
    case = Case("", 0, row["prompt"][-1]["content"], row["answer"], row["tools"])
    return NEEDS[name] if REWARDS[name](case, args) is None else ""
