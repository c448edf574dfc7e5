"""The schemas in which instruction and preference data is published. To support another one, add a function here:

    @schema("my_set", kind="sft", keys="query reply")
    def my_set(row):
        return instruction(row, question=row["query"], answer=row["reply"])

A schema with one column for the question and one for the answer is a line in COLUMNS instead.

`keys` are the columns that every row has, in lower case; a file's schema is recognized by them. The function returns a
row in the standard form of its kind (see rules.py), or a list of such rows. Use these to build it:

    sft          instruction(row, question, answer), or conversation(row, turns)
    kto          labeled(row, turns)
    preference   pair(row, prompt, chosen, rejected)

turns.py reads lists of turns. The caller escapes special tokens, checks the rules, and turns a `KeyError`,
`TypeError`, `ValueError` or `AttributeError` into a bad row; raise `BadRow("reason")` to say more. Then add a case to
CASES in tests/data/chat/test_schemas.py and a row to the table in data/README.md.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from buddygpt.data.chat.dialogues import read_belle, read_glaive, read_moss, read_moss_002
from buddygpt.data.chat.rules import FORMS, BadRow, read_label
from buddygpt.data.chat.turns import (
    DIALOGUE_TURN,
    add_context,
    exchange,
    read_answer,
    read_dialogue,
    read_thinking,
    read_turns,
    respell_thinking,
    think,
    turn,
)

StandardRow = dict[str, Any]


class Schema(NamedTuple):
    """Rows with all `keys`, and a true or false label if `has_label`, are read into standard rows of `kind`.

    A row that also fits a schema that does not yield is not read by one that does.
    """

    name: str
    kind: str
    keys: frozenset[str]
    has_label: bool
    read: Callable[[dict[str, Any]], StandardRow | list[StandardRow]]
    yields: bool = False

    def fits(self, keys: frozenset[str], label: bool | None) -> bool:
        return self.keys <= keys and (not self.has_label or label is not None)


SCHEMAS: dict[str, Schema] = {}


def schema(name: str, kind: str, keys: str, has_label: bool = False, yields: bool = False) -> Callable:
    """Register the decorated function as a schema. `keys` are separated by spaces."""

    def register(read: Callable) -> Callable:
        SCHEMAS[name] = Schema(name, kind, frozenset(keys.split()), has_label, read, yields)
        return read

    return register


def named_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a row that are not null, with names in lower case (medical-o1 has `Question`)."""
    columns = {key: value for key, value in row.items() if value is not None}
    return {key.lower(): value for key, value in columns.items() if key.lower() not in columns} | columns


def recognize(row: dict[str, Any], kind: str | None = None) -> list[Schema]:
    """Return the schemas that `row` fits; a schema is left out if the keys of another one include its keys.

    Args:
        kind: Only schemas of this kind. None: of the last kind of `FORMS` that the row fits any schema of.
    """
    row = named_columns(row)
    return list(_recognize(frozenset(row), read_label(row), kind))


@cache
def _recognize(keys: frozenset[str], label: bool | None, kind: str | None) -> list[Schema]:
    fitting = [entry for entry in SCHEMAS.values() if kind in (None, entry.kind) and entry.fits(keys, label)]
    fitting = [entry for entry in fitting if not any(entry.keys < other.keys for other in fitting)]
    for last_kind in reversed(FORMS):
        if entries := [entry for entry in fitting if entry.kind == last_kind]:
            return [entry for entry in entries if not entry.yields] or entries
    return []


# --- Instructions ---


def instruction(row: dict[str, Any], question: Any, answer: Any) -> StandardRow:
    """Return a question and its answer, after the exchanges of the row's `history` of [question, answer].

    Question and answer are texts or (TRL, Nemotron) lists of turns; only the answer carries loss then.
    """
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(item, list) and len(item) == 2 for item in history):
        raise BadRow("history is not a list of [question, answer]")
    turns = []
    for earlier_question, earlier_answer in history:
        turns += exchange(earlier_question, earlier_answer)
    if isinstance(question, list):
        asked = read_answer(question, "user")
        turns += [each | {"weight": 0} if each["role"] == "assistant" else each for each in asked]
    else:
        turns.append(turn("user", question))
    turns += read_answer(answer, "assistant") if isinstance(answer, list) else [turn("assistant", answer)]
    return conversation(row, turns)


