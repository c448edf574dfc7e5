"""Small files of all benchmarks in their original formats, and a tiny model to ask them."""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import tiny_models
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from buddygpt.model import BuddyGPTForCausalLM

# question, four options, the right letter
LAW = [
    ("法国首都是", "伦敦", "巴黎", "东京", "柏林", "B"),
    ("1+1=", "2", "3", "4", "12", "A"),
    ("水的颜色", "红", "绿", "无色", "None", "C"),
    ("狗的英文", "cat", "cow", "pig", "dog", "D"),
    ("一年有几个月", "10", "12", "24", "7", "B"),
]
LOGIC = [
    ("夜里看见", "月亮", "太阳", "彩虹", "云彩", "A"),
    ("3*3=", "6", "12", "9", "33", "C"),
    ("冬天下", "雨", "雾", "露", "雪", "D"),
    ("鸟会", "飞", "读", "写", "唱戏", "A"),
    ("火是", "冷的", "热的", "湿的", "甜的", "B"),
]
SHOTS = [("太阳从哪边升起", "东", "西", "南", "北", "A"), ("2+2=", "3", "4", "5", "6", "B")]
PROMPT = "以下是中国关于{name}考试的单项选择题，请选出其中的正确答案。\n{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}"
NAMES = {"law": "法学", "logic": "逻辑学"}
ARC = [
    {
        "id": "1",
        "question": {"stem": "Fire is", "choices": [("hot", "1"), ("ice", "2"), ("wet", "3")]},
        "answerKey": "1",
    },
    {"id": "2", "question": {"stem": "Snow is", "choices": [("red", "A"), ("a cold", "B")]}, "answerKey": "B"},
]
for row in ARC:
    row["question"]["choices"] = [{"text": text, "label": label} for text, label in row["question"]["choices"]]
PROBLEMS = [
    {
        "question_id": "sum",
        "question_content": "Add two numbers.",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(
            zlib.compress(pickle.dumps(json.dumps([{"input": "2 2", "output": "4.0\n", "testtype": "stdin"}])))
        ).decode(),
        "metadata": "{}",
    },
    {
        "question_id": "double",
        "question_content": "Double a list.",
        "starter_code": "class Solution:\n    def double(self, xs: List[int], times: int) -> List[int]:",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "[1, 2]\n2", "output": "[2, 4]", "testtype": "functional"}]),
        "private_test_cases": "[]",
        "metadata": json.dumps({"func_name": "double"}),
    },
]
OUTPUTS = [
    {
        "question_content": "Return the largest.",
        "starter_code": "class Solution:\n    def largest(self, xs: List[int]) -> int:",
        "test": json.dumps([{"input": "[1, 3]", "output": "3", "testtype": "functional"}]),
        "test_id": 0,
    }
]
INSTRUCTION = {
    "key": 1,
    "prompt": "Write about a dog, without commas.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"num_words": 1, "relation": "at least"}],
}
GPQA = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Subdomain"]
STORY = ["a", "天黑了。", "小明饿了。", "他走进厨房。", "他找到面包。", "他吃了面包。", "他吃了月亮。", "1"]
MATH = {
    "problem": "What is $1+1$?",
    "solution": r"It is $\boxed{2}$.",
    "answer": "2",
    "subject": "Algebra",
    "level": 1,
}


