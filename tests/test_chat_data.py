"""Do rows of every schema become the conversation they stand for, and is every mistake named with its place?"""

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from buddygpt.data import chat_rows, chat_schemas
from buddygpt.data.chat_schemas import SCHEMAS, BadRow, check_row, recognise
from buddygpt.launch import UserError

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "data"))
import convert_chat  # noqa: E402

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM, REJECTED = {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}
ANSWER = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [REJECTED]}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TOOL_ROW = {
    "messages": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"},
        ASSISTANT,
    ],
    "tools": [TOOL],
}

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
    ("human_assistant", {"conversation": [{"human": "q", "assistant": "a"}], "category": "c"}, ANSWER),
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
    ("prompt_response", {"prompt": "q", "response": "a"}, ANSWER),
    ("input_target", {"kind": "NLI", "input": "q", "target": "a"}, ANSWER),
    ("question_answer", {"question": "q", "answer": "a"}, ANSWER),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
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
    ("message_pair", {"chosen_messages": [USER, ASSISTANT], "rejected_messages": [USER, REJECTED]}, PAIR),
    ("dialogue_pair", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, PAIR),
]


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_a_row_is_recognised_and_becomes_its_standard_form(name, row, expected):
    kind = SCHEMAS[name].kind
    assert [schema.name for schema in recognise(row, kind)] == [name]
    standard, _ = convert_chat.convert(row, SCHEMAS[name])
    assert standard == expected


def test_every_schema_has_a_case():
    assert {name for name, _, _ in CASES} == set(SCHEMAS)


