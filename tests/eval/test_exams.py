"""Tests of benchmarks from local files: they equal lm-eval's own tasks and a count by hand, and name what is wrong."""

import importlib
import json
import math
import re
import sys
from pathlib import Path

import datasets
import exam_files
import lm_eval
import nltk
import pytest
import torch
from conftest import ROOT
from exam_files import ARC, GPQA, INSTRUCTION, LAW, LOGIC, MATH, SHOTS, STORY, filled
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from buddygpt.cli.errors import UserError
from buddygpt.eval import local_exams
from buddygpt.eval.benchmarks import exams, livecodebench, local_rows
from buddygpt.eval.reporting.results import split_by_subject
from buddygpt.eval.reporting.subjects import categories_of, read_subjects, subjects_of

pytestmark = pytest.mark.slow

STOCK = Path(lm_eval.__file__).parent / "tasks"
COLUMNS = [
    "cmmlu",
    "mmlu",
    "ceval-valid",
    "gpqa_main_zeroshot",
    "ifeval",
    "aime24",
    "minerva_math500",
    "livecodebench",
]
MODES = ["ceval-valid_ppl", "ceval-valid_gen"]
CLOZE = ["cmmlu_cloze", "ceval-valid_cloze", "mmlu_cloze", "arc_easy_cloze", "arc_challenge_cloze", "arc_zh_cloze"]
OTHERS = ["arc_easy", "arc_challenge", "hendrycks_math500", "gsm8k", "piqa", "hellaswag", "xstorycloze_zh"]
OTHERS += ["zhoblimp", "blimp", "lambada_openai", "arc_zh", "livecodebench_output"]
SETTINGS = {"bootstrap_iters": 0, "gen_kwargs": {"max_gen_toks": 8}, "confirm_run_unsafe_code": True}


