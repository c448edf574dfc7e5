"""Chat rows as the tokens that TRL's trainers make of them, with those that carry loss, and when that is unfit."""

from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from buddygpt.cli.errors import UserError
from buddygpt.data.chat.rules import FORMS, BadRow


class TokenSequence(NamedTuple):
    """What the model reads of one conversation, and 1 for each token that the loss is taken on."""

    ids: list[int]
    loss: list[int]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template with marks around what the assistant says: the tokenizer's own, or TRL's like it.

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


def tokenise(
    row: dict[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase, assistant_only: bool = True
) -> list[TokenSequence]:
    """Return the one conversation of an instruction or a labelled answer, or the two of a pair.

    Loss is taken on what the assistant says in an instruction (on everything without `assistant_only`), and on the
    answer of the others, which begins where prompt and conversation differ, as in `trl.DPOTrainer`.

    Raises:
        BadRow: The template refuses the row, as some refuse system turns.
        UserError: See [`training_template`].
    """
    template = training_template(tokenizer) if kind == "sft" and assistant_only else None
    options = {"tools": row.get("tools"), "chat_template": template, "return_dict": True}
    try:
        if kind == "sft":
            encoded = tokenizer.apply_chat_template(
                row["messages"], return_assistant_tokens_mask=assistant_only, **options
            )
            ids = encoded["input_ids"]
            return [TokenSequence(ids, encoded.get("assistant_masks", [1] * len(ids)))]
        key, *answers = FORMS[kind]
        prompt = tokenizer.apply_chat_template(row[key], add_generation_prompt=True, **options)["input_ids"]
        whole = [tokenizer.apply_chat_template(row[key] + row[name], **options)["input_ids"] for name in answers]
    except TemplateError as error:
        raise BadRow(f"the chat template refuses it: {error}") from error
    start = min(common_prefix_length(prompt, ids) for ids in whole)
    return [TokenSequence(ids, [0] * start + [1] * (len(ids) - start)) for ids in whole]


def find_faults(bad_rows: int, trained_on: bool, uncut: bool, max_length: int | None) -> list[str]:
    """Return why rows are not to be trained on, in words; nothing where they are.

    Args:
        bad_rows: How many break a rule.
        trained_on: Whether any row has a token that carries loss among its first `max_length`.
        uncut: Whether any row has at most `max_length` tokens.
    """
    within = f" within max_length {max_length:,}" if max_length else ""
    faults = {
        f"{bad_rows:,} bad row{'s' * (bad_rows > 1)}": bad_rows > 0,
        f"no token carries loss{within}": not trained_on,
        f"every row is longer than max_length {max_length}": not uncut,
    }
    return [fault for fault, present in faults.items() if present]