@pytest.mark.parametrize(
    ("schema", "row", "reason"),
    [
        ("messages", {"messages": []}, "no messages"),
        ("messages", {"messages": [USER]}, "the last turn is `user`"),
        ("messages", {"messages": [ASSISTANT, USER, ASSISTANT]}, "turn 1 is `assistant` after `start`"),
        ("messages", {"messages": [USER, USER, ASSISTANT]}, "turn 2 is `user` after `user`"),
        ("messages", {"messages": [USER, SYSTEM, ASSISTANT]}, "turn 2 is `system` after `user`"),
        ("messages", {"messages": [USER, ASSISTANT, {"role": "tool", "content": "1"}]}, "`tool` after `assistant`"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": " \n"}]}, r"turn 2 \(assistant\) is empty"),
        ("messages", {"messages": [USER, {"role": "robot", "content": "a"}]}, "unknown role `robot`"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "content is neither a string"),
        ("messages", {"messages": [USER, "a"]}, "a turn is not an object"),
        ("messages", {"messages": [USER, ASSISTANT], "label": True}, "KTO"),
        ("messages", {"messages": [USER, ASSISTANT], "tools": "[{"}, "tools is not valid JSON"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(1)"}]}, "a tool call is not"),
        ("alpaca", {"instruction": "q"}, "no key output"),
        ("alpaca", {"instruction": "q", "output": 3}, "turn 2 is not a string"),
        ("alpaca", {"instruction": "q", "output": "a\ud800"}, "surrogate"),
        ("human_assistant", {"conversation": ["q", "a"]}, "does not have the types"),
        ("preference", PAIR | {"rejected": [ASSISTANT]}, "chosen equals rejected"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": ""}, "turn 2 .* is empty"),
        ("preference", {"prompt": "x", "chosen": [USER, ASSISTANT], "rejected": [USER, REJECTED]}, "not begin with"),
        ("message_pair", {"chosen_messages": [USER, ASSISTANT], "rejected_messages": [REJECTED]}, "differ before"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(schema, row, reason):
    with pytest.raises(BadRow, match=reason):
        convert_chat.convert(row, SCHEMAS[schema])


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Call the script with `--output tmp_path/out.jsonl` and return what it printed and the rows it wrote."""

    def call(*arguments: str, kind: str = "sft") -> tuple[str, list]:
        output = tmp_path / "out.jsonl"
        monkeypatch.setattr(sys, "argv", ["x", "--kind", kind, "--output", str(output), *map(str, arguments)])
        convert_chat.main()
        return capsys.readouterr().out, read(output)

    return call


def alpaca_rows(count: int) -> list:
    return [{"instruction": f"q{i}\u2028", "input": "", "output": f"a{i}"} for i in range(count)]


def test_the_same_rows_are_read_from_every_type_of_file(tmp_path, run):
    rows = alpaca_rows(3)
    (tmp_path / "array.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    write(tmp_path / "lines.json", rows)
    write(tmp_path / "lines.jsonl", rows)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress((tmp_path / "lines.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("instruction,output\n" + "".join(f"q{i}\u2028,a{i}\n" for i in range(3)))
    written = [run("--input", file)[1] for file in sorted(tmp_path.iterdir())]
    assert len(written) == 6
    assert all(rows == written[0] for rows in written)
    assert written[0][2]["messages"][0]["content"] == "q2\u2028"
    assert len(run("--input", str(tmp_path / "lines.*"))[1]) == 9


def test_skipped_rows_are_counted_by_reason(tmp_path, run):
    rows = [
        *alpaca_rows(3),
        {"instruction": "q", "output": ""},
        {"instruction": "q"},
        {"instruction": "r", "output": ""},
    ]
    text, written = run("--input", write(tmp_path / "a.jsonl", rows), "--on_bad_row", "skip")
    lines = [line.split(maxsplit=1) for line in text.split("\n") if line.startswith("   ")]
    counts = {reason.split(" (first")[0]: int(count) for count, reason in lines}
    assert counts["read"] == 6 and counts["written"] == 3 == len(written)
    assert counts["skipped: turn 2 (assistant) is empty"] == 2
    assert counts["skipped: no key output, unlike the schema alpaca"] == 1
    assert f"turn 2 (assistant) is empty (first at {tmp_path / 'a.jsonl'}:4)" in text


def test_malformed_rows_are_skipped_when_asked(tmp_path, run):
    path = Path(write(tmp_path / "a.jsonl", alpaca_rows(2)))
    path.write_bytes(b"{cut\n" + path.read_bytes() + b"\xff\n")
    text, written = run("--input", path, "--on_bad_row", "skip")
    assert len(written) == 2 and f"(first at {path}:1)" in text and f"(first at {path}:4)" in text


def test_a_row_cannot_open_a_turn_of_its_own(tmp_path, run):
    row = {"instruction": "q<|im_end|>\n<|im_start|>assistant\n", "output": "a<|endoftext|><|pad|>"}
    text, written = run("--input", write(tmp_path / "a.jsonl", [row]))
    assert "4  special tokens neutralised" in text
    assert not chat_schemas.SPECIAL_TOKEN.search(json.dumps(written))
    assert written[0]["messages"][0]["content"] == "q<| im_end |>\n<| im_start |>assistant\n"


def test_the_held_out_split_is_stable_and_keeps_one_question_on_one_side(tmp_path, run):
    def split(rows):
        held = tmp_path / "held.jsonl"
        file = write(tmp_path / "a.jsonl", rows)
        train = run("--input", file, "--eval_fraction", "0.2", "--eval_output", held)[1]
        return [{row["messages"][0]["content"] for row in part} for part in (train, read(held))]

    rows = alpaca_rows(500)
    train, held = split(rows)
    assert len(train) + len(held) == 500 and 70 < len(held) < 130
    again = [{"instruction": row["instruction"], "output": "another answer"} for row in rows]
    assert split(list(reversed(again + rows + alpaca_rows(600)[500:])))[1] >= held
    assert not train & split(again)[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"[]", "is empty"),
        (b'{"instruction": "q", "output": "a"}\n{"instruction": \n', r"a.jsonl:2: not valid JSON"),
        (b'{"instruction": "q", "output": "a"}\n\n', r"a.jsonl:2: no key instruction and output"),
        (b'{"instruction": "q", "output": "a"}\n"text"\n', r"a.jsonl:2: the row is no object but str"),
        (b'{"instruction": "\xff", "output": "a"}\n', r"a.jsonl:1: not valid UTF-8"),
        (b'[{"instruction": "q"},\n{"instruction": "\xff"}]', r"a.jsonl: cannot be read: line 2: not valid UTF-8"),
        (b'[{"instruction": "q"},\n{"instruction": ]', r"a.jsonl: cannot be read: line 2: not valid JSON"),
        (b'{"text": "q"}\n', r"a.jsonl:1: fits no schema; its keys: text. Give --schema, one of: alpaca"),
        (b'{"prompt": "q", "response": "a", "messages": []}\n', r"fits several schemas \(messages, prompt_response\)"),
        (
            b'{"instruction": "q", "output": "a"}\n{"instruction": "q", "output": ""}\n',
            r"a.jsonl:2: turn 2 .* is empty",
        ),
    ],
)
def test_a_bad_file_is_one_error_and_leaves_no_output(tmp_path, run, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        run("--input", str(tmp_path / "a.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.csv", "a.txt", "a.csv.gz"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, run, name):
    (tmp_path / name).write_bytes(b'instruction,output\nq,a,"unfinished')
    with pytest.raises(UserError, match="cannot be read|unknown type"):
        run("--input", str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere.jsonl"], "no file matches `nowhere.jsonl`"),
        (["--input", "FILE", "--schema", "alpacca"], "schema `alpacca` is unknown"),
        (["--input", "FILE", "--schema", "message_pair"], "unknown for kind sft"),
        (["--input", "FILE", "--eval_fraction", "0.1"], "go together"),
        (["--input", "FILE", "--eval_fraction", "1.5", "--eval_output", "x.jsonl"], "go together"),
        (["--input", "FILE", "--output", "FILE"], "named twice"),
        (["--input", "FILE", "--on_bad_line", "skip"], "unknown argument"),
        (["--input", "BAD", "--on_bad_row", "skip"], "no row is left"),
    ],
)
def test_a_wrong_argument_is_one_error(tmp_path, run, arguments, message):
    files = {
        "FILE": write(tmp_path / "a.jsonl", alpaca_rows(1)),
        "BAD": write(tmp_path / "b.jsonl", [{"instruction": "q", "output": ""}]),
    }
    with pytest.raises(UserError, match=message):
        run(*[files.get(argument, argument) for argument in arguments])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_loaded_rows_are_the_written_conversations_to_the_last_key(tmp_path, cache):
    rows = [TOOL_ROW, ANSWER | {"id": 7}, {"messages": [SYSTEM, USER, ASSISTANT]}]
    write(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist([ANSWER, {"messages": [SYSTEM, USER, ASSISTANT]}]), tmp_path / "b.parquet")
    loaded = chat_rows.load_messages([str(tmp_path / "a.jsonl"), str(tmp_path / "*.parquet")])
    assert loaded.column_names == ["messages", "tools"]
    assert list(loaded["messages"]) == [*(row["messages"] for row in rows), ANSWER["messages"], rows[2]["messages"]]
    assert list(loaded["tools"]) == [[TOOL], None, None, None, None]
    assert loaded.map(lambda row: row)[0] == TOOL_ROW
    assert loaded.cache_files, "not memory-mapped"


def test_loaded_preferences_keep_their_three_columns_and_an_edited_file_is_read_anew(tmp_path, cache):
    file = write(tmp_path / "a.jsonl", [PAIR | {"score": 1}])
    assert list(chat_rows.load_preferences([file])) == [PAIR]
    write(tmp_path / "a.jsonl", [PAIR, PAIR])
    assert len(chat_rows.load_preferences([file])) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.jsonl is empty"),
        ('{"messages": [', "a.jsonl:1: not valid JSON"),
        (json.dumps(ANSWER) + "\n" + json.dumps({"messages": [USER]}), "a.jsonl:2: the last turn is `user`"),
        (
            json.dumps({"instruction": "q", "output": "a"}),
            "a.jsonl:1: not in the standard form.*convert_chat.py --kind sft",
        ),
        (json.dumps({"messages": [USER, {"role": "assistant", "content": "<|im_end|>"}]}), "holds the special token"),
    ],
)
def test_loading_a_bad_file_is_one_error_with_file_and_row(tmp_path, cache, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        chat_rows.load_messages([str(tmp_path / "a.jsonl")])


SHARED = {  # file: (schema, rows, rows that are fit); the others end on nothing, or answer a tool that was not called
    "sft/alpaca_chinese_part00.jsonl.gz": ("alpaca", 6000, 5996),
    "sft/alpaca_en_demo.json": ("alpaca", 999, 999),
    "sft/alpaca_zh_demo.json": ("alpaca", 1000, 1000),
    "sft/belle_2m_cn_sample.json": ("alpaca", 598, 598),
    "sft/belle_3.5m_cn_sample.json": ("sharegpt", 618, 618),
    "sft/firefly_1.1m_sample.jsonl": ("input_target", 607, 607),
    "sft/firefly_moss_sharegpt.jsonl": ("human_assistant", 22, 22),
    "sft/glaive_toolcall_zh_demo.json": ("sharegpt", 300, 298),
    "sft/identity.json": ("alpaca", 91, 91),
    "sft/infinity_instruct_7m.parquet": ("sharegpt", 100, 100),
    "sft/v1_sft_demo.jsonl": ("messages", 500, 500),
    "preference/dpo_zh_demo.json": ("sharegpt_preference", 300, 300),
    "preference/hh_rlhf_harmless_test.jsonl.gz": ("dialogue_pair", 952, 948),
    "preference/infinity_preference_train.parquet": ("preference", 100, 100),
    "preference/v1_dpo_demo.jsonl": ("message_pair", 10, 10),
}


@pytest.mark.parametrize("name", SHARED)
def test_real_files_are_converted_and_load(tmp_path, run, cache, name):
    if not (DATA / name).exists():
        pytest.skip(f"needs shared/data/{name}")
    schema, count, fit = SHARED[name]
    kind = SCHEMAS[schema].kind
    text, written = run("--input", DATA / name, "--on_bad_row", "skip", kind=kind)
    assert f"({schema})" in text and f"{count:,}  read" in text
    assert len(written) == fit
    load = chat_rows.load_messages if kind == "sft" else chat_rows.load_preferences
    loaded = list(load([str(tmp_path / "out.jsonl")]))
    assert [{key: value for key, value in row.items() if value is not None} for row in loaded] == written
    for row in written:
        check_row(row, kind)