@pytest.fixture(scope="module", autouse=True)
def no_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda name: False)  # would wait for a network
        yield


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return exam_files.write_files(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def tasks(options, tmp_path_factory):
    """Task files for all benchmarks, written by one command."""
    folder = tmp_path_factory.mktemp("tasks")
    write(options, folder)
    return folder


@pytest.fixture(scope="module")
def model():
    model, tokenizer = exam_files.make_model()
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", prefix_token_id=0)


@pytest.fixture(scope="module")
def evaluated(model, tasks):
    """Results of all tasks from local files. In batches of one, the last digit does not depend on the other rows."""
    manager = TaskManager(include_path=[ROOT / "eval/tasks", tasks], include_defaults=False)
    names = [*COLUMNS, *MODES, *CLOZE, *OTHERS]
    return simple_evaluate(model=model, tasks=names, task_manager=manager, **SETTINGS)


def test_all_columns_modes_and_twins_run_from_local_files(evaluated):
    results = evaluated["results"]
    assert set(results) >= {*COLUMNS, *MODES, *CLOZE, *OTHERS}
    for name in (*COLUMNS, *MODES, *CLOZE, *OTHERS):
        values = [value for key, value in results[name].items() if key.endswith(",none") and "stderr" not in key]
        assert all(isinstance(value, float | int) and math.isfinite(value) for value in values), name
    assert len(evaluated["samples"]["ceval-valid_gen"]) == 10
    answers = [row["answered"] for row in evaluated["samples"]["ceval-valid_gen"]]
    assert 0 < sum(answers) < 10  # some name a letter, some do not
    (problem, _) = evaluated["samples"]["livecodebench"]
    assert "tests" not in problem["doc"] and "Solution" not in problem["arguments"][0][0]


def test_scores_are_those_of_lm_evals_own_tasks_on_the_same_rows(evaluated, model, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **_: hub(path, name))
    folders = ["cmmlu", "ceval", "mmlu/default", "arc", "okapi/arc_multilingual", "ifeval", "aime", "minerva_math"]
    folders += ["hendrycks_math", "gsm8k", "piqa", "hellaswag", "xstorycloze", "zhoblimp", "blimp", "lambada"]
    manager = TaskManager(include_path=[STOCK / folder for folder in folders], include_defaults=False)
    names = [name for name in evaluated["samples"] if name in manager.all_tasks]
    assert len(names) == 20
    stock = simple_evaluate(model=model, tasks=names, task_manager=manager, **SETTINGS)
    for name in names:
        assert stock["results"][name] == evaluated["results"][name]
        for ours, theirs in zip(evaluated["samples"][name], stock["samples"][name], strict=True):
            for key in ("arguments", "resps", "target", *theirs["metrics"]):
                assert ours[key] == theirs[key], (name, key)


def test_letters_filled_in_texts_and_bits_per_byte_are_those_of_a_count_by_hand(evaluated, model):
    for subject, rows in {"law": LAW, "logic": LOGIC}.items():
        correct = 0
        for row, sample in zip(rows, evaluated["samples"][f"ceval-valid_{subject}"], strict=True):
            prompt = sample["arguments"][0][0]
            expected = [likelihood(model, prompt, f" {letter}") for letter in "ABCD"]  # lm-eval puts a space between
            assert likelihoods(sample) == pytest.approx(expected, abs=1e-3)
            correct += "ABCD"[argmax(expected)] == row[-1]
        assert evaluated["results"][f"ceval-valid_{subject}"]["acc,none"] == correct / 5

    correct, bits, n_bytes = {"ppl": 0, "acc": 0, "acc_bytes": 0}, 0.0, 0
    for number, (subject, row) in enumerate(in_turns()):
        sample = evaluated["samples"]["ceval-valid_ppl"][number]
        losses = [mean_loss(model, f"{filled(subject, row)}\n答案: {letter}") for letter in "ABCD"]
        assert argmax(likelihoods(sample)) == argmax([-loss for loss in losses])
        correct["ppl"] += "ABCD"[argmax([-loss for loss in losses])] == row[-1]

        sample = evaluated["samples"]["ceval-valid_cloze"][number]
        expected = [likelihood(model, f"问题：{row[0]}\n答案", f"：{option}") for option in row[1:5]]
        assert likelihoods(sample) == pytest.approx(expected, abs=1e-3)
        right = "ABCD".index(row[-1])
        sizes = [len(option.encode()) for option in row[1:5]]
        assert sample["bits_per_byte"] == (pytest.approx(expected[right], abs=1e-3), sizes[right])
        correct["acc"] += argmax(expected) == right
        correct["acc_bytes"] += argmax([value / size for value, size in zip(expected, sizes, strict=True)]) == right
        bits, n_bytes = bits - expected[right] / math.log(2), n_bytes + sizes[right]
    results = evaluated["results"]
    assert results["ceval-valid_ppl"]["acc,none"] == correct["ppl"] / 10
    assert results["ceval-valid_cloze"]["acc,none"] == correct["acc"] / 10
    assert results["ceval-valid_cloze"]["acc_bytes,none"] == correct["acc_bytes"] / 10
    assert results["ceval-valid_cloze"]["bits_per_byte,none"] == pytest.approx(bits / n_bytes, abs=1e-4)


def test_generated_answers_are_greedy_and_graded_by_their_letter(evaluated, model):
    correct = 0
    for (subject, row), sample in zip(in_turns(), evaluated["samples"]["ceval-valid_gen"], strict=True):
        answer = greedy(model, f"{filled(subject, row)}\n答案", 8)
        assert sample["resps"] == [[answer]]
        letters = re.findall("(?<![A-Za-z])[A-D](?![A-Za-z])", answer)
        assert sample["answered"] == bool(letters)
        correct += letters[:1] == [row[-1]]
    assert evaluated["results"]["ceval-valid_gen"]["exact_match,none"] == correct / 10


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"), ("：B。", "B"), (": C\n因为", "C"), ("（D）", "D"), ("B. 巴黎", "B"), ("答案是C", "C"),
        ("所以选 D", "D"),
        ("选项A和B都不对，正确答案为：C。", "C"), ("The answer is B.", "B"), ("Apple, then C", "C"), ("Beijing", None),
        ("", None), ("不知道", None), ("E", None), ("答案应选B", "B"), ("A\n\n下一题 答案：B", "A"),
    ],
)  # fmt: skip
def test_the_letter_of_an_answer_is_found(answer, letter):
    assert exams.find_letter(answer) == letter