def conversation(row: dict[str, Any], turns: list[dict[str, Any]]) -> StandardRow:
    """Return an instruction row of several turns. Thinking in a column of the row belongs to the last answer."""
    if turns and turns[-1]["role"] == "assistant" and isinstance(turns[-1]["content"], str):
        answer = respell_thinking(turns[-1]["content"])
        turns = [*turns[:-1], turns[-1] | {"content": think(read_thinking(row), answer)}]
    return add_context(row, {"messages": turns})


def join_input(row: dict[str, Any], key: str) -> str:
    """Return the text under `key` and, on the next lines, the row's `input` and (Dolly) `context` if it has them."""
    texts = [row[name] for name in dict.fromkeys((key, "input", "context")) if row.get(name)]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"{key} or input is not a string")
    return "\n".join(texts)


# Schemas of one question and one answer: name -> column of the question, of the answer, others that must be there.
# Rows that fit another schema too are read by that one.
COLUMNS = {
    "instruction_response": "instruction response",  # Dolly
    "question_response": "question response",  # OpenOrca, medical-o1
    "query_response": "query response",  # swift, MetaMath
    "query_answer": "query answer",  # CodeFeedback
    "problem_solution": "problem solution",  # NuminaMath
    "input_output": "input output",  # Nemotron
    "prompt_completion": "prompt completion",  # TRL
    "prompt_output": "prompt output",
    "question_output": "question output",
    "inputs_targets": "inputs targets",  # Aya, P3
    "user_assistant": "user assistant",
    "generated_solution": "problem generated_solution",  # OpenMathInstruct-2, OpenMathReasoning
    "instruction_answer": "instruction answer",
    "r1_distill": "input content reasoning_content",
    "openthoughts": "problem deepseek_solution deepseek_reasoning",
    "s1k": "question attempt thinking_trajectories",
    "s1k_1.1": "question deepseek_attempt deepseek_thinking_trajectory",
}


def add_column_schema(name: str, question: str, answer: str, *others: str) -> None:
    def read(row: dict[str, Any]) -> StandardRow:
        asked = row[question] if isinstance(row[question], list) else join_input(row, question)
        thoughts = row[others[0]] if others else None
        if isinstance(thoughts, list) and len(thoughts) == 1:
            thoughts = thoughts[0]
        return instruction(row | {"reasoning": thoughts} if others else row, asked, row[answer])

    schema(name, "sft", " ".join((question, answer, *others)), yields=True)(read)


for _name, _keys in COLUMNS.items():
    add_column_schema(_name, *_keys.split())


@schema("alpaca", kind="sft", keys="instruction output")
def alpaca(row: dict[str, Any]) -> StandardRow:
    return instruction(row, read_belle(join_input(row, "instruction")), row["output"])


@schema("seed_tasks", kind="sft", keys="instruction instances")
def seed_tasks(row: dict[str, Any]) -> list[StandardRow]:
    """An instruction with several inputs and outputs gives one row for each."""
    if not row["instances"]:
        raise BadRow("there are no instances")
    return [alpaca({"instruction": row["instruction"], **instance}) for instance in row["instances"]]


@schema("q_a", kind="sft", keys="q a")
def q_a(row: dict[str, Any]) -> StandardRow:
    return instruction(row, join_input(row, "q"), row["a"])


@schema("prompt_response", kind="sft", keys="prompt response")
def prompt_response(row: dict[str, Any]) -> StandardRow:
    return instruction(row, row["prompt"], row["response"])


@schema("input_target", kind="sft", keys="input target")
def input_target(row: dict[str, Any]) -> StandardRow:
    return instruction(row, row["input"], row["target"])


@schema("question_answer", kind="sft", keys="question answer")
def question_answer(row: dict[str, Any]) -> StandardRow:
    options = [key for key in ("options", "choices") if row.get(key)] or [key for key in "abcd" if key in row]
    if options and len(str(row["answer"])) < 3:
        raise BadRow(f"the answer is one of the options ({', '.join(options)}), which the question does not show")
    return instruction(row, row["question"], row["answer"])


