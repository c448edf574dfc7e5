"""Models behind an OpenAI-compatible endpoint, such as `transformers serve` or vLLM, for lm-eval.

`NAME=http://host:8000/v1#MODEL` names one; without `#MODEL`, the only model of the endpoint. The key is read from the
environment variable OPENAI_API_KEY.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import openai
from lm_eval.api.model import LM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from openai import OpenAI
from transformers import AutoTokenizer

from buddygpt.cli.errors import UserError
from buddygpt.eval.running.answers import Answer
from buddygpt.eval.running.models import DOCUMENT_SEPARATOR

T = TypeVar("T")
SECONDS = 120  # for one request before the evaluation; a server may load the model first


class Completions(LocalCompletionsAPI):
    """lm-eval's `local-completions`. Answers are [`Answer`]."""

    def parse_generations(self, outputs: dict | list[dict], **kwargs: Any) -> list[str | None]:
        return with_ends(outputs, super().parse_generations(outputs, **kwargs))


class Chat(LocalChatCompletion):
    """lm-eval's `local-chat-completions`. Answers are [`Answer`]."""

    def parse_generations(self, outputs: dict | list[dict], **kwargs: Any) -> list[str | None]:
        return with_ends(outputs, super().parse_generations(outputs, **kwargs))


def with_ends(outputs: dict | list[dict], texts: list[str | None]) -> list[str | None]:
    """Return the texts of responses with what these tell about their ends. Text is None if a server gave none."""
    answers: list[str | None] = []
    for output in outputs if isinstance(outputs, list) else [outputs]:
        choices = sorted(output["choices"], key=lambda choice: choice["index"])
        # The usage is that of all choices together. Servers count the end token or not, so it is not exact.
        n_tokens = (output.get("usage") or {}).get("completion_tokens") if len(choices) == 1 else None
        for choice in choices:
            text = texts[len(answers)]
            ended = choice.get("finish_reason") == "stop"
            answers.append(text if text is None else Answer(text, ended, n_tokens))
    return answers


def connect(name: str, place: str, uses_chat: bool, needs_likelihoods: bool, requests_at_once: int) -> LM:
    """Return lm-eval's model for an endpoint, after one request that shows that it works.

    Args:
        name: Of the checkpoint, for messages.
        place: Its address, and `#MODEL`.
        uses_chat: Send conversations, for the server's chat template, instead of text.
        needs_likelihoods: A task compares likelihoods, so the server must tell those of the prompt's tokens.
        requests_at_once: Requests to send at the same time.

    Raises:
        UserError: The endpoint does not answer, refuses the key, lacks the model, or cannot do what is needed.
    """
    where = f"checkpoints: {name}={place}"
    if not find_spec("tenacity"):
        raise UserError(f"{where}: lm-eval needs a package for endpoints: pip install tenacity")
    url, _, model = place.partition("#")
    url = url.rstrip("/")
    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=SECONDS, max_retries=0)
    if needs_likelihoods and uses_chat:
        raise UserError(
            f"{where}: chat endpoints give no likelihoods of a prompt; leave `{name}` out of `chat`, or choose tasks "
            "that generate answers"
        )
    if not model:
        model = _only_model(where, client)
    if uses_chat:
        _ask(where, lambda: client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "1"}], max_tokens=1))  # fmt: skip
    elif not needs_likelihoods:
        _ask(where, lambda: client.completions.create(model=model, prompt="1", max_tokens=1))
    else:
        _require_likelihoods(where, client, model)

    settings: dict[str, Any] = {"model": model, "num_concurrent": requests_at_once, "max_retries": 2}
    if uses_chat:
        return Chat(base_url=f"{url}/chat/completions", tokenizer_backend=None, **settings)
    if not needs_likelihoods:
        return Completions(base_url=f"{url}/completions", tokenizer_backend=None, **settings)
    try:  # lm-eval needs the tokenizer to find where the answer begins
        separator = AutoTokenizer.from_pretrained(model).get_vocab().get(DOCUMENT_SEPARATOR)
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"{where}: likelihoods need the tokenizer, but {model} is neither a folder here nor a model of the Hub "
            "that is downloaded (HF_HUB_OFFLINE=0 downloads it)"
        ) from error
    settings |= {"tokenizer_backend": "huggingface", "tokenizer": model, "custom_prefix_token_id": separator}
    return Completions(base_url=f"{url}/completions", **settings)


def _only_model(where: str, client: OpenAI) -> str:
    models = [model.id for model in _ask(where, client.models.list)]
    if len(models) != 1:
        listed = f"lists {len(models)} models ({', '.join(models[:5])})" if models else "lists no models"
        raise UserError(f"{where}: the endpoint {listed}; name one at the end of the address: #MODEL")
    return models[0]


def _require_likelihoods(where: str, client: OpenAI, model: str) -> None:
    """Raise UserError unless the endpoint gives the log-probabilities of a prompt's tokens."""
    response = _ask(
        where,
        lambda: client.completions.create(
            model=model, prompt="1 2 3", max_tokens=1, temperature=0, echo=True, logprobs=1
        ),
    )
    logprobs = response.choices[0].logprobs if response.choices else None
    if not logprobs or len(logprobs.token_logprobs or ()) < 3:  # of "1 2 3" and a new token
        raise UserError(
            f"{where}: the endpoint gives no log-probabilities of prompts (`echo` with `logprobs`, as vLLM does); "
            "choose tasks that generate answers"
        )


def _ask(where: str, request: Callable[[], T]) -> T:
    """Return the response to a request; UserError if there is none, or an error."""
    try:
        return request()
    except openai.APIConnectionError as error:
        raise UserError(
            f"{where}: no answer from the endpoint ({error.__cause__ or error}); is it running?"
        ) from error
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise UserError(
            f"{where}: the endpoint refuses the key (status {error.status_code}); set OPENAI_API_KEY"
        ) from error
    except openai.APIStatusError as error:
        message = " ".join(error.response.text.split())[:200]
        raise UserError(
            f"{where}: the endpoint answers with status {error.status_code} ({message}); check address and #MODEL"
        ) from error
    except (openai.OpenAIError, ValueError, AttributeError) as error:  # not an OpenAI-compatible response
        raise UserError(f"{where}: the answer is not that of an OpenAI-compatible endpoint ({error})") from error