def test_examples_come_from_dev_of_the_same_subject(tasks):
    manager = TaskManager(include_path=[ROOT / "eval/tasks", tasks], include_defaults=False)
    loaded = manager.load(
        [
            "ceval-valid_ppl",
            "cmmlu_cloze",
            "gsm8k",
            "piqa",
            "ceval-valid_law",
            "ceval-valid_logic",
            "arc_zh_cloze",
        ]
    )["tasks"]
    ppl, cloze = loaded["ceval-valid_ppl"], loaded["cmmlu_cloze"]
    law, logic = ppl.eval_docs[0], ppl.eval_docs[1]
    assert [law["subject"], logic["subject"]] == ["law", "logic"] and law["categories"] == ["humanities"]
    examples = "".join(f"{filled('law', row)}\n答案: {row[-1]}\n" for row in SHOTS)
    assert ppl.fewshot_context(law, num_fewshot=2) == examples + filled("law", LAW[0])
    assert ppl.fewshot_context(law, num_fewshot=0) == filled("law", LAW[0])
    assert ppl.fewshot_context(logic, num_fewshot=2) == filled("logic", LOGIC[0])  # no dev, no examples
    assert (
        cloze.fewshot_context(cloze.eval_docs[0], num_fewshot=1)
        == f"问题：{SHOTS[0][0]}\n答案：东\n\n问题：{LAW[0][0]}\n答案"
    )
    with pytest.raises(UserError, match="num_fewshot is 5, but `dev` has 2 examples of law"):
        ppl.fewshot_context(law, num_fewshot=5)
    assert loaded["gsm8k"].config.num_fewshot == 5 and len(loaded["gsm8k"].fewshot_docs()) == 6
    for name in ("piqa", "ceval-valid_logic"):  # lm-eval would take examples from the questions
        assert loaded[name].config.num_fewshot == 0
    assert loaded["ceval-valid_law"].config.num_fewshot is None
    assert loaded["arc_zh_cloze"].config.num_fewshot == 0 and cloze.config.num_fewshot is None  # no validation file


def test_the_twins_read_the_same_rows_from_the_hub(tasks, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **_: hub(path, name))
    subjects = {"cmmlu": ["agronomy", "anatomy"], "ceval": ["law", "logic"], "mmlu": ["anatomy", "philosophy"]}
    monkeypatch.setattr(exams, "subjects_of", subjects.get)
    for name in CLOZE:
        config = local_exams.load_yaml(tasks / f"{name}.yaml", resolve_func=False)["dataset_kwargs"]
        local, remote = exams.load(**config), exams.load(config["benchmark"])
        assert local["test"].to_list() == remote["test"].to_list() and len(local["test"]) > 0, name
        stock = local_exams.load_yaml(stock_file(config["benchmark"]), resolve_func=False)
        exam = exams.EXAMS[config["benchmark"]]
        assert (exam.repository, exam.test) == (
            stock["dataset_path"],
            stock.get("test_split") or stock["validation_split"],
        )

    def offline(*_, **__):
        raise ConnectionError("offline\nmode")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        UserError, match=r"haonan-li/cmmlu \(agronomy\) cannot be downloaded \(offline mode\); set HF_HUB"
    ):
        exams.load("cmmlu")


