"""Generated answers: their settings, their room in the context, and whether the model ended them."""

import json
import math
from collections import defaultdict
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string
from transformers import GenerationConfig

from buddygpt.cli.errors import did_you_mean

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names for the same


class Answer(str):
    """The text of a generated answer, as lm-eval passes it to tasks, with what the text does not show.

    Attributes:
        ended: Whether the model ended it; False if it was cut at `max_gen_toks`.
        n_tokens: Its tokens without the end token; None if an endpoint does not tell.
    """

    ended: bool
    n_tokens: int | None

    def __new__(cls, text: str, ended: bool, n_tokens: int | None) -> "Answer":
        answer = super().__new__(cls, text)
        answer.ended, answer.n_tokens = ended, n_tokens
        return answer


def read_gen_kwargs(value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """Return generation settings for lm-eval from its form `key=value,key=value`, from JSON, or from a mapping.

    A temperature without `do_sample` samples, and `do_sample` without a temperature takes 1. lm-eval would decode
    greedily in the first case, since its tasks set `do_sample: false`, and fail in the second.

    Raises:
        ValueError: A setting is unknown, has an impossible value, or contradicts another.
    """
    if not value:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("{") else simple_parse_args_string(value)
        except ValueError as error:
            raise ValueError(
                f"gen_kwargs: {value} is neither key=value,key=value nor a JSON object ({error})"
            ) from error
    settings = dict(value)
    known = {"until", *LENGTHS, *GenerationConfig().to_dict()}
    for key in settings:
        if key not in known:
            match = did_you_mean(key, known)
            hint = f"; did you mean `{match}`?" if match else "; give settings of transformers' GenerationConfig"
            raise ValueError(f"gen_kwargs: there is no setting `{key}`{hint}")
    lengths = {key: settings.pop(key) for key in LENGTHS if key in settings}
    for key, length in lengths.items():
        if not (type(length) is int and length >= 1):
            raise ValueError(f"gen_kwargs: {key} is {length}; give a number of tokens, at least 1")
        settings["max_gen_toks"] = length
    if len(lengths) > 1:
        raise ValueError(f"gen_kwargs: {' and '.join(lengths)} mean the same; give one of them")
    until = settings.get("until", [])
    if not all(isinstance(stop, str) and stop for stop in ([until] if isinstance(until, str) else until)):
        raise ValueError(f"gen_kwargs: until is {until}; give one text or a list of texts")
    _settle_sampling(settings)
    return settings


def _settle_sampling(settings: dict[str, Any]) -> None:
    """Make `temperature` and `do_sample` agree; ValueError if they contradict each other."""
    temperature, sample = settings.get("temperature"), settings.get("do_sample")
    if sample not in (None, True, False):
        raise ValueError(f"gen_kwargs: do_sample is {sample}; give true or false")
    if temperature is None:
        if sample:
            settings["temperature"] = 1.0
        return
    if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"gen_kwargs: temperature is {temperature}; give a number, at least 0")
    settings["temperature"] = float(temperature)
    if sample is not None and sample != (temperature > 0):
        raise ValueError(f"gen_kwargs: do_sample is {sample}, but temperature is {temperature}; leave one of them out")
    settings["do_sample"] = temperature > 0


def fit_to_context(requests: list[Instance], lengths: list[int], context: int, default: int) -> dict[str, list[int]]:
    """Lower `max_gen_toks` of tasks whose prompt and answer together exceed the context.

    The answer keeps what the longest prompt of the task leaves, but at least half of the context; longer prompts are
    then truncated on the left, as by lm-eval.

    Args:
        requests: Requests of generation; their settings are changed.
        lengths: Tokens of each prompt.
        context: Tokens of the model's context.
        default: `max_gen_toks` of tasks that give none.

    Returns:
        For each shortened task, `max_gen_toks` before and after.
    """
    longest: dict[str, int] = defaultdict(int)
    for request, length in zip(requests, lengths, strict=True):
        longest[request.task_name] = max(longest[request.task_name], length)

    shortened: dict[str, list[int]] = {}
    for request in requests:
        prompt, settings = request.args
        wanted = normalize_gen_kwargs(settings, default)["max_gen_toks"]
        room = max(context - longest[request.task_name], context // 2)
        if wanted > room:
            others = {key: value for key, value in settings.items() if key not in LENGTHS}
            request.arguments = (prompt, {**others, "max_gen_toks": room})
            shortened[request.task_name] = [wanted, room]
    return shortened
