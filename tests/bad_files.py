"""Make good inputs for every command in one folder, and bad ones of every kind in another."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import GQA, SIZES, make_model
from tiny_shards import Shard, write_shards
from tiny_tokenizer import TEXTS, train_tiny_tokenizer, write_jsonl
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from buddygpt.data.shards.format import tokenizer_fingerprint

LONG_NAME = "n" * 300
DEEP = 100_000  # brackets
CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A tree."}]


def make_good_inputs(folder: Path) -> None:
    """Write a tokenizer, two checkpoints, rows of every kind, shards, results of an evaluation and a finished run."""
    train_tiny_tokenizer(folder).rename(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    vocab_size = len(tokenizer)
    write_shards(folder / "shards", [Shard("a.ds", "a", [5] * 40)], tokenizer_fingerprint(tokenizer))
    for name, model in {
        "checkpoint": make_model(**GQA | {"vocab_size": vocab_size, "eos_token_id": tokenizer.eos_token_id}),
        "native": Qwen3ForCausalLM(Qwen3Config(**SIZES | GQA | {"vocab_size": vocab_size, "head_dim": 12})),
    }.items():
        model.save_pretrained(folder / name)
        shutil.copytree(folder / "tokenizer", folder / name, dirs_exist_ok=True)
    write_rows(folder / "chat.jsonl", [{"messages": CHAT}] * 4)
    pair = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "No."}]}
    write_rows(folder / "pairs.jsonl", [pair] * 4)
    write_jsonl(folder / "documents.jsonl", [f"{text} {number}" for number in range(9) for text in TEXTS])
    for split in ("test", "dev"):
        (folder / "cmmlu" / split).mkdir(parents=True)
        (folder / "cmmlu" / split / "anatomy.csv").write_text("Question,A,B,C,D,Answer\nq,a,b,c,d,A\n")
    make_results(folder / "results")
    make_run(folder / "run")


def write_rows(path: Path, rows: list[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_results(folder: Path) -> None:
    """Write what lm-eval writes for one task of two questions."""
    (folder / "base").mkdir(parents=True)
    time = "2026-01-01T00-00-00"
    results = {
        "results": {"task": {"alias": "task", "acc,none": 0.5}},
        "group_subtasks": {"task": []},
        "n-shot": {"task": 0},
        "n-samples": {"task": {"original": 2, "effective": 2}},
        "config": {"model_args": {"pretrained": "base"}, "limit": None},
        "lm_eval_version": "0.4",
    }
    (folder / "base" / f"results_{time}.json").write_text(json.dumps(results))
    sample = {"arguments": [["q", "a"], ["q", "b"]], "filter": "none", "doc": {}, "metrics": ["acc"], "acc": 1.0}
    write_rows(folder / "base" / f"samples_task_{time}.jsonl", [{"doc_id": 0, **sample}, {"doc_id": 1, **sample}])


def make_run(folder: Path) -> None:
    """Write what runs/summarize.py reads."""
    score = {"value": 0.5, "n": 2, "ci95": [0.1, 0.9], "chance": 0.25}
    tasks = {"sample_exam_text": "acc", "sample_exam_letter": "acc", "sample_qa": "exact_match", "sample_pairs": "acc"}
    scores = {task: {metric: score} for task, metric in tasks.items()}
    scores |= {"sample_pairs/rejected_not_longer": {"acc": score}, "heldout_text": {"bits_per_byte": {"value": 1.0}}}
    for file, content in {
        "eval/scores.json": dict.fromkeys(("base", "sft", "dpo"), scores),
        "dpo/run.json": {"metrics": {"eval_rewards/accuracies": 0.9}},
        "pretrain/run.json": {"parameters": 10, "tokens_seen": 20},
        "chat.json": [{"question": "q", "answer": "a"}],
    }.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content))
    (folder / "seconds.tsv").write_text("pretrain\t5\tdone\n")


# Content of files that no command should accept, by the kind of fault.
BAD_JSON = {
    "empty": b"",
    "no_json": b"{'a': 1}",
    "cut": b'{"a": [1, 2',
    "list": b"[1]",
    "null": b"null",
    "number": b"7",
    "string": b'"text"',
    "binary": bytes(range(256)) * 8,
    "nul": b'{"a": 1}\0',
    "utf16": '{"a": 1}'.encode("utf-16"),
    "gb18030": '{"a": "一只小猫"}'.encode("gb18030"),
    "deep": b"[" * DEEP,
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "object": b"{}",
}
BAD_YAML = {
    "list": b"- a\n- b\n",
    "text": b"just words",
    "number": b"7",
    "empty_key": b"? \n: 1\n",
    "cut": b"a: [1, 2",
    "tab": b"a:\n\t- b",
    "binary": bytes(range(256)) * 8,
    "nul": b"a: 1\0",
    "utf16": "a: 1".encode("utf-16"),
    "gb18030": "a: 一只小猫".encode("gb18030"),
    "deep": b"[" * 20_000,
    "deep_map": b"".join(b" " * number + b"a:\n" for number in range(1500)),
    "large": b"a: [" + b"1, " * 3_400_000 + b"1]\n",
    "aliases": b"a: &a [x, x]\n"
    + b"".join(
        f"k{n}: &k{n} [*{n and f'k{n - 1}' or 'a'}, *{n and f'k{n - 1}' or 'a'}]\n".encode() for n in range(40)
    ),
    "object": b"a: !!python/object/apply:os.system ['touch executed']\n",
    "duplicate_tag": b"a: !unknown 1\n",
}


def make_bad_files(folder: Path) -> None:
    """Write files and things that are no regular files."""
    folder.mkdir()
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to("none/o")
    os.mkfifo(folder / "pipe")
    (folder / "file").write_text("a file\n")
    for suffix, contents in {"json": BAD_JSON, "yaml": BAD_YAML}.items():
        for name, content in contents.items():
            (folder / f"{name}.{suffix}").write_bytes(content)
    for suffix in ("jsonl", "csv", "txt", "parquet", "json", "yaml"):
        (folder / f"folder.{suffix}").mkdir()
        (folder / f"pipe.{suffix}").symlink_to(folder / "pipe")
        (folder / f"zero.{suffix}").symlink_to("/dev/zero")
        (folder / f"loop.{suffix}").symlink_to(folder / "loop")
    for name in BAD_JSON:
        shutil.copy(folder / f"{name}.json", folder / f"{name}.jsonl")


def damage_weights(folder: Path, name: str) -> None:
    """Damage model.safetensors of a checkpoint in one way."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.weight"))

    def save(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, file, {"format": "pt"})

    def folder_instead() -> None:
        file.unlink()
        file.mkdir()

    def loop_instead() -> None:
        file.unlink()
        file.symlink_to(file)

    ways: dict[str, Callable[[], object]] = {
        "missing": file.unlink,
        "empty": lambda: file.write_bytes(b""),
        "truncated": lambda: file.write_bytes(data[: len(data) // 2]),
        "header_only": lambda: file.write_bytes(data[:200]),
        "long_header": lambda: file.write_bytes((2**62).to_bytes(8, "little") + data[8:]),
        "text": lambda: file.write_text("version https://git-lfs.github.com/spec/v1"),
        "misshaped": lambda: save(tensors | {key: torch.zeros(3, 5)}),
        "tensor_missing": lambda: save({name: tensor for name, tensor in tensors.items() if name != key}),
        "layer_missing": lambda: save({name: tensor for name, tensor in tensors.items() if ".1." not in name}),
        "nan": lambda: save(tensors | {key: tensors[key] * float("nan")}),
        "inf": lambda: save(tensors | {key: tensors[key] * float("inf")}),
        "folder": folder_instead,
        "loop": loop_instead,
    }
    ways[name]()


BAD_WEIGHTS = [
    "missing",
    "empty",
    "truncated",
    "header_only",
    "long_header",
    "text",
    "misshaped",
    "tensor_missing",
    "layer_missing",
    "nan",
    "inf",
    "folder",
    "loop",
]
BAD_CONFIGS: dict[str, dict[str, object]] = {  # changed fields of config.json
    "vocab_null": {"vocab_size": None},
    "vocab_text": {"vocab_size": "many"},
    "vocab_zero": {"vocab_size": 0},
    "vocab_negative": {"vocab_size": -5},
    "vocab_huge": {"vocab_size": 10**9},
    "hidden_huge": {"hidden_size": 10**9},
    "layers_huge": {"num_hidden_layers": 10**9},
    "layers_zero": {"num_hidden_layers": 0},
    "heads_list": {"num_attention_heads": [4]},
    "heads_zero": {"num_attention_heads": 0},
    "rope_text": {"rope_parameters": "default"},
    "type_null": {"model_type": None},
    "type_unknown": {"model_type": "nosuch"},
    "type_list": {"model_type": ["qwen3"]},
    "dtype": {"dtype": "float7"},
    "architectures": {"architectures": 5},
    "eos_text": {"eos_token_id": "end"},
    "encoder": {"model_type": "bert"},
}
BAD_TOKENIZERS: dict[str, dict[str, object]] = {  # changed fields of tokenizer_config.json
    "class_unknown": {"tokenizer_class": "NoSuchTokenizer"},
    "class_null": {"tokenizer_class": None, "extra_special_tokens": None},
    "class_list": {"tokenizer_class": ["A"]},
    "eos_number": {"eos_token": 5},
    "length_text": {"model_max_length": "long"},
    "added_list": {"added_tokens_decoder": [1]},
}
BAD_TEMPLATES = {
    "syntax": "{% for x in %}",
    "unknown_filter": "{{ messages | nosuch }}",
    "range": "{% for n in range(10 ** 8) %}x{% endfor %}",
    "endless": "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "giant": "{{ 'x' * 10 ** 9 }}",
    "doubling": "{% set n = namespace(t='x') %}{% for _ in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "divide": "{{ 1 / 0 }}",
    "type": "{{ messages + 1 }}",
    "attribute": "{{ ''.__class__.__mro__ }}",
    "recursive": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}
