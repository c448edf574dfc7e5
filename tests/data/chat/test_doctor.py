"""The doctor finds what is wrong with data, names its place, and the recipes refuse the same rows."""

import gzip
import json
import os
import re
from pathlib import Path

import conftest
import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from buddygpt.cli.errors import UserError
from buddygpt.data import doctor as doctor_script
from buddygpt.data.chat import load
from buddygpt.data.chat.checker import CheckedRow
from buddygpt.data.chat.load import load_rows
from buddygpt.data.chat.report import format_examples, format_findings
from buddygpt.data.chat.tokens import tokenize
from buddygpt.model import BuddyGPTConfig, BuddyGPTForCausalLM
from buddygpt.training.tuning import name_commands

DATA = ROOT.parent / "shared" / "data"
ZH = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我是一个小模型。"}]
EN = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]
PAIR = {"prompt": ZH[:1], "chosen": ZH[1:], "rejected": [{"role": "assistant", "content": "走开。"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """The folder of a tokenizer of 300 entries, made by the project's script."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("你好，世界。hello world\n" * 50, encoding="utf-8")
    arguments = ["--files", folder / "a.txt", "--vocab_size", 300, "--output", folder / "out"]
    conftest.run("tokenizer/train_tokenizer.py", *arguments)
    return folder / "out"


@pytest.fixture
def doctor(capsys, monkeypatch):
    """Call the script; return its exit status and what it printed."""

    def call(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit:
            conftest.run("data/doctor.py", *arguments)
        return exit.value.code, capsys.readouterr().out

    monkeypatch.setenv("NO_COLOR", "1")
    return call


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def load_messages(files: list[str], **options):
    """Load instruction rows as sft/sft.py does."""
    return load_rows(files, "sft", advise=name_commands, **options)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_good_rows_are_fit_and_examples_of_both_languages_show_the_loss(tmp_path, doctor, tokenizer):
    file = write(tmp_path / "a.jsonl", [{"messages": ZH}, {"messages": EN}])
    status, text = doctor(file, "--tokenizer", tokenizer)
    assert status == 0 and text.endswith("verdict: fit\n")
    assert "schema messages, kind sft" in text and "2 read, 2 good, 0 bad" in text
    assert "zh 50.0%, en 50.0%, other 0.0%" in text and "duplicates   none" in text
    assert "<|im_start|>user\n你是谁？<|im_end|>\n<|im_start|>assistant\n⟦我是一个小模型。<|im_end|>⟧" in text
    assert "⟦A small model.<|im_end|>⟧" in text and "\x1b" not in text


def test_there_are_two_examples_even_if_all_rows_have_one_language(tmp_path, doctor, tokenizer):
    for rows in ([ZH] * 3, [EN] * 3, [[*ZH, *EN]] * 3, [ZH, [*ZH, *EN], ZH]):
        file = write(tmp_path / "a.jsonl", [{"messages": row} for row in rows])
        assert doctor(file, "--tokenizer", tokenizer)[1].count("\nexample ") == 2


def test_loss_is_colored_on_a_terminal_only(tmp_path, doctor, tokenizer, monkeypatch):
    file = write(tmp_path / "a.jsonl", [{"messages": ZH}])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "⟦" in doctor(file, "--tokenizer", tokenizer)[1], "NO_COLOR is set"
    monkeypatch.delenv("NO_COLOR")
    text = doctor(file, "--tokenizer", tokenizer)[1]
    assert "\x1b[32m我是一个小模型。<|im_end|>\x1b[0m" in text and "⟦" not in text


def test_lengths_truncation_and_loss_are_counted_in_tokens(tmp_path, doctor, tokenizer):
    rows = [{"messages": ZH}] * 3 + [{"messages": [*ZH, *EN]}]
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    lengths = [len(tokenize(row, "sft", loaded)[0].ids) for row in rows]
    limit = lengths[0] + 3
    kept = [tokenize(row, "sft", loaded)[0].loss[:limit] for row in rows]
    _, text = doctor(write(tmp_path / "a.jsonl", rows), "--tokenizer", tokenizer, "--max_length", limit)
    assert f"longest {lengths[3]:,}" in text
    truncation = f"max_length {limit} cuts 25.0% of the rows and {1 - sum(map(len, kept)) / sum(lengths):.1%} of"
    assert f"truncation   {truncation} their tokens" in text and f"verdict: fit, but {truncation} their tokens" in text
    share = sum(map(sum, kept)) / sum(map(len, kept))
    assert f"loss         {share:.1%} of the {sum(map(len, kept)):,} tokens kept" in text


def test_bad_rows_are_counted_by_reason_with_their_lines(tmp_path, doctor):
    rows = [{"instruction": f"q{number}", "output": "" if number % 3 == 1 else "a"} for number in range(24)]
    file = write(tmp_path / "a.jsonl", rows)
    file.write_bytes(file.read_bytes() + b"{cut\n\xff\n")
    status, text = doctor(file)
    assert status == 1
    assert re.search(rf" 8  turn 2 \(assistant\) is empty \(first {file}:2, 5, 8, 11, 14\)", text)
    assert f"{file}:25)" in text and f"{file}:26)" in text and "not valid UTF-8" in text
    assert text.endswith("verdict: not fit: 10 bad rows\n")


def test_copies_of_rows_and_of_questions_are_found_across_files(tmp_path, doctor):
    first = write(tmp_path / "a.jsonl", [{"q": "a?", "a": "b"}, {"q": "c?", "a": "d"}])
    second = write(tmp_path / "b.jsonl", [{"q": "a?", "a": "b"}, {"q": "c? ", "a": "e"}])
    _, text = doctor(first, second)
    assert f"duplicates   1 rows seen before ({second}:1)" in text
    assert f"duplicates   2 questions seen before ({second}:1, 2)" in text


def test_copies_are_told_by_what_a_reader_sees_and_by_calls(tmp_path, doctor):
    def called(city):
        call = {"type": "function", "function": {"name": "f", "arguments": {"city": city}}}
        return {"messages": [ZH[0], {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [call]}

    rows = [
        {"messages": ZH},
        {"messages": [ZH[0] | {"content": "你是\u200b谁？ \n"}, ZH[1]]},
        called("a"),
        called("b"),
    ]
    rows += [{"messages": [ZH[0], ZH[1] | {"content": "一\n二"}]}, {"messages": [ZH[0], ZH[1] | {"content": "一二"}]}]
    file = write(tmp_path / "a.jsonl", rows)
    assert f"duplicates   1 rows seen before ({file}:2)" in doctor(file)[1]


def test_blank_lines_and_null_cells_are_no_bad_rows(tmp_path, doctor):
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"q": "a", "a": "b", "chosen": null, "rejected": null}\n\n{"q": "c", "a": "d", "history": null}\n'
    )
    status, text = doctor(file)
    assert status == 0 and "schema q_a" in text and "2 read, 2 good, 0 bad" in text
    file.write_text('{"text": "a"}\n\n{"text": null}\n')
    status, text = doctor(file)
    assert status == 0 and "1 read, 1 good, 0 bad" in text and "1 empty documents" in text


def test_chats_are_not_taken_for_text(tmp_path, doctor):
    chats = [
        "### Human: q### Assistant: a",
        "<|im_start|>user\nq<|im_end|>",
        "<s>[INST] q [/INST] a</s>",
        "<|user|>\nq",
    ]
    file = write(tmp_path / "a.jsonl", [{"text": chat} for chat in [*chats, "USER: q\nASSISTANT: a"]])
    assert "5 documents that are chats in a template" in doctor(file, "--stage", "pretrain")[1]
    with pytest.raises(UserError, match="its texts are chats in a template, beginning '### Human"):
        doctor(file)
    file = write(tmp_path / "b.jsonl", [{"text": chats[0]}, {"text": "Human: a novel"}])
    assert "1 documents that are chats in a template" in doctor(file)[1]
    write(file, [{"title": "t", "content": "a", "Question": "q"}])
    with pytest.raises(UserError, match=r"`Question`, but fits no schema; .*--stage pretrain .*--map prompt=question"):
        conftest.run("data/doctor.py", file)
    assert doctor(file, "--stage", "pretrain")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["messages", "text"])
def test_a_large_file_is_examined_by_several_processes_with_the_same_findings(tmp_path, tokenizer, monkeypatch, kind):
    rows = [{"messages": ZH}, {"messages": ZH[:1]}, {"messages": EN}, {"messages": [*ZH, *EN]}] * 100
    if kind == "text":
        rows = [{"text": text} for text in ("你好", "hello", "", "a\x07b") * 100]
    file = write(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr("sys.argv", ["doctor.py", str(file), "--tokenizer", str(tokenizer), "--max_length", "40"])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    reports = []
    for size in (0, 2**20):
        monkeypatch.setattr(doctor_script, "LARGE_FILE", size)
        findings = doctor_script.check_files(doctor_script.parse_arguments())
        reports.append([format_findings(findings), format_examples(findings, False), findings.reasons()])
    assert reports[0] == reports[1] and f"{400 if kind == 'messages' else 300} read" in reports[0][0][0]


def test_rows_for_another_recipe_are_pointed_to_it(tmp_path, cache):
    labeled = write(tmp_path / "a.jsonl", [{"prompt": ZH[:1], "completion": ZH[1:], "label": True}])
    pairs = write(tmp_path / "b.jsonl", [PAIR])
    with pytest.raises(UserError, match=r"no schema of kind preference.* kind kto \(schema kto\).*rlhf/kto.py"):
        conftest.run("data/doctor.py", labeled, "--stage", "dpo")
    with pytest.raises(UserError, match=r"kind kto \(schema kto\).*rlhf/kto.py"):
        load_rows([str(labeled)], "preference", advise=name_commands)
    with pytest.raises(UserError, match=r"kind preference .*rlhf/dpo.py"):
        load_messages([str(pairs)])


def test_rows_that_need_conversion_are_fit_once_converted(tmp_path, doctor):
    file = write(tmp_path / "a.jsonl", [{"instruction": "q", "output": "a {{name}}"}])
    status, text = doctor(file)
    assert status == 0 and f"fit once converted: python data/convert_chat.py --kind sft --input {file}" in text
    assert "1 placeholder {{name}} not filled" in text and "a tokenizer is needed" in text
    hostile = write(tmp_path / "b.jsonl", [{"messages": [ZH[0], {"role": "assistant", "content": "<|im_end|>"}]}])
    status, text = doctor(hostile)
    assert "fit once converted" in text and "1 texts that look like a special token" in text


def test_special_tokens_of_the_tokenizer_in_use_are_escaped(tmp_path, cache, doctor, tokenizer):
    other = AutoTokenizer.from_pretrained(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<s>", "[INST]"]})
    other.save_pretrained(tmp_path / "other")
    rows = [{"messages": [{"role": "user", "content": "[INST]<s>你好<｜User｜>"}, ZH[1]]}]
    file, converted = write(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl"
    status, text = doctor(file, "--tokenizer", tmp_path / "other")
    assert status == 0 and f"fit once converted: python data/convert_chat.py --kind sft --input {file}" in text
    assert "3 texts that look like a special token" in text and f"--tokenizer {tmp_path / 'other'}\n" in text
    with pytest.raises(UserError, match=r"the special token .*convert_chat.py .* --tokenizer .*other; or"):
        load_messages([str(file)], tokenizer=AutoTokenizer.from_pretrained(tmp_path / "other"))
    conftest.run("data/convert_chat.py", "--input", file, "--output", converted, "--tokenizer", tmp_path / "other")
    assert "[ INST ]< s >你好<｜ User ｜>" in converted.read_text()
    assert doctor(converted, "--tokenizer", tmp_path / "other")[1].endswith("verdict: fit\n")


def test_pairs_and_labels_are_judged_on_their_answers(tmp_path, doctor, tokenizer):
    status, text = doctor(write(tmp_path / "a.jsonl", [PAIR]), "--tokenizer", tokenizer)
    assert status == 0 and "kind preference" in text
    assert "chosen, loss" in text and "⟦走开。<|im_end|>" in text
    labeled = {"messages": ZH, "label": True}
    status, text = doctor(write(tmp_path / "b.jsonl", [labeled]), "--tokenizer", tokenizer, "--stage", "kto")
    assert status == 0 and "⟦我是一个小模型。<|im_end|>" in text
    status, text = doctor(tmp_path / "b.jsonl", "--stage", "sft")
    assert status == 1 and "the answer is labeled good or bad (kto), so it is no instruction" in text


def test_a_template_without_marks_or_that_refuses_rows_is_found(tmp_path, cache, doctor, tokenizer):
    file = write(tmp_path / "a.jsonl", [{"messages": [{"role": "system", "content": "s"}, *ZH]}, {"messages": ZH}])
    other = AutoTokenizer.from_pretrained(tokenizer)
    other.chat_template = other.chat_template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    other.save_pretrained(tmp_path / "unmarked")
    with pytest.raises(UserError, match="no {% generation %} marks"):
        conftest.run("data/doctor.py", file, "--tokenizer", tmp_path / "unmarked")
    refusal = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{%- endif %}"
    other.chat_template = refusal + AutoTokenizer.from_pretrained(tokenizer).chat_template
    other.save_pretrained(tmp_path / "refusing")
    status, text = doctor(file, "--tokenizer", tmp_path / "refusing")
    assert status == 1 and f"the chat template refuses it: no system turns ({file}:1)" in text
    with pytest.raises(UserError, match=f"{file}:1: the chat template refuses it.*doctor.py"):
        load_messages([str(file)], tokenizer=AutoTokenizer.from_pretrained(tmp_path / "refusing"))


def test_text_of_the_data_cannot_control_the_terminal(tmp_path, doctor, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": "你好\x1b[2J\u202e"}, ZH[1]]},
        {"messages": [{"role": "\x1b[2J"}]},
    ]
    _, text = doctor(write(tmp_path / "a.jsonl", rows), "--tokenizer", tokenizer)
    assert "你好\\x1b[2J\\u202e" in text and "\x1b" not in text and "\u202e" not in text


def test_pretraining_text_is_recognized_and_checked(tmp_path, doctor, tokenizer):
    rows = [
        "一段干净的中文。",
        "A plain sentence.",
        "坏\ufffd字",
        "ä½\xa0å¥½ï¼Œä¸–ç•Œ",
        "一段干净的中文。",
        "a\x07b",
        " ",
    ]
    file = write(tmp_path / "a.jsonl", [{"text": row} for row in rows])
    status, text = doctor(file, "--tokenizer", tokenizer)
    assert status == 0 and f"1 rows seen before ({file}:5)" in text
    for warning in (
        "1 empty documents, which data/prepare_pretrain.py leaves out",
        "1 documents with U+FFFD",
        "1 documents in a wrong encoding",
        "documents with control characters",
    ):
        assert warning in text
    assert "truncation" not in text and "A plain sentence." in text
    (tmp_path / "b.txt").write_text("一段文字。")
    assert doctor(tmp_path / "b.txt")[0] == 0


def test_cached_rows_are_compared_with_benchmarks_that_have_changed(tmp_path, cache):
    question = "一辆货车每小时行驶六十公里，从甲地开到乙地用了三个半小时，两地相距多少公里？"
    file = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": question}, EN[1]]}])
    (tmp_path / "exam").mkdir()
    write(tmp_path / "exam" / "one.jsonl", [{"question": "一个完全不同的问题，说的是果园里有多少棵苹果树和梨树。"}])
    assert len(load_messages([str(file)], benchmarks=(str(tmp_path / "exam"),))) == 1
    write(tmp_path / "exam" / "two.jsonl", [{"question": question}])
    with pytest.raises(UserError, match="a.jsonl:1: contains an item of exam/two.jsonl"):
        load_messages([str(file)], benchmarks=(str(tmp_path / "exam"),))


def test_benchmark_items_in_the_rows_make_them_unfit_and_the_converter_leaves_them_out(tmp_path, cache, doctor):
    question = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?"
    )
    exam = tmp_path / "exam"
    exam.mkdir()
    write(exam / "test.jsonl", [{"question": question, "answer": "#### 72"}])
    file = write(
        tmp_path / "a.jsonl", [{"messages": EN}, {"messages": [{"role": "user", "content": question}, EN[1]]}]
    )
    status, text = doctor(file, "--exams", exam)
    assert status == 1 and f"{file}:2: " in text and "not fit: 1 rows contain benchmark items" in text
    assert doctor(write(tmp_path / "b.jsonl", [{"messages": EN}]), "--exams", exam)[0] == 0
    with pytest.raises(
        UserError, match=f"a.jsonl:2: contains an item of exam/test.jsonl. .*doctor.py .* --exams {exam}"
    ):
        load_messages([str(file)], benchmarks=(str(exam),))
    assert len(load_messages([str(file)], benchmarks=(str(exam),), force=True)) == 1
    left = tmp_path / "left.jsonl"
    conftest.run("data/convert_chat.py", "--input", file, "--output", left, "--exams", exam, "--on_bad_row", "skip")
    assert doctor(left, "--exams", exam)[0] == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        (
            "a.jsonl",
            b'{"q": "q", "a": "a"}\n{"messages": []}\n',
            "a.jsonl:2: a row of schema messages after rows of q_a",
        ),
        ("a.jsonl", b'{"question": "q", "answer": "a", "prompt": "", "response": ""}\n', "fits several schemas"),
        ("a.jsonl", b'{"title": "q"}\n', "fits no schema"),
        ("a.jsonl.gz", gzip.compress(b'{"q": "q", "a": "a"}\n' * 9, mtime=0)[:-9], "a.jsonl.gz.*: cannot be read"),
        ("manifest.json", b"{}", "folder of token shards. Run: python data/inspect_shards.py"),
    ],
)
def test_what_cannot_be_checked_is_one_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        conftest.run("data/doctor.py", tmp_path if name == "manifest.json" else tmp_path / name)


@pytest.mark.slow
def test_odd_bytes_and_a_long_line_are_bad_rows_or_harmless(tmp_path, doctor):
    lines = [
        b"\xef\xbb\xbf" + json.dumps({"q": "q", "a": "a\u2028b"}, ensure_ascii=False).encode() + b"\r",
        b'{"q": "q", "a": "a\x00"}',
        b'{"q": "q", "a": "a\\u0000"}',
        b'{"q": "q", "a": "' + b"a" * 50_000_000 + b'"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    status, text = doctor(tmp_path / "a.jsonl")
    assert status == 1 and "4 read, 1 good, 3 bad" in text
    assert "a NUL character" in text and "not valid JSON" in text and "more than 1,000,000 characters" in text


def test_two_kinds_of_rows_are_not_checked_together(tmp_path):
    files = write(tmp_path / "a.jsonl", [{"messages": ZH}]), write(tmp_path / "b.jsonl", [PAIR])
    with pytest.raises(UserError, match="rows of kind preference, not sft"):
        conftest.run("data/doctor.py", *files)


def test_a_recipe_refuses_what_the_doctor_rejects_unless_forced(tmp_path, cache, tokenizer, capsys):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    good = write(tmp_path / "a.jsonl", [{"messages": ZH}] * 3)
    bad = write(tmp_path / "b.jsonl", [{"messages": ZH}, {"messages": ZH[:1]}, {"messages": EN}])
    command = rf"python data/doctor.py {tmp_path}/.\.jsonl --stage sft"
    assert len(load_messages([str(good)], tokenizer=loaded, max_length=64)) == 3
    for length, reason in ((40, "every row is longer"), (5, "all rows have no answer within")):
        for force in (False, True)[: 1 + (length == 5)]:
            with pytest.raises(UserError, match=rf"{reason} .*{command} --tokenizer .* --max_length {length}\. Fix"):
                load_messages([str(good)], tokenizer=loaded, max_length=length, force=force)
    assert len(load_messages([str(good)], tokenizer=loaded, max_length=40, force=True)) == 3
    assert f"warning: {good}: not fit" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"b.jsonl:2: the last turn is `user`.*{command}.*--train_on_unfit_data"):
        load_messages([str(bad)], tokenizer=loaded, max_length=64)
    for _ in range(2):  # the second time from the cache
        rows = load_messages([str(bad)], tokenizer=loaded, max_length=64, force=True)
        assert [row["messages"] for row in rows] == [ZH, EN]
        assert f"1 of 3 rows are bad and left out, first {bad}:2: the last turn" in capsys.readouterr().out
    with pytest.raises(UserError, match="every row is bad"):
        load_messages([str(write(tmp_path / "c.jsonl", [{"messages": ZH[:1]}]))], force=True)


@pytest.mark.slow
def test_rows_whose_answer_is_cut_off_are_counted_and_left_out_or_refused(tmp_path, cache, doctor, tokenizer, capsys):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    question = {"role": "user", "content": "你好，世界。" * 20}
    pair = PAIR | {"prompt": [question]}
    for kind, short, long in (("sft", {"messages": ZH}, {"messages": [question, ZH[1]]}), ("preference", PAIR, pair)):
        stage = ["--stage", {"sft": "sft", "preference": "dpo"}[kind]]
        options = {"kind": kind, "tokenizer": loaded, "max_length": 64}
        some = [str(write(tmp_path / f"{kind}.jsonl", [short] * 10 + [long]))]
        rows = load_rows(some, **options)
        assert len(rows) == 10
        told = capsys.readouterr().out
        missing = {"sft": "no answer", "preference": "no two different answers"}[kind]
        assert f"1 of 11 rows have {missing} within max_length 64 and are left out" in told
        assert re.search(r"max_length 64 cuts 9\.1% of the rows and [\d.]+% of their tokens", told)
        status, text = doctor(*some, *stage, "--tokenizer", tokenizer, "--max_length", 64)
        assert status == 0 and f"1 rows have {missing} within max_length ({some[0]}:11)" in text
        assert re.search(r"verdict: fit, but max_length 64 cuts 9\.1% of the rows", text)
        # TRL's `truncation_mode: keep_end` keeps the answers.
        assert len(load_rows(some, **options, keep_end=True)) == 11

        most = [str(write(tmp_path / f"{kind}-most.jsonl", [short] * 4 + [long] * 6))]
        reason = f"60.0% of the rows have {missing} within max_length 64, more than 10%"
        with pytest.raises(UserError, match=f"not fit: {reason}"):
            load_rows(most, **options)
        assert len(load_rows(most, **options, force=True)) == 4
        status, text = doctor(*most, *stage, "--tokenizer", tokenizer, "--max_length", 64)
        assert status == 1 and text.endswith(f"verdict: not fit: {reason}\n")


def test_loaded_tokens_are_the_trainers_and_end_with_the_end_mark(tmp_path, cache, tokenizer):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    sft, dpo = write(tmp_path / "a.jsonl", [{"messages": [*ZH, *EN]}]), write(tmp_path / "b.jsonl", [PAIR])
    # A template that writes a line end after the mark, inside the marks of the loss, as Qwen's and Gemma's do.
    trailing = AutoTokenizer.from_pretrained(tokenizer)
    trailing.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    for each in (loaded, trailing):
        row = load_rows([str(sft)], "sft", tokenizer=each)[0]
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert each.decode(trained) == f"{ZH[1]['content']}<|im_end|>{EN[1]['content']}<|im_end|>"
        assert each.decode(row["input_ids"]).endswith("A small model.<|im_end|>")
        row = load_rows([str(dpo)], "preference", tokenizer=each)[0]
        assert each.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
        answers = each.decode(row["chosen_ids"]), each.decode(row["rejected_ids"])
        assert answers == (f"{ZH[1]['content']}<|im_end|>", "走开。<|im_end|>")


def test_rows_come_from_the_cache_only_if_content_and_rules_are_the_same(tmp_path, cache, monkeypatch):
    file = write(tmp_path / "a.jsonl", [{"messages": ZH}])
    time = file.stat().st_mtime_ns
    assert load_messages([str(file)])[0]["messages"] == ZH
    write(file, [{"messages": EN}])
    os.utime(file, ns=(time, time))  # as an editor or rsync may leave it
    assert load_messages([str(file)])[0]["messages"] == EN

    checked = []
    monkeypatch.setattr(load.RowChecker, "check", lambda *_, **__: checked.append(1) or CheckedRow())
    os.utime(file, ns=(time + 1, time + 1))
    load_messages([str(file)])
    assert not checked, "the content is the same"
    monkeypatch.setattr(load, "_hash_of_code", lambda: "other rules")
    load_messages([str(file)])
    assert checked


@pytest.mark.slow
def test_a_recipe_and_the_doctor_agree(tmp_path, cache, doctor, tokenizer):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rows = {"messages": [*ZH, *EN]}, {"messages": ZH}, {"messages": ZH[:1]}, {"messages": []}
    labeled, blank = {"messages": ZH, "label": 0}, {"messages": [ZH[0], ZH[1] | {"content": "\u200b"}]}
    for number, chosen in enumerate([rows[:1], rows[1:2], rows[:2], rows[:3], rows[3:], [labeled], [blank]]):
        file = write(tmp_path / f"{number}.jsonl", list(chosen))
        for length in (10, 40, 60, 200):
            status, text = doctor(file, "--stage", "sft", "--tokenizer", tokenizer, "--max_length", length)
            try:
                load_messages([str(file)], tokenizer=loaded, max_length=length)
                assert status == 0, text
            except UserError as error:
                assert status == 1, error


@pytest.mark.slow
def test_recipes_refuse_and_may_be_forced(tmp_path, cache, tokenizer, capsys):
    model, rows = tmp_path / "model", write(tmp_path / "a.jsonl", [{"messages": ZH}] * 4 + [{"messages": ZH[:1]}])
    pairs = write(tmp_path / "b.jsonl", [PAIR] * 4)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.save_pretrained(model)
    config = json.loads((ROOT / "model/configs/debug.json").read_text()) | {"vocab_size": len(loaded)}
    BuddyGPTForCausalLM(BuddyGPTConfig(**config)).save_pretrained(model)
    common = ["--model_name_or_path", model, "--output_dir", tmp_path / "out", "--max_steps", 1]
    sft = ["sft/sft.py", "--config", "sft/configs/debug.yaml", "--train_files", rows, "--eval_files", rows, *common]
    dpo = [
        "rlhf/dpo.py",
        "--config",
        "rlhf/configs/debug.yaml",
        "--train_files",
        pairs,
        "--eval_files",
        pairs,
        *common,
    ]
    with pytest.raises(UserError, match="a.jsonl:5: .*doctor.py .* --stage sft.*--train_on_unfit_data true"):
        conftest.run(*sft)
    with pytest.raises(UserError, match="b.jsonl: not fit: .*doctor.py .* --stage dpo .* --max_length 8"):
        conftest.run(*dpo, "--max_length", 8)
    for recipe in (sft, dpo):
        with pytest.raises(UserError, match="no file matches .*/exam"):
            conftest.run(*recipe, "--exams", tmp_path / "exam")
    assert not (tmp_path / "out").exists()
    conftest.run(*sft, "--train_on_unfit_data", "true")
    assert "1 of 5 rows are bad and left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]["train_on_unfit_data"] is True


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")
@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("sft/v1_sft_demo.jsonl", 0),
        ("sft/moss_003_conversations.jsonl.gz", 0),
        ("sft/glaive_toolcall_zh_demo.json", 1),
        ("preference/infinity_preference_train.parquet", 0),
        ("preference/kto_en_demo.json", 0),
        ("pretrain/wanjuan_zh_web_sample.jsonl.gz", 0),
        ("pretrain/zh_industrycorpus_sample.parquet", 0),
        ("pretrain/en_tinyshakespeare.txt", 0),
    ],
)
def test_real_files_get_a_verdict(doctor, tokenizer, name, status):
    found, text = doctor(DATA / name, "--tokenizer", tokenizer, "--max_length", 4096)
    assert found == status and "verdict: " in text and "example      " in text
