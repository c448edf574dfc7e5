"""Tests of evaluation: every score is compared with a likelihood, an answer or an interval computed here."""

import csv
import functools
import importlib
import inspect
import json
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from buddygpt.cli.errors import UserError
from buddygpt.model import BuddyGPTConfig, BuddyGPTForCausalLM

EVAL = ROOT / "eval"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FACTS = {
    "法国首都？": "巴黎",
    "日本首都？": "东京",
    "英国首都？": "伦敦",
    "中国首都？": "北京",
    "3+4?": "7",
    "6+6?": "12",
    "5+5?": "10",
    "dog?": "狗",
}
DOCUMENTS = ["中国首都是北京。", "A dog is 狗. " * 30]  # the second is longer than the model's context
CONTEXT = 256


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with one token per byte."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    vocabulary = {token: number for number, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=specials[:2],
        chat_template=CHATML,
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model that has learned to answer FACTS in chat."""
    torch.manual_seed(0)
    config = BuddyGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BuddyGPTForCausalLM(config)
    texts = [chat(question) + answer + "<|im_end|>" for question, answer in FACTS.items()]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A sample folder. Two of the eight answers of the exam and one of the free-form answers are wrong on purpose."""
    folder = tmp_path_factory.mktemp("sample")
    facts = list(FACTS.items())
    for split in ("dev", "val", "test"):
        for subject, rows in {"capitals": facts[:4], "sums": facts[4:]}.items():
            exam_csv(folder / "exam" / split / f"{subject}.csv", rows)
    questions = [{"question": q, "answer": a, "subject": "all"} for q, a in facts]
    questions[0]["answer"] = " 巴黎。"  # punctuation and white space do not count
    questions[1]["answer"] = "京都"
    jsonl(folder / "qa_test.jsonl", questions)
    pairs = [preference([q], a, a + a) for q, a in facts[:6]]  # the chosen answer begins the rejected one
    pairs.append(preference([facts[6][0]], "狗", facts[6][1]))  # the wrong answer is chosen
    pairs.append(preference(["dog?", "狗", "6+6?"], "12", "7"))  # several turns
    jsonl(folder / "preference_eval.jsonl", pairs)
    jsonl(folder / "heldout.jsonl", [{"text": text} for text in DOCUMENTS])
    return folder


@pytest.fixture(scope="module")
def evaluated(model, tokenizer, sample, tmp_path_factory):
    """All tasks, run by the scripts on one checkpoint, with and without chat template."""
    folder = tmp_path_factory.mktemp("eval")
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    tasks = ["sample_exam_text", "sample_exam_letter", "sample_qa", "sample_pairs", "heldout_text"]
    with pytest.MonkeyPatch.context() as patch:
        run_eval(
            patch,
            *("--checkpoints", f"bare={folder / 'checkpoint'}", f"chat={folder / 'checkpoint'}", "--chat", "chat"),
            *("--tasks", *tasks, "--num_fewshot", 2, "--output", folder / "results", "--batch_size", 4),
            *("--sample_dir", sample, "--heldout_text", sample / "heldout.jsonl"),
        )
        run(patch, "report", "--results", folder / "results", "--output", folder / "report.md")
    return folder


@pytest.mark.slow
def test_option_text_scores_are_the_likelihoods_of_answers_with_their_end(evaluated, model, tokenizer):
    for name, end in {"bare": "\n", "chat": "<|im_end|>"}.items():
        correct = 0
        for row in samples(evaluated, name, "sample_exam_text"):
            question, options = row["doc"]["question"], row["doc"]["choices"]
            prompt = chat(question) if name == "chat" else bare(question)
            expected = [loglikelihood(model, tokenizer, prompt, option + end) for option in options]
            measured = [float(response[0][0]) for response in row["resps"]]
            assert measured == pytest.approx(expected, abs=1e-3)
            correct += max(range(4), key=expected.__getitem__) == row["doc"]["label"]
        score = scores(evaluated)[name]["sample_exam_text"]["acc"]
        assert (score["value"], score["n"], score["chance"]) == (correct / 8, 8, 0.25)
    assert correct == 6  # the model knows all eight facts; two answers of the exam are wrong