@schema("sharegpt", kind="sft", keys="conversations")
def sharegpt(row: dict[str, Any]) -> StandardRow:
    return conversation(row, read_turns(row["conversations"]))


@schema("messages", kind="sft", keys="messages")
def messages(row: dict[str, Any]) -> StandardRow:
    return conversation(row, read_turns(row["messages"]))


@schema("human_assistant", kind="sft", keys="conversation")
def human_assistant(row: dict[str, Any]) -> StandardRow:
    """ShareGPT-90k, LMSYS, WildChat, XTuner."""
    return conversation(row, read_turns(row["conversation"]))


@schema("moss", kind="sft", keys="chat")
def moss(row: dict[str, Any]) -> StandardRow:
    return conversation({"system": row.get("meta_instruction")}, read_moss(row["chat"]))


@schema("moss_002", kind="sft", keys="plain_text", yields=True)
def moss_002(row: dict[str, Any]) -> StandardRow:
    return conversation({"system": row.get("prefix")}, read_moss_002(row["plain_text"]))


@schema("glaive", kind="sft", keys="system chat")
def glaive(row: dict[str, Any]) -> StandardRow:
    system, tools, turns = read_glaive(row["system"], row["chat"])
    return conversation({"system": system, "tools": tools}, turns)


@schema("data_list", kind="sft", keys="data", yields=True)
def data_list(row: dict[str, Any]) -> StandardRow:
    """UltraChat and HuatuoGPT: a list of texts that take turns."""
    if not isinstance(row["data"], list) or not all(isinstance(item, str) for item in row["data"]):
        raise BadRow("data is not a list of texts")
    return conversation(row, read_turns(row["data"]))


@schema("huatuo_qa", kind="sft", keys="questions answers", yields=True)
def huatuo_qa(row: dict[str, Any]) -> list[StandardRow]:
    """Questions, each a text or a list of its wordings (the first is taken), and their answers."""
    if not isinstance(row["questions"], list):
        raise BadRow("questions is not a list")
    rows = []
    for question, answer in zip(row["questions"], row["answers"], strict=True):
        rows.append(instruction({}, question[0] if isinstance(question, list) else question, answer))
    return rows


@schema("xlam", kind="sft", keys="query answers tools", yields=True)
def xlam(row: dict[str, Any]) -> StandardRow:
    """A question and the calls that answer it."""
    calls = read_turns([{"role": "tool_call", "content": row["answers"]}])
    return conversation(row, [turn("user", row["query"]), *calls])


@schema("oasst", kind="sft", keys="message_tree_id prompt", yields=True)
def oasst(row: dict[str, Any]) -> StandardRow:
    """A tree of replies (OpenAssistant's *.trees.jsonl.gz): the conversation of the best replies."""
    message, messages = row["prompt"], []
    while message:
        messages.append({"role": message["role"], "text": message["text"]})
        replies = [reply for reply in message.get("replies") or () if not reply.get("deleted")]
        message = min(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0), default=None)
    turns = read_turns(messages)
    return conversation({}, turns[:-1] if turns[-1]["role"] == "user" else turns)


@schema("oasst_message", kind="sft", keys="message_id message_tree_id text role", yields=True)
def oasst_message(row: dict[str, Any]) -> StandardRow:
    """The first message of a tree, to which trees.py has joined the replies."""
    if row.get("role") != "prompter":
        raise BadRow("the first message of the tree is not a prompt")
    return oasst({"prompt": row})


# --- Labeled answers ---


def labeled(row: dict[str, Any], turns: list[dict[str, Any]]) -> StandardRow:
    """Return a kto row: the last turn is the answer that the row's label calls good or bad."""
    standard = {"prompt": turns[:-1], "completion": turns[-1:], "label": read_label(row)}
    return add_context(row, standard, "prompt")


@schema("messages_label", kind="kto", keys="messages label", has_label=True)
def messages_label(row: dict[str, Any]) -> StandardRow:
    return labeled(row, read_turns(row["messages"]))


@schema("sharegpt_label", kind="kto", keys="conversations label", has_label=True)
def sharegpt_label(row: dict[str, Any]) -> StandardRow:
    return labeled(row, read_turns(row["conversations"]))