def test_subjects_have_the_names_of_lm_evals_tasks_and_categories():
    for benchmark, pattern in {
        "ceval": "ceval/ceval-valid_*",
        "cmmlu": "cmmlu/cmmlu_*",
        "mmlu": "mmlu/default/mmlu_*",
    }.items():
        prefix = pattern.rpartition("/")[2][:-1]
        assert subjects_of(benchmark) == sorted(
            file.stem.removeprefix(prefix) for file in STOCK.glob(f"{pattern}.yaml")
        )
    sizes = {name: [len(subjects) for subjects in categories.values()] for name, categories in read_subjects().items()}
    assert sizes == {"ceval": [20, 10, 11, 11, 8], "cmmlu": [17, 13, 22, 15, 15], "mmlu": [19, 12, 13, 13]}
    assert categories_of("ceval-valid_ppl", "college_physics") == ["STEM", "hard"]
    assert categories_of("mmlu", "no_such") == categories_of("arc_easy", "law") == []
    assert categories_of("cmmlu", "law") == categories_of("mmlu_pro", "philosophy") == []


def test_a_report_adds_up_the_categories_of_subjects(evaluated):
    group = {name: evaluated["samples"][name] for name in ("mmlu_anatomy", "mmlu_philosophy")}
    parts = split_by_subject("mmlu", group)
    assert list(parts) == ["STEM", "humanities", "anatomy", "philosophy"]
    assert parts["STEM"] == {"mmlu_anatomy": group["mmlu_anatomy"]} == parts["anatomy"]
    parts = split_by_subject("cmmlu_cloze", {"cmmlu_cloze": evaluated["samples"]["cmmlu_cloze"]})
    assert {name: len(part["cmmlu_cloze"]) for name, part in parts.items()} == {
        "other": 5,
        "STEM": 5,
        "agronomy": 5,
        "anatomy": 5,
    }
    assert list(split_by_subject("ceval-valid_ppl", {"ceval-valid_ppl": evaluated["samples"]["ceval-valid_ppl"]})) == [
        "humanities",
        "law",
        "logic",
    ]


def test_options_of_gpqa_stay_in_the_order_that_was_asked(tasks):
    manager = TaskManager(include_path=[tasks], include_defaults=False)
    task = manager.load("gpqa_main_zeroshot")["tasks"]["gpqa_main_zeroshot"]
    rows = [task.eval_docs.to_list() for _ in range(5)]  # lm-eval reads them again to grade the answers
    assert all(row == rows[0] for row in rows)
    for row in rows[0]:
        assert row[f"choice{'ABCD'.index(row['answer'][1]) + 1}"] == row["Correct Answer"]


def test_programs_pass_only_if_all_tests_do(options):
    add, double = local_rows.read_files("livecodebench", str(options["livecodebench"]))
    assert [test["output"] for test in add["tests"]] == ["3", "4.0\n"]  # the second was compressed
    right = "print(sum(map(int, input().split())))"
    assert all(livecodebench.passes(right, test) for test in add["tests"])
    assert not livecodebench.passes("print(3)", add["tests"][1])
    assert not livecodebench.passes("print(3", add["tests"][0])
    (test,) = double["tests"]
    method = "class Solution:\n    def double(self, xs: List[int], times) -> List[int]:\n        print('x'); return {}"
    assert livecodebench.passes(method.format("tuple(x * times for x in xs)"), test, double["function"])
    for wrong in ("xs", "1 / 0", "exit()", "print('=> [2, 4') or {1}"):
        assert not livecodebench.passes(method.format(wrong), test, double["function"])
    assert livecodebench.extract_code(f"Think.\n```python\nold\n```\nBetter:\n```python\n{right}\n```\n.") == right
    assert livecodebench.extract_code("```python\ncut") == "" and livecodebench.extract_code(right) == right

    (row,) = local_rows.read_files("livecodebench_output", str(options["livecodebench_output"]))
    assert row["call"] == "largest([1, 3])"
    for answer, score in {"```\nassert largest([1, 3]) == 3\n```": 1, "3": 1, "assert largest([1, 3]) == 1": 0,
                          "assert f(1) == __import__('os').getpid()": 0, "assert": 0, "": 0}.items():  # fmt: skip
        assert livecodebench.grade_output(row, [answer])["exact_match"] == score