@pytest.mark.slow
def test_letter_scores_are_the_likelihoods_of_the_letters_after_the_examples(evaluated, model, tokenizer):
    rows = samples(evaluated, "bare", "sample_exam_letter")
    examples = rows[0]["arguments"]["gen_args_0"]["arg_0"]
    assert examples.count("答案：") == 3 and "答案：A\n\n" in examples
    for row in rows:
        prompt = row["arguments"]["gen_args_0"]["arg_0"]
        assert prompt.endswith(f"{row['doc']['question']}\nA. {row['doc']['A']}\n" + prompt[prompt.rindex("B. ") :])
        expected = [loglikelihood(model, tokenizer, prompt, letter) for letter in "ABCD"]
        assert [float(response[0][0]) for response in row["resps"]] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_free_form_answers_are_greedy_and_compared_without_final_punctuation(evaluated, model, tokenizer):
    for row in samples(evaluated, "chat", "sample_qa"):
        (message,) = row["doc"]["prompt"]
        prompt = tokenizer(chat(message["content"]), return_tensors="pt")
        answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert row["filtered_resps"] == [tokenizer.decode(answer, skip_special_tokens=True)]
        assert row["exact_match"] == (message["content"] != "日本首都？")
    assert scores(evaluated)["chat"]["sample_qa"]["exact_match"]["value"] == 7 / 8
    assert scores(evaluated)["chat"]["sample_qa"]["exact_match"]["chance"] is None


@pytest.mark.slow
def test_pairs_are_compared_with_their_end_and_after_several_turns(evaluated, model, tokenizer):
    rows = samples(evaluated, "chat", "sample_pairs")
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["doc"]["prompt"], tokenize=False, add_generation_prompt=True)
        expected = [loglikelihood(model, tokenizer, prompt, choice + "<|im_end|>") for choice in row["doc"]["choices"]]
        assert [float(response[0][0]) for response in row["resps"]] == pytest.approx(expected, abs=1e-3)
    assert [row["acc"] for row in rows[:7]] == [1, 1, 1, 1, 1, 1, 0]
    measured = scores(evaluated)["chat"]
    assert measured["sample_pairs"]["acc"]["chance"] == 0.5
    longer, not_longer = (
        measured[f"sample_pairs/{kind}"]["acc"]["n"] for kind in ("rejected_longer", "rejected_not_longer")
    )
    assert (longer, not_longer) == (7, 1)  # "10" against "狗" is longer too


@pytest.mark.slow
def test_bits_per_byte_equal_a_computation_over_windows_after_the_separator(evaluated, model, tokenizer):
    total = 0.0
    for text in DOCUMENTS:
        tokens = tokenizer(text)["input_ids"]
        separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        total += token_loglikelihood(model, [separator], tokens[:CONTEXT])
        for start in range(CONTEXT, len(tokens), CONTEXT):  # earlier tokens fill up the last window
            window = tokens[start : start + CONTEXT]
            context = tokens[start + len(window) - CONTEXT - 1 : start]
            total += token_loglikelihood(model, context, window)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    measured = scores(evaluated)["bare"]["heldout_text"]["bits_per_byte"]
    assert measured["value"] == pytest.approx(-total / math.log(2) / size, rel=1e-5)
    low, high = measured["ci95"]
    assert low < measured["value"] < high and measured["n"] == 2


@pytest.mark.slow
def test_report_agrees_with_lm_eval_and_shows_subjects_chance_intervals_and_prompts(evaluated, tokenizer):
    (path,) = (evaluated / "results" / "chat").glob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    for task, metrics in scores(evaluated)["chat"].items():
        for metric, score in metrics.items():
            if "/" not in task:
                assert results["results"][task][f"{metric},none"] == pytest.approx(score["value"])
    text = (evaluated / "report.md").read_text(encoding="utf-8")
    assert "| sample_exam_text | acc | 8 | 25.0% |" in text and "75.0% [40.9, 92.9] |" in text
    assert "| capitals | acc | 4 | 25.0% |" in text and "| chat template | none |" in text
    n_truncated = 0
    for row in samples(evaluated, "chat", "sample_exam_letter"):
        prompt = row["arguments"]["gen_args_0"]["arg_0"]
        n_truncated += len(tokenizer(prompt + "A")["input_ids"]) > CONTEXT + 1
    assert f"| 2-shot, {n_truncated} truncated |\n" in text
    assert "| sample_exam_text | 0-shot, 0 truncated | 0-shot, 0 truncated |" in text
    assert (evaluated / "scores.png").stat().st_size > 10_000
    subjects = [scores(evaluated)["chat"][f"sample_exam_text/{subject}"]["acc"] for subject in ("capitals", "sums")]
    assert [score["n"] for score in subjects] == [4, 4] and sum(score["value"] for score in subjects) / 2 == 6 / 8


