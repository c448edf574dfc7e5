"""Rewards that can be verified: pure functions of an answer, and of what is known about its prompt.

    rewards: [exact_match, language]       # names of `REWARDS`; `python rlhf/grpo.py --help` lists them
    reward_weights: [1.0, 0.2]             # all 1 by default

A name may also be the folder of a reward model, or `module:function`, a function of TRL's form that is found from the
working directory: `function(prompts, completions, **columns)` returns a list of numbers, None for no opinion.

Every reward is from 0 to 1; None means that the row says nothing about it, and the answer is judged by the others.
In all rewards but `format`, `length` and `repetition`, thinking up to `</think>` is left out of the answer, and of
`<answer>...</answer>` only the inner text counts.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from buddygpt.data.chat.calls import TAGGED_CALL, read_call
from buddygpt.data.chat.rules import BadRow
from buddygpt.data.text.measures import language as detect_language
from buddygpt.data.text.measures import repeated_share

Answer = str | Sequence[str] | None  # what is right; several texts: any of them
NGRAM = 8  # characters that count as a repetition: about two English or eight Chinese words
FINAL_PUNCTUATION = " 。．.！!？?，,；;"
ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
CODE_FENCE = re.compile(r"```\w*\s*\n(.*?)\n?\s*```", re.DOTALL)
BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
SOLUTION = re.compile(r"####\s*(.+)")  # GSM8K
# A minus after a digit or a bracket is a subtraction. Commas separate thousands.
NUMBER = re.compile(r"(?:(?<![\d)\]])-\s?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?![\d.]))?")


def final_text(text: str) -> str:
    """Return what an answer says after its thinking, without `<answer>` tags; "" if it has not stopped thinking."""
    text = text.rpartition("</think>")[2]
    text = text.partition("<think>")[0]
    tagged = ANSWER_TAG.findall(text)
    return (tagged[-1] if tagged else text).strip()


def arithmetic(text: str, answer: Answer) -> float | None:
    """1 if the number that an answer ends with equals the right one, as 1,200 and 1200.0, 0.5 and 1/2, ３ and 3 do.

    The number is the last one after `####`, in `\\boxed{}`, or in the text. Only digits are read, no numerals such as
    三 or three. Percent signs and units are ignored.
    """
    right = {number for number in map(find_number, _alternatives(answer)) if number is not None}
    return float(find_number(final_text(text)) in right) if right else None


def find_number(text: str) -> Fraction | None:
    """Return the number that a text gives as its result, or None if there is none."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("\u2044", "/")  # NFKC of ½ has this slash
    text = LATEX_FRACTION.sub(r"\1/\2", text)
    for pattern in (SOLUTION, BOXED):
        if (found := pattern.findall(text)) and NUMBER.search(found[-1]):
            text = found[-1]
            break
    numbers = NUMBER.findall(text)
    try:
        return Fraction(re.sub(r"[,\s]", "", numbers[-1])) if numbers else None
    except (ValueError, ZeroDivisionError):  # more digits than Python reads, or 1/0
        return None


def exact_match(text: str, answer: Answer) -> float | None:
    """1 if an answer equals the right one. Case, width, spacing and final punctuation do not count."""
    right = [_normalize(each) for each in _alternatives(answer)]
    return float(_normalize(final_text(text)) in right) if right else None


def _normalize(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).rstrip(FINAL_PUNCTUATION)


def _alternatives(answer: Answer) -> list[str]:
    if answer is None:
        return []
    return [answer] if isinstance(answer, str) else list(answer)


def matches_format(text: str, pattern: str) -> float:
    """1 if the whole answer, with its thinking, matches the pattern `format_pattern`, whose . matches line ends."""
    return float(re.fullmatch(pattern, text.strip(), re.DOTALL) is not None)


def fits_length(tokens: int, shortest: int, longest: int) -> float:
    """1 for an answer of `length_limits` tokens, its end mark included; less, down to 0 for none or twice as many."""
    if tokens < shortest:
        return tokens / shortest
    return max(0.0, 1 - (max(tokens, longest) - longest) / longest)


def is_in_language(text: str, wanted: str) -> float | None:
    """1 if an answer is in `answer_language`, by its letters and words; one without letters, as 42, is in every one.

    None if `wanted` is neither zh nor en, as for a question in another language.
    """
    text = final_text(text)
    if wanted not in ("zh", "en"):
        return None
    if text and not any(character.isalpha() for character in text):
        return 1.0
    return float(find_language(text) == wanted)


def find_language(text: str) -> str:
    """Return zh, en or other, as data/doctor.py does for chats."""
    return detect_language(text, min_han=0.25, max_accented=0.01)


def repeats_little(text: str) -> float:
    """1 minus the share of an answer that is repeated: of its sequences of 8 characters, those that occur twice."""
    return 1 - repeated_share(text, n=NGRAM) if text.strip() else 0.0


def is_json(text: str) -> float:
    """1 if an answer is a JSON object or array, bare or in one code block."""
    text = final_text(text)
    fenced = CODE_FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    return float(isinstance(value, dict | list))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def is_right_call(text: str, answer: Answer) -> float | None:
    """1 if an answer makes exactly the right calls, in any order: function names and arguments are equal.

    None if the right answer is no call.
    """
    right = []
    for each in _alternatives(answer):
        try:
            right.append(_read_calls(json.loads(each)))
        except (ValueError, BadRow):
            continue
    if not right:
        return None
    try:
        return float(_read_calls(TAGGED_CALL.findall(final_text(text))) in right)
    except (BadRow, RecursionError):
        return 0.0


def is_valid_call(text: str, tools: Sequence[dict[str, Any]] | None) -> float | None:
    """1 if an answer calls functions among the row's tools, with all required arguments and no unknown ones.

    None if the row has no tools.
    """
    if not tools:
        return None
    known = {tool.get("function", tool).get("name"): tool.get("function", tool) for tool in tools}
    try:
        calls = [read_call(call)["function"] for call in TAGGED_CALL.findall(final_text(text))]
    except (BadRow, RecursionError):
        return 0.0
    return float(bool(calls) and all(_fits_schema(call, known.get(call["name"])) for call in calls))


def _fits_schema(call: dict[str, Any], function: dict[str, Any] | None) -> bool:
    if function is None:
        return False
    schema = function.get("parameters") or {}
    names = call["arguments"].keys()
    return set(schema.get("required") or ()) <= names <= (schema.get("properties") or {}).keys()


def _read_calls(calls: Any) -> list[str]:
    """Return calls in a form and order that can be compared. Raises BadRow for anything else."""
    if not isinstance(calls, list | dict):
        raise BadRow("no calls")
    functions = [read_call(call)["function"] for call in (calls if isinstance(calls, list) else [calls])]
    return sorted(json.dumps(function, sort_keys=True, ensure_ascii=False) for function in functions)