@schema("alpaca_label", kind="kto", keys="instruction output kto_tag", has_label=True)
def alpaca_label(row: dict[str, Any]) -> StandardRow:
    return labeled(row, exchange(join_input(row, "instruction"), row["output"]))


@schema("kto", kind="kto", keys="prompt completion label")
def kto(row: dict[str, Any]) -> StandardRow:
    return labeled(row, read_answer(row["prompt"], "user") + read_answer(row["completion"], "assistant"))


# --- Preference pairs ---


def pair(row: dict[str, Any], prompt: list, chosen: list, rejected: list) -> StandardRow:
    """Return a preference row. The answers may begin with turns of their own before the prompt, and repeat it."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected differ before the last turn")
    context = chosen[:-1]
    if context and context[len(context) - len(prompt) :] != prompt:
        raise BadRow("chosen does not begin with the prompt")
    standard = {"prompt": context or prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return add_context(row, standard, "prompt")


@schema("preference", kind="preference", keys="prompt chosen rejected")
def preference(row: dict[str, Any]) -> StandardRow:
    """The prompt may be the hh-rlhf dialogue that the answers continue, up to an open "\\n\\nAssistant:"."""
    prompt = row["prompt"]
    if isinstance(prompt, str) and DIALOGUE_TURN.match(prompt):
        prompt = [message for message in read_dialogue(prompt) if message != turn("assistant", "")]
    prompt = read_answer(prompt, "user")
    return pair(row, prompt, read_answer(row["chosen"], "assistant"), read_answer(row["rejected"], "assistant"))


@schema("instruction_preference", kind="preference", keys="instruction chosen rejected")
def instruction_preference(row: dict[str, Any]) -> StandardRow:
    return preference(row | {"prompt": join_input(row, "instruction")})


@schema("sharegpt_preference", kind="preference", keys="conversations chosen rejected")
def sharegpt_preference(row: dict[str, Any]) -> StandardRow:
    prompt = read_turns(row["conversations"])
    return pair(row, prompt, read_answer(row["chosen"], "assistant"), read_answer(row["rejected"], "assistant"))


@schema("message_pair", kind="preference", keys="chosen_messages rejected_messages")
def message_pair(row: dict[str, Any]) -> StandardRow:
    return pair(row, [], read_turns(row["chosen_messages"]), read_turns(row["rejected_messages"]))


@schema("dialogue_pair", kind="preference", keys="chosen rejected")
def dialogue_pair(row: dict[str, Any]) -> StandardRow:
    """Each side is a whole dialogue: one string (hh-rlhf) or a list of turns."""
    dialogues = []
    for side in (row["chosen"], row["rejected"]):
        dialogues.append(read_dialogue(side) if isinstance(side, str) else read_turns(side))
    chosen, rejected = dialogues
    return pair(row, [], chosen, rejected)


# Schemas of a question and two answers: name -> column of the question, of the better answer, of the worse one.
PAIR_COLUMNS = {
    "prompt_reject": "prompt chosen reject",  # huozi
    "question_preference": "question chosen rejected",  # orca_dpo_pairs
    "input_preference": "input chosen rejected",  # distilabel-intel-orca-dpo-pairs
    "chosen_response": "prompt chosen_response rejected_response",
    "cvalues": "prompt pos_resp neg_resp",
    "stack_exchange": "question response_j response_k",
}


def add_pair_schema(name: str, question: str, chosen: str, rejected: str) -> None:
    def read(row: dict[str, Any]) -> StandardRow:
        asked = row[question] if isinstance(row[question], list) else join_input(row, question)
        return preference(row | {"prompt": asked, "chosen": row[chosen], "rejected": row[rejected]})

    schema(name, "preference", f"{question} {chosen} {rejected}", yields=True)(read)


for _name, _keys in PAIR_COLUMNS.items():
    add_pair_schema(_name, *_keys.split())


@schema("query_preference", kind="preference", keys="query response rejected_response", yields=True)
def query_preference(row: dict[str, Any]) -> StandardRow:
    """swift: the answer is the chosen one."""
    turns = instruction({"history": row.get("history")}, join_input(row, "query"), row["response"])["messages"]
    return pair(row, turns[:-1], turns[-1:], read_answer(row["rejected_response"], "assistant"))


@schema("messages_preference", kind="preference", keys="messages rejected_response", yields=True)
def messages_preference(row: dict[str, Any]) -> StandardRow:
    """swift: the last turn is the chosen answer."""
    turns = read_turns(row["messages"])
    return pair(row, turns[:-1], turns[-1:], read_answer(row["rejected_response"], "assistant"))


@schema("rejected_messages", kind="preference", keys="messages rejected_messages", yields=True)
def rejected_messages(row: dict[str, Any]) -> StandardRow:
    return pair(row, [], read_turns(row["messages"]), read_turns(row["rejected_messages"]))


@schema("openai_preference", kind="preference", keys="input preferred_output non_preferred_output", yields=True)
def openai_preference(row: dict[str, Any]) -> StandardRow:
    prompt = read_turns(row["input"]["messages"])
    chosen, rejected = read_turns(row["preferred_output"]), read_turns(row["non_preferred_output"])
    return pair(row | {"tools": row["input"].get("tools")}, prompt, chosen, rejected)


@schema("safe_rlhf", kind="preference", keys="prompt response_0 response_1 better_response_id", yields=True)
def safe_rlhf(row: dict[str, Any]) -> StandardRow:
    """PKU-SafeRLHF: the answer that people found more helpful is chosen; it need not be the safer one."""
    better = int(row["better_response_id"])
    if better not in (0, 1):
        raise BadRow("better_response_id is neither 0 nor 1")
    return preference(row | {"chosen": row[f"response_{better}"], "rejected": row[f"response_{1 - better}"]})


def better_first(answers: tuple[str, str], score: Any) -> dict[str, str]:
    """Return two answers as `chosen` and `rejected`: a negative score prefers the first, a positive one the second."""
    if not float(score):
        raise BadRow("neither answer is preferred")
    return dict(zip(("chosen", "rejected"), answers if float(score) < 0 else answers[::-1], strict=True))


@schema("helpsteer2", kind="preference", keys="prompt response_1 response_2 preference_strength", yields=True)
def helpsteer2(row: dict[str, Any]) -> StandardRow:
    return preference(row | better_first((row["response_1"], row["response_2"]), row["preference_strength"]))


@schema("helpsteer3", kind="preference", keys="context response1 response2 overall_preference", yields=True)
def helpsteer3(row: dict[str, Any]) -> StandardRow:
    answers = better_first((row["response1"], row["response2"]), row["overall_preference"])
    return preference(row | answers | {"prompt": row["context"]})


def best_and_worst(answers: list[tuple[float, str]]) -> dict[str, str]:
    """Return the answers of the highest and of the lowest score as `chosen` and `rejected`."""
    if len({score for score, _ in answers}) < 2:
        raise BadRow("there are no two answers of different scores")
    return {"chosen": max(answers, key=lambda item: item[0])[1], "rejected": min(answers, key=lambda item: item[0])[1]}


@schema("nectar", kind="preference", keys="prompt answers", yields=True)
def nectar(row: dict[str, Any]) -> StandardRow:
    """Answers with ranks: the first is chosen over the last."""
    return preference(row | best_and_worst([(-float(item["rank"]), item["answer"]) for item in row["answers"]]))


@schema("ultrafeedback", kind="preference", keys="instruction completions", yields=True)
def ultrafeedback(row: dict[str, Any]) -> StandardRow:
    """Answers with scores (UltraFeedback before it was binarized): the best is chosen over the worst."""
    answers = []
    for item in row["completions"]:
        score = item.get("fine-grained_score", item.get("overall_score"))
        answers.append((float(score), item["response"]))
    return preference(row | best_and_worst(answers) | {"prompt": row["instruction"]})


@schema("hc3", kind="preference", keys="question human_answers chatgpt_answers")
def hc3(row: dict[str, Any]) -> StandardRow:
    """HC3 compares who wrote, not how well. We choose ChatGPT's first answer over the first human one, because readers
    more often found it the more helpful one (arXiv:2301.07597). So the pairs teach ChatGPT's manner.
    """
    chatgpt, human = row["chatgpt_answers"], row["human_answers"]
    if not chatgpt or not human:
        raise BadRow("one side has no answers")
    return preference({"prompt": row["question"], "chosen": chatgpt[0], "rejected": human[0]})
