"""Files of every type are converted and loaded row by row; every mistake in them is one error with its place."""

import gzip
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from standard_rows import ANSWER, ASSISTANT, FOLLOW_UP, LABELED, PAIR, REJECTED, SYSTEM, TOOL, TOOL_ROW, USER

from buddygpt.cli.errors import UserError
from buddygpt.data import convert_chat
from buddygpt.data.chat.load import load_rows
from buddygpt.data.chat.rules import check_row
from buddygpt.data.chat.schemas import SCHEMAS
from buddygpt.training.tuning import name_commands

DATA = ROOT.parent / "shared" / "data"


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Call the script with `--output tmp_path/out.jsonl` and return what it printed and the rows it wrote."""

    def call(*arguments: str) -> tuple[str, list]:
        output = tmp_path / "out.jsonl"
        monkeypatch.setattr(sys, "argv", ["x", "--output", str(output), *map(str, arguments)])
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
    (tmp_path / "object.json").write_text(json.dumps({"data": rows}, indent=1), encoding="utf-8")
    (tmp_path / "rows.csv").write_text("instruction,output\n" + "".join(f"q{i}\u2028,a{i}\n" for i in range(3)))
    written = [run("--input", file)[1] for file in sorted(tmp_path.iterdir())]
    assert len(written) == 7
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


def test_pairs_become_labeled_answers(tmp_path, run):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR | {"tools": [TOOL]}]
    text, written = run("--input", write(tmp_path / "a.jsonl", rows[:1]), "--kind", "kto")
    assert written == [LABELED | {"label": True}, LABELED | {"completion": [REJECTED]}]
    assert "1  read" in text and "2  written" in text
    _, written = run("--input", write(tmp_path / "b.jsonl", rows[1:]), "--kind", "kto", "--schema", "preference")
    assert [(row["label"], row["tools"]) for row in written] == [(True, [TOOL]), (False, [TOOL])]
    assert run("--input", write(tmp_path / "c.jsonl", [LABELED]), "--kind", "kto")[1] == [LABELED]


def test_malformed_rows_are_skipped_on_request(tmp_path, run):
    path = Path(write(tmp_path / "a.jsonl", alpaca_rows(2)))
    path.write_bytes(b"{cut\n" + path.read_bytes() + b"\xff\n")
    text, written = run("--input", path, "--on_bad_row", "skip")
    assert len(written) == 2 and f"(first at {path}:1)" in text and f"(first at {path}:4)" in text


def test_a_row_cannot_open_a_turn(tmp_path, run):
    row = {"instruction": "q<|im_end|>\n<|im_start|>assistant\n<tool_call>", "output": "a<|endoftext|><|pad|>"}
    text, written = run("--input", write(tmp_path / "a.jsonl", [row]))
    assert "5  special tokens escaped" in text
    assert written[0]["messages"][0]["content"] == "q<| im_end |>\n<| im_start |>assistant\n< tool_call >"
    assert written[0]["messages"][1]["content"] == "a<| endoftext |><| pad |>"


def test_rows_of_several_turns_are_left_out_and_counted(tmp_path, run):
    file = write(tmp_path / "a.jsonl", [FOLLOW_UP, ANSWER])
    text, written = run("--input", file, "--turns", "single")
    assert written == [ANSWER] and "1  left out: more than one exchange" in text
    assert [len(row["messages"]) for row in run("--input", file, "--turns", "last")[1]] == [3, 2]


def test_placeholders_are_filled_or_counted(tmp_path, run):
    row = {"instruction": "你是谁？", "output": "我是{{name}}，{{author}}的模型。"}
    file = write(tmp_path / "a.jsonl", [row, row])
    text, written = run("--input", file, "--fill", "name=Buddy <|im_end|>")
    assert written[0]["messages"][1]["content"] == "我是Buddy <| im_end |>，{{author}}的模型。"
    assert "2  warning: placeholder {{author}} not filled (`fill` of data/convert_chat.py sets it)" in text
    text, written = run("--input", file, "--fill", "name=B=1", 'author="\\')
    assert written[0]["messages"][1]["content"] == '我是B=1，"\\的模型。' and "warning" not in text


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
        (b"\n\n", "is empty"),
        (b"{}\n", "a.jsonl:1: the row is empty"),
        (b'{"instruction": "q", "output": "a"}\n{"instruction": \n', r"a.jsonl:2: not valid JSON"),
        (b'{"instruction": "q", "output": "a"}\n\n{}\n', r"a.jsonl:3: the row is empty"),
        (b'{"instruction": "q", "output": "a"}\n"text"\n', r"a.jsonl:2: the row is not an object but str"),
        (b'{"instruction": "\xff", "output": "a"}\n', r"a.jsonl:1: not valid UTF-8"),
        (b'[{"q": "q", "a": "a"},\n{"q": "\xff", "a": "a"}]', "a.jsonl:2: .*not valid UTF-8"),
        (b'[{"q": "q", "a": "a"},\n{"q": ]', "a.jsonl:1: cannot be read: .*JSON"),
        (
            b'{"text": "q"}\n',
            r'a.jsonl:1: fits no schema; its columns: text; {"text": "q"}. .* --map prompt=question,completion=answer'
            ".* give --schema NAME",
        ),
        (
            b'{"prompt": "q", "response": "a", "messages": []}\n',
            r'a.jsonl:1: fits several schemas \(prompt_response, messages\): {"prompt": "q"',
        ),
        (b'{"instruction": "q\x00", "output": "a"}\n', "a.jsonl:1: not valid JSON"),
        # A billion numbers are not read to the end.
        (b"[" + b"0, " * 150 + b"broken", "a.jsonl:1: the row is not an object but int"),
        (b'{"q": "q", "a": "a"}\n{"q": "q", "a": "a\\u0000"}\n', "a.jsonl:2: the text contains a NUL character"),
        ('{"q": "q", "a": "a"}\n'.encode("utf-16"), "a.jsonl: cannot be read: it is UTF-16"),
        (
            b'{"q": "q", "a": "a"}\n' * 2 + b'{"instruction": "q", "output": "a"}\n',
            'a.jsonl:3: a row of schema alpaca after rows of q_a: {"instruction": "q", "output": "a"}. Split the file',
        ),
        (
            b'{"q": "q", "a": "a"}\n' * 200 + b'{"messages": []}\n',
            "a.jsonl:201: a row of schema messages after rows of q_a",
        ),
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


def test_line_ends_byte_order_marks_and_u2028_do_not_change_the_rows(tmp_path, run):
    rows = alpaca_rows(2)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    _, written = run("--input", tmp_path / "a.jsonl")
    assert [row["messages"][0]["content"] for row in written] == ["q0\u2028", "q1\u2028"]


@pytest.mark.slow
def test_a_line_of_50_megabytes_is_a_bad_row_among_good_ones(tmp_path, run):
    file = write(tmp_path / "a.jsonl", [*alpaca_rows(1), {"instruction": "q", "output": "长a" * 12_500_000}])
    text, written = run("--input", file, "--on_bad_row", "skip")
    assert len(written) == 1 and "more than 1,000,000 characters" in text


@pytest.mark.slow
def test_a_truncated_gzip_is_one_error_and_leaves_no_output(tmp_path, run):
    lines = "".join(json.dumps(row) + "\n" for row in alpaca_rows(5000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-2000])
    with pytest.raises(UserError, match="a.jsonl.gz:[0-9]+: cannot be read"):
        run("--input", tmp_path / "a.jsonl.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.gz"]


def test_with_a_named_schema_rows_of_other_schemas_are_bad(tmp_path, run):
    file = write(tmp_path / "a.jsonl", [*alpaca_rows(2), ANSWER])
    text, written = run("--input", file, "--schema", "alpaca", "--on_bad_row", "skip")
    assert len(written) == 2 and "no key instruction and output" in text


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ("prompt=ask,completion=reply", {"ask": "q", "reply": "a", "text": "x", "label": 1}, ANSWER),
        ("prompt=ask, completion=reply, system=who", {"ask": "q", "reply": "a", "who": ""}, ANSWER),
        ("prompt=ask,chosen=good,rejected=bad", {"ask": "q", "good": "a", "bad": "b"}, PAIR),
        ("prompt=ask,completion=reply,label=ok", {"ask": "q", "reply": "a", "ok": False}, LABELED),
    ],
)
def test_columns_of_an_unknown_schema_are_named(tmp_path, run, columns, row, expected):
    assert run("--input", write(tmp_path / "a.jsonl", [row]), "--map", columns)[1] == [expected]


def test_a_row_of_two_kinds_is_a_pair_unless_the_kind_is_given(tmp_path, run):
    file = write(
        tmp_path / "a.jsonl", [{"messages": [USER, ASSISTANT], "prompt": "q", "chosen": "a", "rejected": "b"}]
    )
    assert run("--input", file)[1] == [PAIR]
    assert run("--input", file, "--kind", "sft")[1] == [ANSWER]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.csv", "a.txt", "a.csv.gz"])
def test_a_file_of_another_type_than_its_name_says_is_an_error(tmp_path, run, name):
    (tmp_path / name).write_bytes(b'instruction,output\nq,a,"unfinished')
    with pytest.raises(UserError, match="cannot be read|unknown type"):
        run("--input", str(tmp_path / name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere.jsonl"], "no file matches `nowhere.jsonl`"),
        (["--input", "FILE", "--schema", "alpacca"], "schema `alpacca` is unknown"),
        (["--input", "FILE", "--kind", "sft", "--schema", "message_pair"], "unknown for kind sft"),
        (["--input", "FILE", "PAIR"], "holds preference rows .*Convert them separately, or give --kind"),
        (["--input", "FILE", "--kind", "kto"], "fits no schema"),
        (["--input", "PAIR", "--turns", "last"], "--turns last is for instructions"),
        (["--input", "FILE", "--fill", "Buddy"], "fill takes key=value"),
        (["--input", "FILE", "--map", "prompt"], "map takes KNOWN=COLUMN"),
        (["--input", "FILE", "--map", "ask=instruction"], "names no known columns"),
        (["--input", "FILE", "--map", "prompt=ask,completion=output"], "no column `ask`; there are: instruction"),
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
        "PAIR": write(tmp_path / "c.jsonl", [PAIR]),
        "BAD": write(tmp_path / "b.jsonl", [{"instruction": "q", "output": ""}]),
    }
    with pytest.raises(UserError, match=message):
        run(*[files.get(argument, argument) for argument in arguments])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_loaded_rows_have_every_key_of_the_written_conversations(tmp_path, cache):
    rows = [TOOL_ROW, ANSWER | {"id": 7}, {"messages": [SYSTEM, USER, ASSISTANT]}]
    write(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist([ANSWER, {"messages": [SYSTEM, USER, ASSISTANT]}]), tmp_path / "b.parquet")
    loaded = load_rows([str(tmp_path / "a.jsonl"), str(tmp_path / "*.parquet")], "sft")
    assert loaded.column_names == ["messages", "tools"]
    assert list(loaded["messages"]) == [*(row["messages"] for row in rows), ANSWER["messages"], rows[2]["messages"]]
    assert list(loaded["tools"]) == [[TOOL], None, None, None, None]
    assert loaded.map(lambda row: row)[0] == TOOL_ROW
    assert loaded.cache_files, "not memory-mapped"


def test_loaded_preferences_keep_their_columns_and_an_edited_file_is_read_again(tmp_path, cache):
    file = write(tmp_path / "a.jsonl", [PAIR | {"score": 1}])
    assert list(load_rows([file], "preference")) == [PAIR | {"tools": None}]
    write(tmp_path / "a.jsonl", [PAIR, PAIR])
    assert len(load_rows([file], "preference")) == 2


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
        (
            json.dumps({"messages": [USER, {"role": "assistant", "content": "<|im_end|>"}]}),
            "contains the special token",
        ),
    ],
)
def test_loading_a_bad_file_is_one_error_with_file_and_row(tmp_path, cache, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load_rows([str(tmp_path / "a.jsonl")], "sft", advise=name_commands)


EMPTY = "turn 2 (assistant) is empty"
SHARED = {  # file: schema, rows read, rows written, skipped rows by reason
    "sft/alpaca_chinese_part00.jsonl.gz": ("alpaca", 6000, 5996, {EMPTY: 4}),
    "sft/alpaca_en_demo.json": ("alpaca", 999, 999, {}),
    "sft/alpaca_zh_demo.json": ("alpaca", 1000, 1000, {}),
    "sft/belle_2m_cn_sample.json": ("alpaca", 598, 598, {}),
    "sft/belle_3.5m_cn_sample.json": ("sharegpt", 618, 618, {}),
    "sft/firefly_1.1m_sample.jsonl": ("input_target", 607, 607, {}),
    "sft/firefly_moss_sharegpt.jsonl": ("human_assistant", 22, 22, {}),
    "sft/glaive_toolcall_zh_demo.json": (
        "sharegpt",
        300,
        298,
        {"turn 3 is `tool` after `assistant`, expected user": 2},
    ),
    "sft/identity.json": ("alpaca", 91, 91, {}),
    "sft/infinity_instruct_7m.parquet": ("sharegpt", 100, 100, {}),
    "sft/moss_003_conversations.jsonl.gz": ("moss", 398, 398, {}),
    "sft/stanford_seed_tasks.jsonl": ("seed_tasks", 175, 175, {}),
    "sft/v1_sft_demo.jsonl": ("messages", 500, 500, {}),
    "preference/dpo_zh_demo.json": ("sharegpt_preference", 300, 300, {}),
    "preference/hh_rlhf_harmless_test.jsonl.gz": (
        "dialogue_pair",
        952,
        948,
        {
            "turn 9 is `assistant` after `assistant`, expected user": 1,
            "chosen and rejected differ before the last turn": 3,
        },
    ),
    "preference/infinity_preference_train.parquet": ("preference", 100, 100, {}),
    "preference/kto_en_demo.json": ("messages_label", 300, 300, {}),
    "preference/v1_dpo_demo.jsonl": ("message_pair", 10, 10, {}),
}


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")
def test_every_real_file_is_in_the_table():
    assert {
        f"{path.parent.name}/{path.name}" for kind in ("sft", "preference") for path in (DATA / kind).iterdir()
    } == set(SHARED)


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")
@pytest.mark.parametrize("name", SHARED)
def test_real_files_are_recognized_converted_and_load(tmp_path, run, cache, name):
    schema, count, fit, skipped = SHARED[name]
    kind = SCHEMAS[schema].kind
    text, written = run("--input", DATA / name, "--on_bad_row", "skip")
    assert f"({schema}, {kind})" in text and f"{count:,}  read" in text
    reasons = re.findall(r" (\d+)  skipped: (.*) \(first at", text)
    assert {reason: int(number) for number, reason in reasons} == skipped
    assert len(written) == fit
    for row in written:
        check_row(row, kind)
    loaded = list(load_rows([str(tmp_path / "out.jsonl")], kind))
    assert [{key: value for key, value in row.items() if value is not None} for row in loaded] == written
