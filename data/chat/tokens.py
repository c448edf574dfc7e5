"""Turn chat rows into the tokens that TRL's trainers make of them, and mark the tokens that carry loss."""

from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from buddygpt.cli.errors import UserError
from buddygpt.data.chat.rules import FORMS, BadRow


class TokenSequence(NamedTuple):
    """Token ids of one conversation, and 1 for each token that carries loss, else 0."""

    ids: list[int]
    loss: list[int]


def tokenize(
    row: dict[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase, assistant_only: bool = True
) -> list[TokenSequence]:
    """Return one conversation of an instruction or a labeled answer, two of a preference pair.

    In an instruction, the assistant's turns carry loss. In the other kinds, the answer does: it starts at the first
    token in which prompt and conversation differ, as in `trl.DPOTrainer`.

    Args:
        row: A row in the standard form of `kind`.
        assistant_only: False: every token of an instruction carries loss.

    Raises:
        BadRow: The template refuses the row, as some refuse system turns.
        UserError: See [`training_template`].
    """
    try:
        if kind == "sft":
            return [_tokenize_instruction(row, tokenizer, assistant_only)]
        return _tokenize_answers(row, kind, tokenizer)
    except TemplateError as error:
        raise BadRow(f"the chat template refuses it: {error}") from error


def _tokenize_instruction(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, assistant_only: bool
) -> TokenSequence:
    encoded = tokenizer.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        chat_template=training_template(tokenizer) if assistant_only else None,
        return_assistant_tokens_mask=assistant_only,
        return_dict=True,
    )
    ids = encoded["input_ids"]
    return TokenSequence(ids, encoded["assistant_masks"] if assistant_only else [1] * len(ids))


def _tokenize_answers(row: dict[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
    options = {"tools": row.get("tools"), "return_dict": True}
    prompt_key, *answer_keys = FORMS[kind]
    prompt = tokenizer.apply_chat_template(row[prompt_key], add_generation_prompt=True, **options)["input_ids"]
    conversations = []
    for key in answer_keys:
        conversations.append(tokenizer.apply_chat_template(row[prompt_key] + row[key], **options)["input_ids"])
    start = min(common_prefix_length(prompt, ids) for ids in conversations)
    return [TokenSequence(ids, [0] * start + [1] * (len(ids) - start)) for ids in conversations]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat template that marks the assistant's turns: the tokenizer's own, or TRL's version of it.

    Raises:
        UserError: There is no template, or one without marks that TRL does not know.
    """
    template = tokenizer.chat_template
    if template is None:
        raise UserError(f"{tokenizer.name_or_path} has no chat template: put a chat_template.jinja into it")
    if has_generation_markers(template):
        return template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path} has no {{% generation %}} marks") from error


def find_faults(bad_rows: int, trained_on: bool, uncut: bool, max_length: int | None) -> list[str]:
    """Return why a set of rows is not fit to train on; an empty list if it is.

    Args:
        bad_rows: How many rows break a rule.
        trained_on: True if any row has a token that carries loss among its first `max_length`.
        uncut: True if any row has at most `max_length` tokens.
        max_length: Tokens that the trainer keeps of a row; None for all.
    """
    faults = []
    if bad_rows:
        faults.append(f"{bad_rows:,} bad row{'s' if bad_rows > 1 else ''}")
    if not trained_on:
        within = f" within max_length {max_length:,}" if max_length else ""
        faults.append(f"no token carries loss{within}")
    if not uncut:
        faults.append(f"every row is longer than max_length {max_length}")
    return faults
