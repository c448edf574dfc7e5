"""Rows of every schema become the standard rows they stand for; every other row is refused with its reason."""

import json

import conftest
import pytest
from standard_rows import ANSWER, ASSISTANT, CALL, FOLLOW_UP, LABELED, PAIR, REJECTED, SYSTEM, TOOL, TOOL_ROW, USER
from transformers import AutoTokenizer

from buddygpt.data.chat.checker import convert
from buddygpt.data.chat.rules import BadRow, check_row, escape, select_turns
from buddygpt.data.chat.schemas import SCHEMAS, recognize


def moss_turn(question: str, answer: str, commands: str = "None") -> dict:
    return {
        "Human": f"<|Human|>: {question}<eoh>\n",
        "Inner Thoughts": "<|Inner Thoughts|>: one<eot>\n",
        "Commands": f"<|Commands|>: {commands}<eoc>\n",
        "Tool Responses": "<|Results|>: None<eor>\n",
        "MOSS": f"<|MOSS|>: {answer}<eom>\n",
    }


THOUGHTFUL = {"messages": [USER, {"role": "assistant", "content": "<think>\nr\n</think>\n\na"}]}
CALLED = {"messages": [*TOOL_ROW["messages"][:2]], "tools": [TOOL]}  # a question and a call
PARALLEL = {
    "messages": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        ASSISTANT,
    ],
    "tools": [TOOL],
}
BARE_CALL = json.dumps(CALL["function"])
HERMES = (
    "s You are provided with function signatures within <tools></tools> XML tags. <tools>\n"
    + json.dumps([TOOL])
    + '\n</tools> Return <tool_call>\n{"arguments": <args-dict>, "name": <function-name>}\n</tool_call>'
)
TOOLACE = "s\nHere is a list of functions in JSON format that you can invoke:\n%s.\nPut it in the format of [f(x=1)]"
OPEN_THOUGHTS = "<|begin_of_thought|>\n\nr\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\na\n\n<|end_of_solution|>"


# Schema -> the columns of the question and the answer.
ONE_EXCHANGE = [
    ("prompt_response", "prompt", "response"),
    ("prompt_output", "prompt", "output"),
    ("prompt_completion", "prompt", "completion"),
    ("instruction_answer", "instruction", "answer"),
    ("question_answer", "question", "answer"),
    ("question_output", "question", "output"),
    ("inputs_targets", "inputs", "targets"),
    ("user_assistant", "user", "assistant"),
    ("generated_solution", "problem", "generated_solution"),
]
# Schema -> the columns of the question, the better and the worse answer.
TWO_ANSWERS = [
    ("preference", "prompt", "chosen", "rejected"),
    ("prompt_reject", "prompt", "chosen", "reject"),
    ("input_preference", "input", "chosen", "rejected"),
    ("chosen_response", "prompt", "chosen_response", "rejected_response"),
    ("cvalues", "prompt", "pos_resp", "neg_resp"),
    ("stack_exchange", "question", "response_j", "response_k"),
]


def ids(*values: str) -> list[dict]:
    return [CALL | {"id": value} for value in values]


