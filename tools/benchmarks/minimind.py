"""MiniMind's own pretraining in the speedrun, from a checkout of github.com/jingyaogong/minimind that the user gives.

Its script trainer/train_pretrain.py runs unchanged, in this process and on one thread, with its tokenizer, on the
training text of the speedrun. A document longer than its rows becomes several rows, because its loader would drop the
rest of it. Its checkpoints are evaluated as they are written, on the held-out text in rows of the same kind.
"""

import json
import math
import random
import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.format import TokenShards

SCRIPT = "trainer/train_pretrain.py"
LENGTH = 340  # tokens in a row, the script's default


def train(
    checkout: Path, work: Path, tokenizer: Path, shards: Path, options: dict[str, Any], tokens: int, seed: int
) -> list[dict[str, float]]:
    """Run the script; return tokens, CPU seconds without evaluation and bits per byte of every evaluated checkpoint.

    Args:
        checkout: Of MiniMind.
        work: Folder for its rows and checkpoints.
        tokenizer, shards: Of the speedrun; the shards' text becomes the rows.
        options: Of the script.
        tokens: To train on, padding included.
        seed: Of the choice of documents; the script's own seed is fixed.

    Raises:
        UserError: The checkout has no such script.
    """
    if not (checkout / SCRIPT).is_file():
        raise UserError(f"--minimind {checkout} has no {SCRIPT}: clone https://github.com/jingyaogong/minimind")
    theirs = AutoTokenizer.from_pretrained(checkout / "model")
    steps = round(tokens / LENGTH / options["batch_size"])
    rows = work / "minimind.jsonl"
    write_rows(decode(shards / "train", tokenizer, seed), theirs, steps * options["batch_size"], rows)
    held_out = [json.loads(line)["text"] for line in (shards / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    place = work / "minimind"  # the script reads ../model and writes to ../checkpoints
    (place / "run").mkdir(parents=True, exist_ok=True)
    if not (place / "model").exists():
        (place / "model").symlink_to(checkout / "model")
    options = options | {"epochs": 1, "accumulation_steps": 1, "num_workers": 0, "device": "cpu", "data_path": rows}
    options |= {"save_interval": max(1, steps // 20), "save_dir": place / "out", "log_interval": 50}
    clock = Clock(theirs, held_out, steps, options["save_interval"], LENGTH * options["batch_size"])
    arguments, search, save = sys.argv, sys.path.copy(), torch.save
    sys.argv = [SCRIPT, *(str(word) for key, value in options.items() for word in (f"--{key}", value))]
    torch.save = clock.on_save
    try:
        with chdir(place / "run"):
            runpy.run_path(str(checkout / SCRIPT), run_name="__main__")
    finally:
        sys.argv, sys.path[:], torch.save = arguments, search, save
    return clock.evaluations


def decode(folder: Path, tokenizer: Path, seed: int) -> Iterator[str]:
    """Yield the documents of shards in random order."""
    shards, ours = TokenShards(folder), AutoTokenizer.from_pretrained(tokenizer)
    stream = np.concatenate([np.fromfile(shards.folder / shard["file"], shards.dtype) for shard in shards.shards])
    ends = np.flatnonzero(stream == shards.eos_id)
    documents = list(zip([0, *(ends[:-1] + 1)], ends, strict=True))
    random.Random(seed).shuffle(documents)
    for start, end in documents:
        yield ours.decode(stream[start:end])


def write_rows(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, count: int, path: Path) -> None:
    """Write so many rows, each at most `LENGTH` tokens with the two that the script adds."""
    with path.open("w", encoding="utf-8") as file, tqdm(total=count, desc="MiniMind's rows") as bar:
        for document in documents:
            for piece in cut(document, tokenizer):
                file.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
                bar.update()
                if bar.n == count:
                    return


def cut(document: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the document in pieces of at most `LENGTH - 2` tokens, cut between characters."""
    offsets = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = [end for _, end in offsets]
    start = first = 0
    while first < len(ends):
        stop = min(first + LENGTH - 2, len(ends))
        while stop < len(ends) and ends[stop] == ends[stop - 1]:  # both tokens are bytes of one character
            stop -= 1
        end = ends[stop - 1] if stop < len(ends) else len(document)
        yield document[start:end]
        start, first = end, stop


class Clock:
    """Stands between the script and `torch.save`: evaluates the weights that it saves at some shares of the run."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: list[str], steps: int, interval: int, tokens_per_step: int
    ) -> None:
        self.tokenizer, self.steps, self.interval, self.tokens_per_step = tokenizer, steps, interval, tokens_per_step
        self.rows = [piece for text in texts for piece in cut(text, tokenizer)]
        self.text_bytes = sum(len(text.encode()) for text in texts)
        self.step = 0
        self.evaluations: list[dict[str, float]] = []
        self.save = torch.save
        self.start, self.paused = time.process_time(), 0.0

    def on_save(self, content: dict[str, Any], path: Any) -> None:
        """Save; the script saves the weights alone first, then again with the optimizer's state."""
        self.save(content, path)
        if str(path).endswith(".tmp"):
            return
        self.step = min(self.step + self.interval, self.steps)
        if self.step < self.steps / 2:
            return
        now = time.process_time()
        bits = self.bits_per_byte(content)
        row = {"step": self.step, "tokens": self.step * self.tokens_per_step}
        row |= {"cpu_seconds": round(now - self.start - self.paused, 1), "bits_per_byte": round(bits, 4)}
        self.evaluations.append(row)
        print(f"MiniMind: {row}", flush=True)
        self.paused += time.process_time() - now

    @torch.no_grad()
    def bits_per_byte(self, weights: dict[str, torch.Tensor]) -> float:
        """Return the bits of the held-out text over its bytes; separators cost nothing, in MiniMind's favor."""
        module = sys.modules["model.model_minimind"]
        width = weights["model.embed_tokens.weight"].shape[1]
        layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
        model = module.MiniMindForCausalLM(module.MiniMindConfig(hidden_size=width, num_hidden_layers=layers)).eval()
        model.load_state_dict({name: weight.float() for name, weight in weights.items()})
        nats = 0.0
        for start in range(0, len(self.rows), 16):
            texts = [self.tokenizer.bos_token + row for row in self.rows[start : start + 16]]
            batch = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
            logits = model(batch["input_ids"]).logits[:, :-1]
            nats += cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="sum").item()
        return nats / math.log(2) / self.text_bytes
