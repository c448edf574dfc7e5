"""Load prompts for reinforcement learning, and the answers that rewards compare with.

A row is one of

    {"prompt": "question" or [message, ...], "answer": "text"}     `answer` may be missing, or a list of right answers
    {"messages": [message, ...]}                                   an instruction: its last turn is the answer

`solution`, `ground_truth` and `reward_model: {"ground_truth"}` (verl) stand for `answer`, too. A row may have "tools".
An answer that is a call of tools is the JSON of a list of {"name", "arguments"}.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import ROW_TYPES, find_files
from buddygpt.data.chat.checker import is_plain_text, open_benchmarks
from buddygpt.data.chat.rules import RECIPES, BadRow, check_row, special_tokens
from buddygpt.data.chat.schemas import recognize
from buddygpt.data.chat.turns import turn
from buddygpt.data.text.rows import Row, read_rows

ANSWER_KEYS = ("answer", "solution", "ground_truth")
COLUMNS = Features({"prompt": List(Json()), "answer": List(Value("string")), "tools": List(Json()), "row": Json()})


def load_prompts(
    files: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    needs: Mapping[str, Callable[[dict[str, Any]], str]] | None = None,
    benchmarks: Sequence[str] = (),
    force: bool = False,
) -> Dataset:
    """Load prompts with their answers and tools.

    Columns: `prompt` (messages), `answer` (a list of right ones, or None), `tools`, and `row`, as it is in the file.

    Args:
        files: Names or globs of jsonl or parquet files.
        tokenizer: The tokenizer of the model to train, with its chat template.
        max_length: Tokens that a prompt may have; None for no limit.
        needs: For each reward a function of a row: what the row lacks to be judged by it; "" if nothing. A row that
            no reward judges is bad.
        benchmarks: Files, globs or folders of benchmarks; a row that contains an item of one is bad.
        force: Leave bad rows out and print a warning instead of raising.

    Raises:
        UserError: A file is missing, empty or malformed, a row is bad (with file and row), all rows are, or a reward
            judges none.
    """
    tokens = special_tokens(tokenizer)
    index = open_benchmarks(benchmarks) if benchmarks else None
    needs = needs or {}
    rows, faults, judging = [], [], set()
    for path in find_files(files, ROW_TYPES):
        for row in read_rows(path):
            try:
                prompt = read_prompt(row, tokens)
                _require_fit(prompt, tokenizer, max_length)
                lacking = {name: find_need(prompt) for name, find_need in needs.items()}
                if needs and all(lacking.values()):
                    need = f"the reward {' or '.join(lacking)} needs {' or '.join(lacking.values())}"
                    raise BadRow(f"{need}; a reward model (rlhf/reward.py) judges any answer")
                if index and (items := index.find("\n".join(each["content"] for each in prompt["prompt"]))):
                    raise BadRow(f"contains an item of {items[0].split(':')[0]}")
                rows.append(prompt)
                judging.update(name for name, need in lacking.items() if not need)
            except BadRow as error:
                faults.append(f"{path}:{row.number}: {error}")
                if not force:
                    raise UserError(f"{faults[0]}. To leave bad rows out: --train_on_unfit_data true") from error
    if not rows:
        reason = f"every row is bad, first {faults[0]}" if faults else "there are no rows"
        raise UserError(f"{', '.join(files)}: {reason}")
    for name in needs.keys() - judging:
        raise UserError(f"{', '.join(files)}: no row has {needs[name](rows[0])}, which the reward {name} needs")
    if faults and os.environ.get("RANK", "0") == "0":  # every process loads the rows
        print(f"warning: {len(faults):,} of {len(faults) + len(rows):,} rows are bad and left out, first {faults[0]}")
    return Dataset.from_list(rows, features=COLUMNS)


def read_prompt(row: Row, tokens: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a row of a file with the columns of `COLUMNS`.

    Raises:
        BadRow: It is a row of another method, or its prompt breaks a rule (see [`check_row`]).
    """
    if row.error:
        raise BadRow(row.error)
    content = row.content
    schemas = recognize(content)
    if schemas and schemas[0].kind != "sft":
        raise BadRow(f"not a prompt but a row of kind {schemas[0].kind}: {RECIPES[schemas[0].kind]}")
    if content.get("prompt") is not None:
        prompt, answer = content["prompt"], _find_answer(content)
        prompt = [turn("user", prompt)] if isinstance(prompt, str) else prompt
    elif isinstance(content.get("messages"), list) and content["messages"]:
        prompt, answer = _split_instruction(content["messages"])
    else:
        if is_plain_text(content):
            raise BadRow(f"plain text, not a prompt: {RECIPES['text']}")
        raise BadRow(
            f"neither prompt nor messages; keys: {', '.join(content)}. Convert question and answer, for example, with "
            "python data/convert_chat.py --kind sft"
        )
    if not isinstance(prompt, list):
        raise BadRow("prompt is neither a text nor a list of messages")
    # Any answer would do: the rules are about whole conversations.
    check_row({"messages": [*prompt, turn("assistant", "-")], "tools": content.get("tools")}, "sft", tokens)
    return {"prompt": prompt, "answer": answer, "tools": content.get("tools") or None, "row": content}


def _split_instruction(messages: list[Any]) -> tuple[list[Any], list[str] | None]:
    """Return the turns up to the last answer, and that answer; None if the assistant has not answered yet."""
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return messages, None
    calls = [call.get("function", call) for call in last.get("tool_calls") or [] if isinstance(call, dict)]
    return messages[:-1], _as_answer(calls or last.get("content"))


def _find_answer(row: dict[str, Any]) -> list[str] | None:
    for key in ANSWER_KEYS:
        if row.get(key) is not None:
            return _as_answer(row[key])
    verl = row.get("reward_model")
    return _as_answer(verl.get("ground_truth")) if isinstance(verl, dict) else None


def _as_answer(value: Any) -> list[str] | None:
    """Return a value, or each of a list, as text, and calls as one JSON text; None for nothing."""
    if value in (None, "", [], {}):
        return None
    if isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)):
        return [json.dumps(value, ensure_ascii=False)]
    return [str(each) for each in (value if isinstance(value, list) else [value])]


def _require_fit(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
    try:
        length = len(render_prompt(row["prompt"], row["tools"], tokenizer))
    except TemplateError as error:
        raise BadRow(f"the chat template refuses it: {error}") from error
    if max_length is not None and length > max_length:
        raise BadRow(f"the prompt has {length:,} tokens, and only {max_length:,} leave room for the answer")


def render_prompt(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase, **options
) -> list[int]:
    """Return the tokens of a prompt, up to where the answer begins. `options` go to the chat template."""
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=True, **options
    )["input_ids"]