def write_files(folder: Path) -> dict[str, Path]:
    """Write files of all benchmarks and return the path for each option of eval/local_exams.py."""
    for exam, split, suffix in (("cmmlu", "test", ""), ("ceval", "val", "_val"), ("mmlu", "test", "_test")):
        header = {"cmmlu": ["", "Question", *"ABCD", "Answer"], "ceval": ["id", "question", *"ABCD", "answer"]}.get(
            exam
        )
        names = {"cmmlu": ("agronomy", "anatomy"), "ceval": ("law", "logic"), "mmlu": ("anatomy", "law")}[exam]
        names = ("anatomy", "philosophy") if exam == "mmlu" else names
        for name, rows in zip(names, (LAW, LOGIC), strict=True):
            write_exam(folder / exam / split / f"{name}{suffix}.csv", rows, header)
        dev = folder / exam / "dev" / f"{names[0]}{'' if exam == 'cmmlu' else '_dev'}.csv"
        write_exam(dev, SHOTS, header)  # only the first subject has examples
    for level in ("Easy", "Challenge"):
        for split in ("Test", "Dev"):
            write_rows(folder / "arc" / f"ARC-{level}" / f"ARC-{level}-{split}.jsonl", ARC)
    options = {f"option_{letter}": text for letter, text in zip("abcd", ("冷", "热", "湿", "甜"), strict=True)}
    write_rows(folder / "arc/zh_test.json", [{"id": "z", "instruction": "火是", "answer": "B", **options}])
    with (folder / "gpqa_main.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [GPQA, ["Why,\nthough?", "right", "w1", "w2", "w3", "x"], ["Who?", "r", "a", "b", "c", "x"]]
        )
    write_rows(folder / "input_data.jsonl", [INSTRUCTION])
    write_rows(folder / "aime24.jsonl", [{"ID": "2024-I-1", "Problem": "1+203?", "Answer": 204}])
    write_rows(folder / "math500.jsonl", [MATH])
    write_rows(folder / "gsm8k/test.jsonl", [{"question": "1+1?", "answer": "1+1=2\n#### 2"}])
    write_rows(folder / "gsm8k/train.jsonl", [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(6)])
    write_rows(folder / "piqa/valid.jsonl", [{"goal": "Open a door", "sol1": "turn the knob", "sol2": "eat it"}])
    (folder / "piqa/valid-labels.lst").write_text("0\n")
    endings = ["runs.", "is a table.", "[header] eats  it.", "sky."]
    story = {"activity_label": "Dog", "ctx_a": "A dog sees a cat.", "ctx_b": "it", "endings": endings, "label": 0}
    write_rows(folder / "hellaswag_val.jsonl", [story])
    (folder / "spring2016.val.zh.tsv.split_20_80_eval.tsv").write_text(
        "\n".join("\t".join(cells) for cells in (list("abcdefgh"), STORY)) + "\n", encoding="utf-8"
    )
    pair = {"sentence_good": "他把书看完了。", "sentence_bad": "他把看完书了。"}
    write_rows(folder / "zhoblimp/BA_deletion.jsonl", [pair])
    write_rows(folder / "blimp/adjunct_island.jsonl", [{"sentence_good": "Who is he?", "sentence_bad": "Who he is?"}])
    write_rows(folder / "lambada_test.jsonl", [{"text": "the dog bit the man and the man ran"}])
    write_rows(folder / "lcb.jsonl", PROBLEMS)
    write_rows(folder / "outputs.jsonl", OUTPUTS)
    files = {
        "gpqa": "gpqa_main.csv",
        "ifeval": "input_data.jsonl",
        "aime24": "aime24.jsonl",
        "math500": "math500.jsonl",
    }
    files |= {"gsm8k": "gsm8k/test.jsonl", "hellaswag": "hellaswag_val.jsonl", "lambada": "lambada_test.jsonl"}
    files |= {"xstorycloze_zh": "spring2016.val.zh.tsv.split_20_80_eval.tsv"}
    files |= {"livecodebench": "lcb.jsonl", "livecodebench_output": "outputs.jsonl"}
    folders = dict.fromkeys(("cmmlu", "ceval", "mmlu", "arc", "piqa", "zhoblimp", "blimp"))
    return {option: folder / (files.get(option) or option) for option in [*folders, *files]}


def write_exam(path: Path, rows: list[tuple[str, ...]], header: list[str] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(header)
        writer.writerows([*([number] if header else []), *row] for number, row in enumerate(rows))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def filled(subject: str, row: tuple[str, ...]) -> str:
    """Return a question with its options, as OpenCompass asks it."""
    question, *options, _ = row
    return PROMPT.format(name=NAMES[subject], question=question, **dict(zip("ABCD", options, strict=True)))


def make_model() -> tuple[BuddyGPTForCausalLM, PreTrainedTokenizerFast]:
    """Return a random model that likes to write A, B, C and D, and its tokenizer.

    A token is a character, but `：` joins some that may follow it, as in our tokenizer.
    """
    texts = [
        PROMPT,
        *NAMES.values(),
        *map(chr, range(32, 127)),
        "问题答案。，《》\n",
        *(t for row in STORY for t in row),
    ]
    texts += [text for row in (*LAW, *LOGIC, *SHOTS) for text in row]
    words = ["<|endoftext|>", "<|pad|>", "?", *sorted(set("".join(texts)) - {"?"}), "：A", "：1", "：飞"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"：[A1飞]|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "unk_token": "?"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "num_key_value_heads": 2}
    model = tiny_models.make_model(**sizes, eos_token_id=0, pad_token_id=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list("ABCD"))] *= 6
    return model, tokenizer