def test_prompts_that_do_not_fit_with_their_answer_are_counted_once_per_question():
    run_eval = importlib.import_module("buddygpt.eval.run_eval")
    model = SimpleNamespace(max_length=10, max_gen_toks=4, tok_encode=list)  # a token per character
    options = [
        {"doc_id": 0, "arguments": [("123456789", "A"), ("123456789", "BC")]},  # 11 tokens: the last is not read
        {"doc_id": 1, "arguments": [("123456789", "ABC"), ("1234567890", "AB")]},
    ]
    assert run_eval.count_truncated(model, options) == 1
    answers = [{"doc_id": number, "arguments": [("1234567", {"max_gen_toks": number})]} for number in (3, 4)]
    answers.append({"doc_id": 5, "arguments": [("1234567", {})]})
    assert run_eval.count_truncated(model, answers) == 2
    assert run_eval.count_truncated(model, [{"doc_id": 0, "arguments": [("a long document",)]}]) == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--device", "nosuch"], "device: nosuch cannot be used here"),
        (["--device", "meta"], "device: meta cannot be used here"),
        (["--dtype", "nosuch"], "dtype is nosuch"),
        (["--dtype", "int8"], "dtype is int8"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--limit", "0"], "limit is 0"),
        (["--num_fewshot", "-1"], "num_fewshot is -1"),
        (["--config", "CONFIG"], "`tasks` in the config file is 5"),
    ],
)
def test_values_that_lm_eval_would_replace_or_trip_over_are_refused(arguments, match, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("tasks: 5")
    arguments = [argument.replace("CONFIG", str(tmp_path / "config.yaml")) for argument in arguments]
    if "--config" not in arguments:
        arguments += ["--tasks", "sample_qa"]
    with pytest.raises(UserError, match=match):
        run_eval(monkeypatch, "--checkpoints", f"a={tmp_path}", *arguments, "--output", tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["..", ".", "../a", "a/b", "/a", "", ".a", "a\n", "a|b", "<b>", "n" * 300])
def test_a_name_that_would_leave_the_output_folder_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "config.json").touch()
    checkpoints = ["--checkpoints", f"{name}={tmp_path}", "--tasks", "sample_qa"]
    with pytest.raises(UserError, match="is not NAME=FOLDER"):
        run_eval(monkeypatch, *checkpoints, "--output", tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    make_output = importlib.import_module("buddygpt.eval.run_eval").make_output
    (tmp_path / "file").touch()
    for name in ("file", "file/below", "n" * 300):
        with pytest.raises(UserError, match="output: cannot write to"):
            make_output(tmp_path / name)
    assert make_output(tmp_path / "new/模型 1").is_dir() and not list((tmp_path / "new/模型 1").iterdir())


def test_harmless_warnings_of_lm_eval_are_silent_and_others_are_not(tmp_path, caplog):
    run_eval = importlib.import_module("buddygpt.eval.run_eval")
    for logger, pattern in run_eval.HARMLESS_WARNINGS.items():
        source = inspect.getsource(importlib.import_module(logger))
        for words in pattern.removesuffix(" of .* from None").split("|"):
            assert words.split(" of .*")[0] in " ".join(source.split())  # lm-eval still says so
    run_eval.silence_harmless_warnings()
    jsonl(tmp_path / "qa_test.jsonl", [{"question": "a", "answer": "b", "subject": "c"}])
    for copy in ("one", "two"):  # the second overrides the first
        (tmp_path / copy).mkdir()
        (tmp_path / copy / "own.yaml").write_text(f"include: {EVAL / 'tasks/sample_qa.yaml'}\ntask: own\n")
    paths = [tmp_path / "one", tmp_path / "two"]
    manager = TaskManager(include_path=paths, include_defaults=False, metadata={"sample_dir": str(tmp_path)})
    manager.load("own")
    logging.getLogger("lm_eval.evaluator").warning("appears to be a chat variant but chat template is\nnot applied.")
    logging.getLogger("lm_eval.evaluator").warning(
        "Overwriting default num_fewshot of %s from %s to %s", "own", None, 2
    )
    logging.getLogger("lm_eval.models.huggingface").warning("Combined length of context (9) and continuation (9)")
    assert not caplog.records
    logging.getLogger("lm_eval.api.task").warning("metric acc is defined, but aggregation is not.")
    assert len(caplog.records) == 1


def test_likelihoods_that_are_no_numbers_are_refused():
    run_eval = importlib.import_module("buddygpt.eval.run_eval")
    model_args = {"pretrained": "model", "dtype": "float16"}
    rows = [{"resps": [[(-1.0, True)], [(-2.0, False)]]}, {"resps": [["an answer"]]}, {"resps": [[-3.0]]}]
    run_eval.require_finite_likelihoods({"task": rows}, model_args)
    for resps in ([[(-1.0, True)], [(math.nan, False)]], [[math.nan]]):
        with pytest.raises(UserError, match="task: model gives NaN in float16"):
            run_eval.require_finite_likelihoods({"task": [{"resps": resps}]}, model_args)


def test_interval_is_wilsons_and_chance_inside_it_is_marked():
    scores = importlib.import_module("buddygpt.eval.reporting.scores")
    score = scores.proportion(8, 10, 0.25)
    assert score["ci95"] == pytest.approx([0.4901625, 0.9433178], abs=1e-6)  # Wilson (1927) for 8 of 10
    assert not scores.at_chance(score) and scores.at_chance(scores.proportion(3, 10, 0.25))
    assert not scores.at_chance(scores.proportion(3, 10, None))


@pytest.mark.slow
def test_local_benchmarks_run_offline_under_lm_evals_task_names(evaluated, tmp_path, monkeypatch):
    facts = list(FACTS.items())
    for split, rows in {"dev": facts[:2], "test": facts[2:]}.items():
        exam_csv(tmp_path / "cmmlu" / split / "agronomy.csv", rows, "Question", "Answer")
    exam_csv(tmp_path / "cmmlu/test/anatomy.csv", facts[:2], "Question", "Answer")
    exam_csv(tmp_path / "ceval/val/law_val.csv", facts[:3])
    exams = ("--cmmlu", tmp_path / "cmmlu", "--ceval", tmp_path / "ceval", "--output", tmp_path / "tasks")
    run(monkeypatch, "local_exams", *exams)
    run_eval(
        monkeypatch,
        *("--checkpoints", f"bare={evaluated / 'checkpoint'}", "--tasks", "cmmlu", "ceval-valid"),
        *("--include_path", tmp_path / "tasks", "--num_fewshot", 1, "--output", tmp_path / "results"),
    )
    run(monkeypatch, "report", "--results", tmp_path / "results", "--output", tmp_path / "report.md")
    measured = scores(tmp_path)["bare"]
    counts = {task: metrics["acc"]["n"] for task, metrics in measured.items()}
    subjects = {"cmmlu": 8, "cmmlu/agronomy": 6, "cmmlu/anatomy": 2, "ceval-valid": 3, "ceval-valid/law": 3}
    assert counts == subjects | {"cmmlu/other": 6, "cmmlu/STEM": 2, "ceval-valid/humanities": 3}
    (path,) = (tmp_path / "results" / "bare").glob("results_*.json")
    groups = json.loads(path.read_text(encoding="utf-8"))["groups"]
    assert groups["cmmlu"]["acc,none"] == pytest.approx(measured["cmmlu"]["acc"]["value"])
    shots = {
        task: samples(tmp_path, "bare", task)[0]["arguments"]["gen_args_0"]["arg_0"].count("答案：")
        for task in ("cmmlu_agronomy", "cmmlu_anatomy", "ceval-valid_law")
    }
    assert shots == {"cmmlu_agronomy": 2, "cmmlu_anatomy": 1, "ceval-valid_law": 1}  # no dev, no examples


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "has no"),
        ({"astrology.csv": "Question,A,B,C,D,Answer\nq,1,2,3,4,A\n"}, "not a subject of this benchmark"),
        ({"agronomy.csv": "question,A,B,C,D,answer\nq,1,2,3,4,A\n"}, "no column Question, Answer"),
        ({"agronomy.csv": "Question,A,B,C,D,Answer\n"}, "has no rows"),
        ({"agronomy.csv": "Question,A,B,C,D,Answer\nq,1,2,3,4,A\nq,1,2,3,4,E\n"}, "line 3: the answer is `E`"),
        ({"agronomy.csv": "Question,A,B,C,D,Answer\nq,1,2\n"}, "line 2: a question, option or answer is empty"),
    ],
)
def test_local_exams_names_what_is_wrong(files, match, tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    for name, text in files.items():
        (tmp_path / "test" / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=match):
        run(monkeypatch, "local_exams", "--cmmlu", tmp_path, "--output", tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--checkpoints", "a=/nowhere"], "a=/nowhere is not a checkpoint"),
        (["--checkpoints", "CHECKPOINT"], "is not NAME=FOLDER"),
        (["--checkpoints", "a=CHECKPOINT", "a=CHECKPOINT"], "the name `a` is given twice"),
        (["--checkpoints", "a=BROKEN"], "cannot read a model config"),
        (["--chat", "b"], "chat: `b` is not among the checkpoints"),
        (["--include_path", "/nowhere"], "include_path: /nowhere is not a folder"),
        (["--tasks", "sample_exam_txt"], "did you mean `sample_exam_text`"),
        (["--tasks", "sample_qa"], "needs sample_dir"),
        (["--tasks", "heldout_text", "--heldout_text", "/nowhere"], "/nowhere does not exist"),
        (["--tasks", "heldout_text", "--heldout_text", "ROWS"], "row 2: `text` is missing or empty"),
        (["--taks", "sample_qa"], "--?taks"),
    ],
)
def test_run_eval_names_what_is_wrong_before_any_model_runs(arguments, match, evaluated, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": ""}])
    places = {"CHECKPOINT": evaluated / "checkpoint", "BROKEN": tmp_path, "ROWS": tmp_path / "rows.jsonl"}
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    for key, value in {"--checkpoints": f"a={evaluated / 'checkpoint'}", "--tasks": "sample_qa"}.items():
        arguments = arguments if key in arguments else [*arguments, key, value]
    with pytest.raises(UserError, match=match):
        run_eval(monkeypatch, *arguments, "--output", tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_chat_needs_a_chat_template(evaluated, tmp_path, monkeypatch):
    for path in (evaluated / "checkpoint").iterdir():
        if path.is_file() and path.suffix != ".jinja":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match="has no chat template"):
        run_eval(monkeypatch, "--checkpoints", f"a={tmp_path}", "--chat", "a", "--tasks", "sample_qa")


@pytest.mark.slow
def test_a_report_without_results_is_one_line_and_exit_status_2(tmp_path):
    command = [sys.executable, EVAL / "report.py", "--results", tmp_path, "--output", tmp_path / "report.md"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "has no NAME/results_*.json" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "report.md").exists()


def run(patch, script, *arguments):
    patch.setattr(sys, "argv", [script, *map(str, arguments)])
    importlib.import_module(f"buddygpt.eval.{script}").main()


def run_eval(patch, *arguments):
    """Run run_eval.py with our own tasks only: indexing lm-eval's 14,000 takes seconds."""
    module = importlib.import_module("buddygpt.eval.run_eval")
    patch.setattr(module, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    run(patch, "run_eval", *arguments)


def exam_csv(path, facts, question="question", answer="answer"):
    """Write a benchmark file whose answer is wrong in the first row and right in all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", question, "A", "B", "C", "D", answer])
        for number, (asked, right) in enumerate(facts):
            rows.writerow([number, asked, "1", right, "None", "猫", "A" if number == 0 else "B"])


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def preference(turns, chosen, rejected):
    prompt = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def chat(question):
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def bare(question):
    return f"问：{question}\n答：" if "首都" in question else f"Q: {question}\nA: "


def samples(folder, name, task):
    (path,) = (folder / "results" / name).glob(f"samples_{task}_*.jsonl")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def scores(folder):
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def loglikelihood(model, tokenizer, context, continuation):
    """Return log p(continuation | context). With one token per byte, texts split where their tokens do."""
    n_spaces = len(context) - len(context.rstrip())  # counted with the continuation, as in lm-eval
    context, continuation = context[: len(context) - n_spaces], context[len(context) - n_spaces :] + continuation
    return token_loglikelihood(model, tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"])


@torch.no_grad()
def token_loglikelihood(model, context, continuation):
    logprobs = model(input_ids=torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    return sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))