ROW = '{"question": "q", "answer": "a"}\n'
GB18030 = "Question,A,B,C,D,Answer\n大海,1,2,3,4,A\n".encode("gb18030")
ARC_ZH = {"instruction": "q", "option_a": "1", "option_b": "2", "option_c": "3", "answer": "E"}
PROBLEM = exam_files.PROBLEMS[0]
BAD = {  # option, file, content, message
    "no such file": ("gpqa", None, b"", "gpqa: .* does not exist; where to get it: ask for access at huggingface.co"),
    "name of gpqa": ("gpqa", "rows.csv", b"a\n", "is not gpqa_{subject}.csv, whose name tells its task"),
    "file of an exam": (
        "ceval",
        "law_val.csv",
        b"",
        "law_val.csv is a file; give the folder that holds val/{subject}_val",
    ),
    "unknown gpqa": ("gpqa", "gpqa_x.csv", ",".join(GPQA[:5]).encode() + b"\n1,2,3,4,5\n", "lm-eval has no task"),
    "column": (
        "gsm8k",
        "test.jsonl",
        b'{"question": "q"}\n',
        "test.jsonl:1: `answer` is missing or empty; there are: ",
    ),
    "empty cell": ("gsm8k", "test.jsonl", b'{"question": "q", "answer": ""}\n', "`answer` is missing or empty"),
    "damaged row": ("gsm8k", "test.jsonl", ROW.encode() + b"{\n", "test.jsonl:2: "),
    "empty file": ("gsm8k", "test.jsonl", b"", "has no rows"),
    "gb18030": ("cmmlu", "test/anatomy.csv", GB18030, "not valid UTF-8"),
    "utf-16": ("gsm8k", "test.jsonl", ROW.encode("utf-16"), "it is UTF-16; convert it with `iconv"),
    "mmlu answer": ("mmlu", "test/anatomy_test.csv", b"q,1,2,3,4,0\n", "line 1: the answer is `0`, not A, B, C or D"),
    "mmlu cells": ("mmlu", "test/anatomy_test.csv", b"q,1,2,A\n", "line 1: a question, option or answer is empty"),
    "empty folder": ("arc", ".", b"", r"arc: .* has no \*\*/ARC-Easy-Test.jsonl or "),
    "arc": (
        "arc",
        "ARC-Easy-Test.jsonl",
        b'{"question": "q", "answerKey": "A"}\n',
        "row 1: `question` is not {stem, ",
    ),
    "arc_zh": ("arc", "zh_test.json", json.dumps(ARC_ZH).encode(), "row 1: the answer is `E`, and there is no such"),
    "ifeval": (
        "ifeval",
        "i.jsonl",
        json.dumps(INSTRUCTION | {"kwargs": [{}]}).encode(),
        "`kwargs` needs an object for",
    ),
    "piqa": ("piqa", "valid.jsonl", b'{"goal": "g", "sol1": "1", "sol2": "2"}\n', "valid-labels.lst does not exist"),
    "story": ("xstorycloze_zh", "zh.eval.tsv", b"h\na\tb\n", "zh.eval.tsv:2: not eight cells"),
    "packed": (
        "livecodebench",
        "l.jsonl",
        json.dumps(PROBLEM | {"private_test_cases": "eNpr"}).encode(),
        "cannot be read",
    ),
    "no tests": (
        "livecodebench",
        "l.jsonl",
        json.dumps(PROBLEM | {"public_test_cases": [{}]}).encode(),
        "row 1: its test",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_named_in_one_line(name, tmp_path):
    option, file, content, match = BAD[name]
    path = tmp_path / "nosuch" if file is None else tmp_path / file
    if file and file != ".":
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    folder = tmp_path if option in ("cmmlu", "mmlu", "arc") else path
    with pytest.raises(UserError, match=match) as caught:
        write({option: folder}, tmp_path / "tasks")
    assert "\n" not in str(caught.value) and not (tmp_path / "tasks").exists()


def test_a_pickled_object_is_not_loaded():
    class Attack:
        def __reduce__(self):
            return (sys.exit, (1,))

    with pytest.raises(local_rows.pickle.UnpicklingError, match="they hold sys.exit, not text"):
        local_rows.TextUnpickler(local_rows.io.BytesIO(local_rows.pickle.dumps(Attack()))).load()


def test_programs_need_local_files_and_permission(tasks, tmp_path, monkeypatch):
    manager = TaskManager(include_path=[ROOT / "eval/tasks"], include_defaults=False)
    with pytest.raises(UserError, match="livecodebench is read from local files: .* --livecodebench FILE"):
        manager.load("livecodebench")

    run_eval = importlib.import_module("buddygpt.eval.run_eval")
    local = TaskManager(include_path=[ROOT / "eval/tasks", tasks], include_defaults=False)
    monkeypatch.setattr(run_eval, "make_task_manager", lambda args: local)
    monkeypatch.setattr(run_eval, "build_model_args", lambda *_: {})
    (tmp_path / "config.json").write_text("{}")
    arguments = ["--checkpoints", f"a={tmp_path}", "--tasks", "livecodebench", "--output", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["run_eval.py", *arguments])
    with pytest.raises(UserError, match="livecodebench runs programs that the model writes; .* --run_generated_code"):
        run_eval.main()
    assert not (tmp_path / "results").exists()


def write(options, folder) -> None:
    """Run eval/local_exams.py."""
    with pytest.MonkeyPatch.context() as patch:
        arguments = [str(word) for option, path in options.items() for word in (f"--{option}", path)]
        patch.setattr(sys, "argv", ["local_exams.py", *arguments, "--output", str(folder)])
        importlib.reload(local_exams).main()


def hub(path: str, name: str | None) -> dict[str, datasets.Dataset]:
    """Return the same rows as in the local files, in the columns of the Hub."""
    rows = {"agronomy": LAW, "anatomy": LOGIC, "law": LAW, "logic": LOGIC, "philosophy": LOGIC}.get(name or "", [])
    if path == "cais/mmlu" and name == "anatomy":
        rows = LAW
    examples = SHOTS if name in ("agronomy", "law") or path == "cais/mmlu" else []
    exam = {"haonan-li/cmmlu": ("Question", "Answer", "test"), "ceval/ceval-exam": ("question", "answer", "val")}
    if path in exam:
        question, answer, split = exam[path]
        named = [question, *"ABCD", answer]
        splits = {split: rows, "dev": examples or rows[:1]}
        return {key: table([dict(zip(named, row, strict=True)) for row in of]) for key, of in splits.items()}
    if path == "cais/mmlu":
        splits = {"test": rows, "dev": SHOTS}
        return {
            key: table([{"question": r[0], "choices": list(r[1:5]), "answer": "ABCD".index(r[5])} for r in of])
            for key, of in splits.items()
        }
    arc = [
        {
            "question": row["question"]["stem"],
            "choices": {key: [choice[key] for choice in row["question"]["choices"]] for key in ("text", "label")},
            "answerKey": row["answerKey"],
        }
        for row in ARC
    ]
    zh = {"id": "z", "instruction": "火是", "answer": "B", "option_e": None}
    zh |= {f"option_{letter}": text for letter, text in zip("abcd", ("冷", "热", "湿", "甜"), strict=True)}
    pairs = [
        [{"sentence_good": "他把书看完了。", "sentence_bad": "他把看完书了。"}],
        [{"sentence_good": "Who is he?", "sentence_bad": "Who he is?"}],
    ]
    endings = ["runs.", "is a table.", "[header] eats  it.", "sky."]
    story = {"activity_label": "Dog", "ctx_a": "A dog sees a cat.", "ctx_b": "it", "endings": endings, "label": "0"}
    kwargs = [{"num_words": None, "relation": None}, INSTRUCTION["kwargs"][1]]
    stories = [*(f"input_sentence_{n}" for n in range(1, 5)), "sentence_quiz1", "sentence_quiz2"]
    found = {
        "allenai/ai2_arc": {"test": arc, "validation": arc, "train": arc},
        "alexandrainst/m_arc": {"test": [zh], "validation": [zh], "train": [zh]},
        "google/IFEval": {"train": [INSTRUCTION | {"kwargs": kwargs}]},
        "Maxwell-Jia/AIME_2024": {"train": [{"ID": "2024-I-1", "Problem": "1+203?", "Answer": 204}]},
        "HuggingFaceH4/MATH-500": {"test": [MATH]},
        "openai/gsm8k": {
            "test": [{"question": "1+1?", "answer": "1+1=2\n#### 2"}],
            "train": [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(6)],
        },
        "baber/piqa": {"validation": [{"goal": "Open a door", "sol1": "turn the knob", "sol2": "eat it", "label": 0}]},
        "Rowan/hellaswag": {"validation": [story]},
        "juletxara/xstory_cloze": {"eval": [dict(zip(stories, STORY[1:7], strict=True)) | {"answer_right_ending": 1}]},
        "Junrui1202/zhoblimp": {"train": pairs[0]},
        "nyu-mll/blimp": {"train": pairs[1]},
        "EleutherAI/lambada_openai": {"test": [{"text": "the dog bit the man and the man ran"}]},
    }[path]
    for split in ("train", "validation", "test"):
        found.setdefault(split, next(iter(found.values())))
    return {split: table(of) for split, of in found.items()}


def table(rows) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def stock_file(benchmark: str) -> Path:
    names = {"cmmlu": "cmmlu/cmmlu_agronomy", "ceval": "ceval/ceval-valid_law", "mmlu": "mmlu/default/mmlu_anatomy"}
    names["arc_zh"] = "okapi/arc_multilingual/arc_zh"
    return STOCK / f"{names.get(benchmark, f'arc/{benchmark}')}.yaml"


def in_turns():
    return [pair for rows in zip(LAW, LOGIC, strict=True) for pair in zip(("law", "logic"), rows, strict=True)]


def likelihoods(sample) -> list[float]:
    return [response[0][0] for response in sample["resps"]]


def argmax(values) -> int:
    return max(range(len(values)), key=values.__getitem__)


@torch.no_grad()
def logprobs(model, ids) -> torch.Tensor:
    return model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def likelihood(model, prompt: str, answer: str) -> float:
    """Return the log-likelihood of the tokens that the answer changes."""
    before, ids = (model.tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    start = next((n for n, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other), len(before))
    found = logprobs(model, ids)
    return sum(found[n - 1, ids[n]].item() for n in range(start, len(ids)))


def mean_loss(model, text: str) -> float:
    """Return the loss per token of a whole text, as OpenCompass's PPL mode."""
    ids = model.tokenizer(text)["input_ids"]
    found = logprobs(model, ids)
    return -sum(found[n - 1, ids[n]].item() for n in range(1, len(ids))) / (len(ids) - 1)


def greedy(model, prompt: str, n_tokens: int) -> str:
    ids = model.tokenizer(prompt)["input_ids"]
    for _ in range(n_tokens):
        ids.append(int(logprobs(model, ids)[-1].argmax()))
        if ids[-1] == 0:
            break
    return model.tokenizer.decode(ids[len(model.tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)
