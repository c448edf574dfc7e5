"""Turn chat rows into the tokens that TRL's trainers make of them, and mark the tokens that carry loss."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.checkpoints import end_of_answer_token
from buddygpt.cli.errors import UserError
from buddygpt.data.chat.loss_marks import carries_loss
from buddygpt.data.chat.rules import FORMS, BadRow
from buddygpt.data.chat.thoughts import PARTS, mask_parts, template_options

ONES = re.compile(b"\x01+")
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
MAX_UNTRAINED = 0.1  # share of rows whose answer is cut off; more are not fit to train on


class TokenSequence(NamedTuple):
    """Token ids of one conversation, and 1 for each token that carries loss, else 0."""

    ids: list[int]
    loss: list[int]


def tokenize(
    row: dict[str, Any],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    assistant_only: bool = True,
    loss_on: Collection[str] = PARTS,
) -> list[TokenSequence]:
    """Return one conversation of an instruction or a labeled answer, two of a preference pair.

    In an instruction, the assistant's turns carry loss, unless their marks say otherwise (loss_marks.py). In the other
    kinds, the answer does: it starts at the first token in which prompt and conversation differ, as in
    `trl.DPOTrainer`.

    Args:
        row: A row in the standard form of `kind`.
        assistant_only: False: every token of an instruction carries loss.
        loss_on: The parts of the answers of an instruction that carry loss.

    Raises:
        BadRow: The template refuses the row, as some refuse system turns, or leaves its tool calls out, as some do.
        UserError: See [`training_template`].
    """
    (sequences,) = tokenize_rows([row], kind, tokenizer, assistant_only, loss_on)
    if isinstance(sequences, BadRow):
        raise sequences
    return sequences


def tokenize_rows(
    rows: list[dict[str, Any]],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    assistant_only: bool = True,
    loss_on: Collection[str] = PARTS,
) -> list[list[TokenSequence] | BadRow]:
    """Return what `tokenize` returns or raises for each row. Short rows take a third of the time of one by one."""

    def options(row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        needs_marks = kind == "sft" and (assistant_only or not all(_trained_answers(row)))
        return {"tools": row.get("tools") or None, **template_options(row)}, needs_marks

    done = []
    for (rendering, needs_marks), group in groupby(rows, options):
        alike = list(group)
        try:
            for row in alike:
                _refuse_lost_calls(row, kind, tokenizer)
            if kind == "sft":
                done += _tokenize_instructions(alike, rendering, tokenizer, assistant_only, needs_marks, loss_on)
            else:
                done += _tokenize_answers(alike, rendering, kind, tokenizer)
        except (TemplateError, BadRow) as error:
            if len(alike) > 1:  # find the rows that are refused
                for row in alike:
                    done += tokenize_rows([row], kind, tokenizer, assistant_only, loss_on)
            else:
                refused = BadRow(f"the chat template refuses it: {error}")
                refused.__cause__ = error
                done.append(error if isinstance(error, BadRow) else refused)
    return done


def _refuse_lost_calls(row: dict[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [message for key in FORMS[kind] for message in row[key]]
    has_calls = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
    if has_calls and not _shows_calls(tokenizer, tokenizer.chat_template):
        raise BadRow("the chat template leaves tool calls or their results out")


def _trained_answers(row: dict[str, Any]) -> list[bool]:
    return [carries_loss(message) for message in row["messages"] if message["role"] == "assistant"]


def _tokenize_instructions(
    rows: list[dict[str, Any]],
    rendering: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    assistant_only: bool,
    needs_marks: bool,
    loss_on: Collection[str],
) -> list[list[TokenSequence]]:
    chats = [row["messages"] for row in rows]
    rendering = rendering | {"chat_template": training_template(tokenizer) if needs_marks else None}
    masks_parts = assistant_only and not set(PARTS) <= set(loss_on)
    encoded = tokenizer.apply_chat_template(
        chats,
        return_assistant_tokens_mask=needs_marks,
        return_dict=True,
        tokenizer_kwargs={"return_offsets_mapping": masks_parts, "return_attention_mask": False},
        **rendering,
    )
    texts = tokenizer.apply_chat_template(chats, tokenize=False, **rendering) if masks_parts else []
    sequences = []
    for number, (row, ids) in enumerate(zip(rows, encoded["input_ids"], strict=True)):
        length = _end_of_answer(ids, tokenizer)
        loss = [int(not assistant_only)] * len(ids)
        if needs_marks:
            answers, trained = _find_answers(encoded["assistant_masks"][number]), _trained_answers(row)
            if len(answers) != len(trained) and not all(trained):
                raise BadRow("the chat template does not show where the answers without loss are")
            for answer, (start, end) in enumerate(answers):
                has_loss = int(all(trained) or trained[answer])
                end = start + _end_of_answer(ids[start:end], tokenizer)
                loss[start:end] = [has_loss] * (end - start)
            if masks_parts:
                loss = mask_parts(texts[number], encoded["offset_mapping"][number], loss, loss_on)
        sequences.append([TokenSequence(ids[:length], loss[:length])])
    return sequences


def _find_answers(mask: list[int]) -> list[tuple[int, int]]:
    """Return the start and the end of each run of ones."""
    return [found.span() for found in ONES.finditer(bytes(mask))]


def _tokenize_answers(
    rows: list[dict[str, Any]], rendering: dict[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase
) -> list[list[TokenSequence]]:
    options = rendering | {"return_dict": True}
    prompt_key, *answer_keys = FORMS[kind]
    prompts = [row[prompt_key] for row in rows]
    prompts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, **options)["input_ids"]
    conversations = []  # of each answer, those of all rows
    for key in answer_keys:
        messages = [row[prompt_key] + row[key] for row in rows]
        encoded = tokenizer.apply_chat_template(messages, **options)["input_ids"]
        conversations.append([ids[: _end_of_answer(ids, tokenizer)] for ids in encoded])
    sequences = []
    for prompt, *answers in zip(prompts, *conversations, strict=True):
        start = min(shared_start(prompt, ids) for ids in answers)
        sequences.append([TokenSequence(ids, [0] * start + [1] * (len(ids) - start)) for ids in answers])
    return sequences


def shared_start(first: list[int], second: list[int]) -> int:
    """Return the number of tokens at the start that two sequences share."""
    differ = (number for number, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differ, min(len(first), len(second)))


def _end_of_answer(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens up to the mark that ends the last answer, such as <|im_end|>.

    Many templates write more after it: a line end (Qwen, Gemma), or also the eos token (Phi-3). Generation stops at
    the mark, so a loss on the rest teaches nothing, and in preference pairs it would be most of the loss.
    """
    end = len(ids)
    while end and _is_blank(tokenizer, ids[end - 1]):
        end -= 1
    if not end or ids[end - 1] not in _marks(tokenizer):
        return len(ids)
    mark, eos = _end_mark(tokenizer, tokenizer.chat_template)
    for position in range(end - 1, -1, -1):
        if ids[position] == mark:
            end = position + 1
        elif ids[position] != eos and not _is_blank(tokenizer, ids[position]):
            break
    return end