CASES = [
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, ANSWER),
    (
        "alpaca",
        {"instruction": "i", "input": "j", "output": "a", "history": [["q", "b"]], "system": "s"},
        {"messages": [SYSTEM, USER, REJECTED, {"role": "user", "content": "i\nj"}, ASSISTANT]},
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1, "y": null}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": '[{"name": "f", "parameters": {}}]',
        },
        TOOL_ROW,
    ),
    ("sharegpt", {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ANSWER),
    (  # minimind-3: everything is a string, the tools are in the system turn
        "sharegpt",
        {
            "conversations": [
                {"role": "system", "content": "", "tools": json.dumps([TOOL]), "reasoning_content": ""},
                {"role": "user", "content": "q", "tool_calls": ""},
                {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "a", "tool_calls": ""},
            ]
        },
        TOOL_ROW,
    ),
    (
        "sharegpt",
        {"conversations": [USER, ASSISTANT | {"reasoning_content": "r"}], "id": 3, "label": {"x": []}, "reward": 1.5},
        THOUGHTFUL,
    ),
    (  # LLaMA-Factory: several calls at once
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps([{"name": "f", "arguments": {"x": 1, "y": None}}] * 2)},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
                {"role": "tool", "content": "1"},
                ASSISTANT,
            ]
        },
    ),
    ("q_a", {"q": "q", "a": "a", "history": []}, ANSWER),
    (
        "seed_tasks",
        {"instruction": "q", "instances": [{"input": "", "output": "a"}], "is_classification": False},
        ANSWER,
    ),
    (
        "moss",
        {
            "meta_instruction": "s",
            "chat": {
                "turn_10": moss_turn("r", "a"),
                "turn_9": moss_turn("q", "b"),
            },
        },
        FOLLOW_UP,
    ),
    ("messages_label", {"messages": [USER, ASSISTANT], "label": False}, LABELED),
    ("sharegpt_label", {"conversations": [USER, ASSISTANT], "label": False}, LABELED),
    ("kto", {"prompt": "q", "completion": "a", "label": False}, LABELED),
    ("kto", LABELED, LABELED),
    ("kto", {"prompt": "q", "completion": "a", "label": "False"}, LABELED),  # as a .csv file has it
    ("messages_label", {"messages": [USER, ASSISTANT], "label": 0}, LABELED),
    # Columns that differ by name only.
    *((name, {question: "q", answer: "a", "id": 1}, ANSWER) for name, question, answer in ONE_EXCHANGE),
    *((name, {question: "q", chosen: "a", rejected: "b"}, PAIR) for name, question, chosen, rejected in TWO_ANSWERS),
    *(
        ("question_answer", {"question": "q", key: "r", "answer": "a"}, THOUGHTFUL)
        for key in ("reasoning", "rationale", "thinking_process", "thought_process", "reasoning_trace")
    ),
    *(
        ("messages", {"messages": [USER, {"role": "assistant", "content": content}]}, THOUGHTFUL)
        for content in (
            "<thinking>r</thinking>a",
            "<Thought>r</Thought><output>a</output>",
            "<think>r</think><answer>a</answer>",  # AM-DeepSeek-R1-Distilled
            "[THINK]r[/THINK]a",
            "◁think▷r◁/think▷a",
            OPEN_THOUGHTS,
        )
    ),
    *(
        (name, {name_of_turns: [{question: "q", answer: "a"}]}, ANSWER)
        for name, name_of_turns, question, answer in (
            ("human_assistant", "conversation", "human", "assistant"),
            ("human_assistant", "conversation", "input", "output"),  # Capybara
            ("sharegpt", "conversations", "question", "answer"),
            ("human_assistant", "conversation", "user", "assistant"),
        )
    ),
    (
        "alpaca",  # BELLE
        {"instruction": "Human:q\nAssistant:b\nHuman:r\nAssistant:", "input": "", "output": "a", "system": "s"},
        {"messages": [*FOLLOW_UP["messages"][:2], REJECTED | {"weight": 0}, *FOLLOW_UP["messages"][3:]]},
    ),
    (
        "human_assistant",  # XTuner
        {
            "conversation": [
                {"system": "s", "input": "q", "output": "b", "output_with_loss": False},
                {"input": "r", "output": "a", "output_with_loss": True},
            ]
        },
        {"messages": [*FOLLOW_UP["messages"][:2], REJECTED | {"weight": 0}, *FOLLOW_UP["messages"][3:]]},
    ),
    (
        "glaive",
        {
            "system": "SYSTEM: s with access to the following functions. Use them if required -\n"
            + json.dumps(TOOL["function"], indent=4)
            + "\n",
            "chat": "USER: q\n\n\nASSISTANT: <functioncall> "
            """{"name": "f", "arguments": '{"x": 1, "y": null}'} <|endoftext|>\n\n\n"""
            "FUNCTION RESPONSE: 1\n\n\nASSISTANT: a <|endoftext|>\n\n\n",
        },
        TOOL_ROW | {"messages": [SYSTEM | {"content": "s."}, *TOOL_ROW["messages"]]},
    ),
    ("helpsteer2", {"prompt": "q", "response_1": "b", "response_2": "a", "preference_strength": 2}, PAIR),
    ("helpsteer3", {"context": [USER], "response1": "a", "response2": "b", "overall_preference": -1}, PAIR),
    ("instruction_preference", {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, PAIR),
    ("hc3", {"question": "q", "human_answers": ["b", "c"], "chatgpt_answers": ["a"]}, PAIR),
    ("dialogue_pair", {"chosen": [USER, ASSISTANT], "rejected": [USER, REJECTED]}, PAIR),
    ("preference", PAIR | {"tools": [TOOL]}, PAIR | {"tools": [TOOL]}),
    ("messages", {"messages": [SYSTEM, USER, ASSISTANT], "tools": None}, {"messages": [SYSTEM, USER, ASSISTANT]}),
    ("messages", TOOL_ROW, TOOL_ROW),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ]
        },
        ANSWER,
    ),
    ("input_target", {"kind": "NLI", "input": "q", "target": "a"}, ANSWER),
    ("preference", PAIR, PAIR),
    (
        "preference",
        {"prompt": "q", "chosen": [SYSTEM, USER, ASSISTANT], "rejected": [SYSTEM, USER, REJECTED], "messages": []},
        PAIR | {"prompt": [SYSTEM, USER]},
    ),
    (
        "sharegpt_preference",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        PAIR,
    ),
    ("preference", {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "a", "rejected": "b"}, PAIR),
    ("message_pair", {"chosen_messages": [USER, ASSISTANT], "rejected_messages": [USER, REJECTED]}, PAIR),
    ("dialogue_pair", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, PAIR),
    # One column for the question, one for the answer.
    ("instruction_response", {"instruction": "q", "context": "", "response": "a", "category": "closed_qa"}, ANSWER),
    (
        "instruction_response",
        {"instruction": "i", "context": "c", "response": "a"},
        {"messages": [{"role": "user", "content": "i\nc"}, ASSISTANT]},
    ),
    (
        "question_response",
        {"id": "cot.1", "system_prompt": "s", "question": "q", "response": "a"},
        {"messages": [SYSTEM, USER, ASSISTANT]},
    ),
    ("question_response", {"Question": "q", "Complex_CoT": "r", "Response": "a"}, THOUGHTFUL),
    ("query_response", {"query": "q", "response": "a", "type": "GSM_SV", "original_question": "o"}, ANSWER),
    ("query_response", {"system": "s", "query": "r", "response": "a", "history": [["q", "b"]]}, FOLLOW_UP),
    ("query_answer", {"query": "q", "answer": "a", "resource": "evol", "lang": "python"}, ANSWER),
    ("problem_solution", {"problem": "q", "solution": "a", "answer": "4"}, ANSWER),
    ("messages", {"problem": "p", "solution": "t", "messages": [USER, ASSISTANT]}, ANSWER),  # NuminaMath
    ("sharegpt", {"instruction": "i", "response": "r", "conversations": [USER, ASSISTANT]}, ANSWER),  # Magpie
    ("input_output", {"input": [USER], "output": "a", "reasoning": "on", "system_prompt": ""}, ANSWER),
    (
        "prompt_completion",
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        {"messages": [SYSTEM, USER, ASSISTANT]},
    ),
    (  # TRL: the loss is on the completion
        "prompt_completion",
        {"prompt": [SYSTEM, USER, REJECTED, USER | {"content": "r"}], "completion": [ASSISTANT]},
        {"messages": [*FOLLOW_UP["messages"][:2], REJECTED | {"weight": 0}, *FOLLOW_UP["messages"][3:]]},
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a", "label": 0}, ANSWER),
    ("alpaca", {"instruction": "q", "output": "a", "chosen": None, "rejected": None, "history": None}, ANSWER),
    # Lists of turns.
    ("data_list", {"id": "0", "data": ["q", "a"]}, ANSWER),
    ("data_list", {"data": ["问：q", "答：a"]}, ANSWER),
    ("moss_002", {"prefix": "", "plain_text": "[Human]: q<eoh> [MOSS]: a<eoa>", "num_turns": 1}, ANSWER),
    ("sharegpt", {"conversations": ["q", "a"], "source": "stackexchange"}, ANSWER),
    ("human_assistant", {"conversation": [USER | {"toxic": False}, ASSISTANT], "model": "m", "turn": 1}, ANSWER),
    ("huatuo_qa", {"questions": [["q", "p"]], "answers": ["a"]}, ANSWER),
    ("huatuo_qa", {"questions": ["q"], "answers": ["a"]}, ANSWER),
    (
        "oasst",
        {
            "message_tree_id": "t",
            "prompt": {
                "role": "prompter",
                "text": "q",
                "replies": [
                    {"role": "assistant", "text": "b", "rank": 1, "replies": []},
                    {
                        "role": "assistant",
                        "text": "a",
                        "rank": 0,
                        "replies": [{"role": "prompter", "text": "r", "replies": []}],
                    },
                ],
            },
        },
        ANSWER,
    ),
    # Thinking.
    ("alpaca", {"instruction": "q", "output": "a", "thinking": "r"}, THOUGHTFUL),
    ("alpaca", {"instruction": "q", "output": "<think>\nr\n</think>\n\na"}, THOUGHTFUL),
    ("r1_distill", {"input": "q", "reasoning_content": "r", "content": "a", "score": 10}, THOUGHTFUL),
    ("openthoughts", {"problem": "q", "deepseek_reasoning": "r", "deepseek_solution": "a"}, THOUGHTFUL),
    (
        "s1k",
        {"question": "q", "solution": "s", "cot": None, "thinking_trajectories": ["r"], "attempt": "a"},
        THOUGHTFUL,
    ),
    ("s1k_1.1", {"question": "q", "deepseek_thinking_trajectory": "r", "deepseek_attempt": "a"}, THOUGHTFUL),
    (
        "sharegpt",
        {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": OPEN_THOUGHTS}]},
        THOUGHTFUL,
    ),
    ("messages", {"messages": [USER, ASSISTANT | {"thinking": "r"}]}, THOUGHTFUL),  # gpt-oss
    ("messages", {"messages": [USER, {"role": "reasoning", "content": "r"}, ASSISTANT]}, THOUGHTFUL),
    (
        "messages",
        {"messages": [USER, {"role": "thinking", "content": "r"}, {"role": "tool_call", "content": BARE_CALL}]},
        {"messages": [USER, {"role": "assistant", "content": "<think>\nr\n</think>\n\n", "tool_calls": [CALL]}]},
    ),
    (  # LLaMA-Factory
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "q"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "r"}, {"type": "text", "value": "a"}],
                },
            ]
        },
        THOUGHTFUL,
    ),
    # Tools.
    (
        "messages",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "tool_call", "value": BARE_CALL}]},
                {"role": "tool", "content": [{"type": "tool_result", "value": "1"}]},
                ASSISTANT,
            ],
            "tools": json.dumps([TOOL]),
        },
        TOOL_ROW,
    ),
    (  # swift
        "messages",
        {
            "tools": json.dumps([TOOL]),
            "messages": [
                USER,
                {"role": "tool_call", "content": BARE_CALL},
                {"role": "tool_call", "content": BARE_CALL},
                {"role": "tool_response", "content": "1"},
                {"role": "tool_response", "content": "2"},
                ASSISTANT,
            ],
        },
        PARALLEL,
    ),
    (  # OpenAI
        "messages",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": ids("c", "d")},
                {"role": "tool", "tool_call_id": "d", "content": "2"},
                {"role": "tool", "tool_call_id": "c", "content": "1"},
                ASSISTANT,
            ],
            "tools": [TOOL],
        },
        PARALLEL,
    ),
    (
        "messages",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "name": "f", "content": "1"},
                ASSISTANT,
            ],
            "functions": [TOOL["function"]],
        },
        TOOL_ROW,
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": HERMES},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "<tool_call>\n{'arguments': {'x': 1, 'y': None}, 'name': 'f'}\n</tool_call>"},
                {"from": "tool", "value": "<tool_response>\n1\n</tool_response>"},
                {"from": "gpt", "value": "a"},
            ],
        },
        TOOL_ROW | {"messages": [SYSTEM, *TOOL_ROW["messages"]]},
    ),
    (
        "sharegpt",
        {
            "system": TOOLACE % json.dumps([TOOL["function"] | {"name": "Market Trends API"}]),
            "conversations": [
                {"from": "user", "value": "q"},
                {"from": "assistant", "value": '[Market Trends API(x=[true, 2], y="f(1), g"), Market Trends API()]'},
                {"from": "tool", "value": "1"},
                {"from": "assistant", "value": "a"},
            ],
        },
        {
            "messages": [
                SYSTEM,
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": "Market Trends API", "arguments": {"x": [True, 2], "y": "f(1), g"}},
                        },
                        {"type": "function", "function": {"name": "Market Trends API", "arguments": {}}},
                    ],
                },
                {"role": "tool", "content": "1"},
                ASSISTANT,
            ],
            "tools": [{"type": "function", "function": {"name": "Market Trends API", "parameters": {}}}],
        },
    ),
    ("xlam", {"id": 0, "query": "q", "answers": f"[{BARE_CALL}]", "tools": json.dumps([TOOL["function"]])}, CALLED),
    # Labels and pairs.
    ("alpaca_label", {"instruction": "q", "input": "", "output": "a", "kto_tag": False}, LABELED),
    (
        "question_preference",
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        PAIR | {"prompt": [SYSTEM, USER]},
    ),
    ("query_preference", {"query": "q", "response": "a", "rejected_response": "b"}, PAIR),
    (
        "messages_preference",
        {"messages": [SYSTEM, USER, ASSISTANT], "rejected_response": "b"},
        PAIR | {"prompt": [SYSTEM, USER]},
    ),
    ("rejected_messages", {"messages": [USER, ASSISTANT], "rejected_messages": [USER, REJECTED]}, PAIR),
    (
        "openai_preference",
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [ASSISTANT],
            "non_preferred_output": [REJECTED],
        },
        PAIR,
    ),
    (
        "safe_rlhf",
        {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1, "safer_response_id": 0},
        PAIR,
    ),
    (
        "nectar",
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [{"answer": "c", "rank": 2.0}, {"answer": "b", "rank": 3.0}, {"answer": "a", "rank": 1.0}],
        },
        PAIR,
    ),
    (
        "ultrafeedback",
        {
            "instruction": "q",
            "completions": [
                {"response": "b", "fine-grained_score": 1.5, "overall_score": 10},
                {"response": "a", "fine-grained_score": 4.0, "overall_score": 7},
            ],
        },
        PAIR,
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_a_row_is_recognized_and_becomes_its_standard_form(name, row, expected):
    assert [schema.name for schema in recognize(row)] == [name]
    assert [schema.name for schema in recognize(row, SCHEMAS[name].kind)] == [name]
    assert convert(row, SCHEMAS[name]) == ([expected], 0)


def test_every_schema_has_a_case():
    assert {name for name, _, _ in CASES} == set(SCHEMAS) - {"oasst_message"}, "whose rows are joined: test_trees.py"


def test_a_quoted_call_stays_a_text():
    quoted = "<tool_call>%s</tool_call>"
    for tools, name in (([TOOL], "g"), (None, "f")):
        content = quoted % json.dumps({"name": name, "arguments": {}})
        row = {"messages": [USER, {"role": "assistant", "content": content}], "tools": tools}
        (standard,), escaped = convert(row, SCHEMAS["messages"])
        assert escaped == 2 and "tool_calls" not in standard["messages"][1]


@pytest.mark.parametrize(
    ("schema", "row", "reason"),
    [
        ("messages", {"messages": []}, "no messages"),
        ("messages", {"messages": [USER, ASSISTANT], "images": ["a.jpg"]}, r"needs a picture, .*\(`images`\)"),
        ("messages", {"messages": [USER | {"content": [{"type": "image_url"}]}, ASSISTANT]}, "needs a picture"),
        ("question_answer", {"question": "q", "answer": "a", "image": {"bytes": b"x"}}, "needs a picture"),
        ("messages", {"messages": [USER, ASSISTANT | {"content": "", "thinking": "r"}]}, r"turn 2 .* is empty"),
        ("alpaca", {"instruction": "q", "output": None}, "no key output"),
        ("sharegpt", {"conversations": ["q", "a", "r"]}, "the last turn is `user`"),
        ("moss_002", {"plain_text": "[Human]: q<eoh> [MOSS]: a"}, "has no turns such as"),
        ("data_list", {"data": [{"x": 1}]}, "data is not a list of texts"),
        ("huatuo_qa", {"questions": ["q"], "answers": []}, "does not have the types"),
        ("nectar", {"prompt": "q", "answers": [{"answer": "a", "rank": 1}]}, "no two answers of different scores"),
        (
            "safe_rlhf",
            {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": -1},
            "neither 0 nor",
        ),
        ("question_answer", {"question": "q", "choices": ["a", "b"], "answer": "B"}, r"options \(choices\)"),
        ("question_answer", {"question": "q", "A": "x", "B": "y", "answer": "A"}, r"options \(a, b\)"),
        ("prompt_response", {"prompt": "q", "response": "a", "is_safe": False}, "judged unsafe"),
        (
            "helpsteer3",
            {"context": "q", "response1": "a", "response2": "b", "overall_preference": 0},
            "neither answer",
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": HERMES},
                    USER,
                    ASSISTANT | {"content": "<tool_call>f</tool_call>"},
                ]
            },
            "a tool call is not",
        ),
        ("sharegpt", {"system": TOOLACE % json.dumps([TOOL["function"]]), "conversations": ["q", "[f(x=y)]"]}, "NAME"),
        ("messages", {"messages": [USER]}, "the last turn is `user`"),
        ("messages", {"messages": [ASSISTANT, USER, ASSISTANT]}, "turn 1 is `assistant` after `start`"),
        ("messages", {"messages": [USER, USER, ASSISTANT]}, "turn 2 is `user` after `user`"),
        ("messages", {"messages": [USER, SYSTEM, ASSISTANT]}, "turn 2 is `system` after `user`"),
        ("messages", {"messages": [USER, ASSISTANT, {"role": "tool", "content": "1"}]}, "`tool` after `assistant`"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": " \n"}]}, r"turn 2 \(assistant\) is empty"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": "\u200b\ufeff"}]}, "turn 2 .* is empty"),
        ("messages", {"messages": [USER, {"role": "robot", "content": "a"}]}, "unknown role 'robot'"),
        ("messages", {"messages": [USER, ASSISTANT | {"content": "\x00"}]}, "NUL"),
        ("messages", {"messages": [USER, ASSISTANT | {"content": "a" * 1_100_000}]}, "more than 1,000,000 characters"),
        ("moss", {"chat": {"turn_1": moss_turn("q", "a", 'Search("x")')}}, "commands plugins"),
        ("seed_tasks", {"instruction": "q", "instances": []}, "no instances"),
        ("hc3", {"question": "q", "human_answers": [], "chatgpt_answers": ["a"]}, "one side has no answers"),
        ("kto", LABELED | {"label": "good"}, "label is neither true nor false"),
        ("dialogue_pair", {"chosen": "a", "rejected": "b"}, "no turn that opens"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "content is neither a string"),
        ("messages", {"messages": [USER, "a"]}, "a turn is not an object"),
        ("messages", {"messages": [USER, ASSISTANT], "label": True}, "kto"),
        ("messages", {"messages": [USER, ASSISTANT], "label": 0}, "kto"),
        ("sharegpt", {"conversations": [USER, ASSISTANT], "label": True}, "kto"),
        ("messages", {"messages": [USER, ASSISTANT], "tools": "[{"}, "tools is not valid JSON"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(1)"}]}, "a tool call is not"),
        ("alpaca", {}, "the row is empty"),
        ("alpaca", {"instruction": "q"}, "no key output"),
        ("alpaca", {"instruction": "q", "input": 3, "output": "a"}, "instruction or input is not a string"),
        ("alpaca", {"instruction": "q", "output": "a", "label": True}, "kto"),
        ("alpaca", {"instruction": "q", "output": "a", "kto_tag": False}, "kto"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [USER]}, "history is not a list of"),
        ("alpaca", {"instruction": "q", "output": "a", "history": ["你好"]}, "history is not a list of"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, "history is not a list of"),
        ("alpaca", {"instruction": "q", "output": 3}, "turn 2 is not a string"),
        ("alpaca", {"instruction": "q", "output": "a\ud800"}, "surrogate"),
        ("human_assistant", {"conversation": ["q", {"human": "q", "assistant": "a"}]}, "a turn is not an object"),
        ("human_assistant", {"conversation": [{"human": "q"}]}, "a turn is not an object"),
        ("moss", {"chat": {"turn_1": "q"}}, "does not have the types"),
        ("preference", PAIR | {"rejected": [ASSISTANT]}, "chosen equals rejected"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": ""}, "turn 2 .* is empty"),
        ("preference", {"prompt": "x", "chosen": [USER, ASSISTANT], "rejected": [USER, REJECTED]}, "not begin with"),
        ("message_pair", {"chosen_messages": [USER, ASSISTANT], "rejected_messages": [REJECTED]}, "differ before"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(schema, row, reason):
    with pytest.raises(BadRow, match=reason):
        convert(row, SCHEMAS[schema])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of 300 entries, made by the project's script."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("你好，世界。hello world\n" * 50, encoding="utf-8")
    arguments = ["--files", folder / "a.txt", "--vocab_size", 300, "--output", folder / "out"]
    conftest.run("tokenizer/train_tokenizer.py", *arguments)
    return AutoTokenizer.from_pretrained(folder / "out")


def test_no_text_puts_a_special_token_of_ours_into_the_prompt(tokenizer):
    tokens = list(tokenizer.get_added_vocab())
    hostile = "".join(tokens) + "<<|im_end|>|im_end|>" + "<tool_<tool_call>call>"
    call = {"type": "function", "function": {"name": hostile, "arguments": {hostile: [hostile]}}}
    messages = [
        {"role": "user", "content": hostile},
        {"role": "assistant", "content": hostile, "tool_calls": [call]},
        {"role": "tool", "content": hostile},
        {"role": "assistant", "content": hostile},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": hostile}}]

    def count(row):
        ids = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], return_dict=True)["input_ids"]
        return {token: ids.count(tokenizer.convert_tokens_to_ids(token)) for token in tokens}

    (row,), escaped = convert({"messages": messages, "tools": tools}, SCHEMAS["messages"])
    harmless = json.loads(json.dumps({"messages": messages, "tools": tools}).replace(json.dumps(hostile)[1:-1], "x"))
    assert escaped and count(row) == count(harmless)
    for token in tokens:
        assert escape({"x": token})[1] == 1
        with pytest.raises(BadRow, match="special token"):
            check_row({"messages": [USER, ASSISTANT | {"content": token}]}, "sft")


@pytest.mark.parametrize(
    ("token", "escaped"),
    [
        ("<|eot_id|>", "<| eot_id |>"),
        ("<|im-end|>", "<| im-end |>"),
        ("<｜begin▁of▁sentence｜>", "<｜ begin▁of▁sentence ｜>"),
        ("</tool_response>", "< /tool_response >"),
        ("[INST]", "[ INST ]"),
        ("</s>", "< /s >"),
        ("<\u200b|im_end|>", "<\u200b|im_end|>"),
        ("<|im_\u200bend|>", "<| im_\u200bend |>"),
        ("a <| b |> c || d |> e", "a <| b |> c || d |> e"),
    ],
)
def test_only_special_tokens_get_spaces_around_their_names(token, escaped):
    row = {"messages": [USER, ASSISTANT | {"content": f'"{token}\n'}]}
    assert escape(row, ("<s>", "</s>", "[INST]"))[0]["messages"][1]["content"] == f'"{escaped}\n'


def test_special_tokens_of_another_tokenizer_are_refused_by_name():
    with pytest.raises(BadRow, match="special token </s>"):
        check_row({"messages": [USER, ASSISTANT | {"content": "a</s>"}]}, "sft", ("<s>", "</s>"))


def test_exchanges_are_selected():
    first, last = FOLLOW_UP["messages"][1:3], FOLLOW_UP["messages"][3:]
    assert select_turns(FOLLOW_UP, "all") == FOLLOW_UP
    assert select_turns(FOLLOW_UP, "single") is None and select_turns(ANSWER, "single") == ANSWER
    assert select_turns(FOLLOW_UP, "first") == {"messages": [SYSTEM, *first]}
    assert select_turns(FOLLOW_UP, "last") == {"messages": [SYSTEM, *last]}
    assert select_turns(TOOL_ROW, "last") == TOOL_ROW, "a tool result does not start an exchange"