@cache
def _is_blank(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return not tokenizer.decode([token]).strip()


@cache
def _shows_calls(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    from trl.chat_template_utils import supports_tool_calling  # imports torch, which takes seconds

    return supports_tool_calling(tokenizer)


@cache
def _end_mark(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[int | None, int | None]:
    """Return the token that ends an answer and the eos token; None for one that there is not."""
    try:
        mark = tokenizer.convert_tokens_to_ids(end_of_answer_token(tokenizer))
    except UserError:  # the recipes report it
        mark = None
    return mark, tokenizer.eos_token_id


@cache
def _marks(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat template that marks the assistant's turns: the tokenizer's own, or TRL's version of it.

    Raises:
        UserError: There is no template, or one without marks that TRL does not know.
    """
    template = tokenizer.chat_template
    if template is None:
        raise UserError(f"{tokenizer.name_or_path} has no chat template: put a chat_template.jinja into it")
    if GENERATION_MARK.search(template if isinstance(template, str) else template["default"]):
        return template
    from trl.chat_template_utils import get_training_chat_template  # imports torch, which takes seconds

    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path} has no {{% generation %}} marks") from error


# --- What a limit of length cuts off ---


@dataclass
class Truncation:
    """Counts of what a trainer reads of each row if it keeps `max_length` tokens of a sequence."""

    max_length: int | None  # None: all tokens
    keep_end: bool = False  # keep the last tokens, not the first
    rows: int = 0
    cut: int = 0  # rows with a longer sequence
    untrained: int = 0  # rows with a sequence without loss in what is kept, or with two equal ones
    missing: str = "answer"  # what they lack
    tokens: int = 0
    kept: int = 0
    with_loss: int = 0  # of those kept

    def add(self, sequences: list[TokenSequence]) -> bool:
        """Count a row; return True if each of its sequences carries loss in what is kept, and they differ there."""
        kept = slice(self.max_length)
        if self.keep_end and self.max_length is not None:
            kept = slice(-self.max_length, None)
        trained = True
        for ids, loss in sequences:
            trained = trained and any(loss[kept])
            self.tokens += len(ids)
            self.kept += len(ids[kept])
            self.with_loss += sum(loss[kept])
        if len(sequences) == 2:
            self.missing = "two different answers"
            trained = trained and sequences[0].ids[kept] != sequences[1].ids[kept]
        self.rows += 1
        self.cut += any(len(ids) > (self.max_length or len(ids)) for ids, _ in sequences)
        self.untrained += not trained
        return trained

    def __str__(self) -> str:
        """Return how much is cut off, in words; "" for nothing."""
        if not self.cut:
            return ""
        lost, cut = 1 - self.kept / self.tokens, self.cut / self.rows
        return f"max_length {self.max_length:,} cuts {cut:.1%} of the rows and {lost:.1%} of their tokens"


def find_faults(bad_rows: int, truncation: Truncation | None = None) -> list[str]:
    """Return why a set of rows is not fit to train on; an empty list if it is.

    Args:
        bad_rows: How many rows break a rule.
        truncation: Counts of the good rows, if they were tokenized.
    """
    faults = []
    if bad_rows:
        faults.append(f"{bad_rows:,} bad row{'s' if bad_rows > 1 else ''}")
    if truncation is None or not truncation.rows:
        return faults
    within = f" within max_length {truncation.max_length:,}" if truncation.max_length else ""
    share = truncation.untrained / truncation.rows
    if share == 1:
        faults.append(f"all rows have no {truncation.missing}{within}")
    elif share > MAX_UNTRAINED:
        faults.append(f"{share:.1%} of the rows have no {truncation.missing}{within}, more than {MAX_UNTRAINED:.0%}")
    if truncation.cut == truncation.rows:
        faults.append(f"every row is longer than max_length {truncation.max_length:,}")
    return faults
