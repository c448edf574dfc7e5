"""A teacher's predictions as files: written once by tools/store_teacher.py, read by sft/distill.py.

A folder has `manifest.json` and `targets-00000.safetensors`, ...; each file has `TARGETS_PER_FILE` targets, the last
fewer. A target is the distribution of one token that carries loss, in the order of the rows and of their tokens:

    token_ids  int32 (targets, k)    the `top_k` most likely tokens, then `samples` drawn from the others
    weights    float16 (targets, k)  the probability of each; drawn tokens share the rest of the probability equally
    entropy    float32 (targets)     of the whole distribution

So the sum of weight x log-probability over a target is exact for the likely tokens and, in expectation, for the
others: an importance sample as in arXiv:2503.16870, with less variance. (The likely tokens alone would teach that all
others are impossible.) A loss on targets is unbiased, and exact if `top_k` is the size of the vocabulary.
"""

import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.checkpoints import tokenizer_rules
from buddygpt.cli.errors import UserError
from buddygpt.cli.files import ROW_TYPES, file_sha256, find_files, read_json

FORMAT = 1
IGNORED = -100  # label of a token without loss
TARGETS_PER_FILE = 2**20


class Targets(NamedTuple):
    """Distributions of tokens, one a row."""

    token_ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor


def sample_targets(
    log_probs: torch.Tensor, top_k: int, samples: int, generator: torch.Generator | None = None
) -> Targets:
    """Return the targets that stand for `log_probs` (targets, vocabulary)."""
    probs = log_probs.exp()
    entropy = -(probs * log_probs.clamp(min=-1e4)).sum(-1)
    weights, token_ids = probs.topk(min(top_k, probs.shape[-1]))
    if top_k < probs.shape[-1]:
        others = probs.scatter(-1, token_ids, 0.0)
        mass = others.sum(-1, keepdim=True)
        proposal = torch.where(mass > 0, others, probs)  # without mass, the weights are 0
        drawn = torch.multinomial(proposal, samples, replacement=True, generator=generator)
        token_ids = torch.cat([token_ids, drawn], -1)
        weights = torch.cat([weights, (mass / samples).expand(-1, samples)], -1)
    return Targets(token_ids.to(torch.int32), weights.to(torch.float16), entropy.to(torch.float32))


def number_targets(rows: Dataset, max_length: int | None) -> Dataset:
    """Return tokenized rows whose `labels` hold the number of the target instead of the token.

    The first token of a row and those beyond `max_length` have no target. `SFTTrainer` packs, cuts and pads labels
    without looking at them, so that they still say which target belongs to a token.
    """
    batches = rows.select_columns(["labels"]).iter(1000)
    counts = [len(find_targets(labels, max_length)) for batch in batches for labels in batch["labels"]]
    starts = [0, *accumulate(counts)]

    def number(row: dict[str, Any], index: int) -> dict[str, Any]:
        labels = [IGNORED] * len(row["labels"])
        for target, position in enumerate(find_targets(row["labels"], max_length), start=starts[index]):
            labels[position] = target
        return {"labels": labels}

    return rows.map(number, with_indices=True, desc="Finding the teacher's targets")


def find_targets(labels: list[int], max_length: int | None) -> list[int]:
    """Return the positions of a row that have a target."""
    return [position for position, label in enumerate(labels[:max_length]) if position and label != IGNORED]


# --- Write ---


def write_targets(folder: Path, parts: Iterable[Targets], description: dict[str, Any]) -> int:
    """Write targets, and at the end the manifest: `description` and the hash of each file. Return their number."""
    folder.mkdir(parents=True)
    files, total = {}, 0
    for number, part in enumerate(_join(parts, TARGETS_PER_FILE)):
        path = folder / f"targets-{number:05}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in part._asdict().items()}, path)
        files[path.name] = file_sha256(path)
        total += len(part.entropy)
    manifest = {"format": FORMAT, **description, "targets": total, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return total


def _join(parts: Iterable[Targets], size: int) -> Iterator[Targets]:
    """Yield the same targets in parts of `size`, the last one smaller."""
    waiting: list[Targets] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part.entropy)
        while count >= size:
            joined = Targets(*map(torch.cat, zip(*waiting, strict=True)))
            yield Targets(*(tensor[:size] for tensor in joined))
            waiting, count = [Targets(*(tensor[size:] for tensor in joined))], count - size
    if count:
        yield Targets(*map(torch.cat, zip(*waiting, strict=True)))


def describe_rows(
    files: list[str], rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, Any]:
    """Return what targets depend on besides the teacher; `rows` are tokenized."""
    rules = [tokenizer_rules(tokenizer.backend_tokenizer.to_str()), tokenizer.chat_template]
    tokens = sha256()
    for batch in rows.select_columns(["input_ids", "labels"]).iter(1000):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            tokens.update(np.array([len(ids), *ids, *labels], dtype=np.int32).tobytes())
    return {
        "data_sha256": [file_sha256(path) for path in find_files(files, ROW_TYPES)],
        "tokenizer_sha256": sha256(json.dumps(rules).encode()).hexdigest(),
        "max_length": max_length,
        "tokens_sha256": tokens.hexdigest(),
    }


# --- Read ---


class StoredTargets:
    """The targets of a folder, memory-mapped.

    Args:
        folder: Written by [`write_targets`].

    Raises:
        UserError: It is no such folder, or a file is missing or of another size.
    """

    def __init__(self, folder: Path):
        path = folder / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"{folder} has no manifest.json: no targets, or unfinished ones. "
                "Write them: python tools/store_teacher.py"
            )
        self.folder, self.manifest = folder, read_json(path)
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            raise UserError(f"{path} is not of format {FORMAT}: write the targets again with tools/store_teacher.py")
        self.files = [self._map(name) for name in self.manifest["files"]]
        if sum(len(each.entropy) for each in self.files) != self.manifest["targets"]:
            raise UserError(f"{folder} does not have the {self.manifest['targets']:,} targets of its manifest.json")

    def _map(self, name: str) -> Targets:
        try:
            tensors = load_file(self.folder / name)  # memory-mapped, not read
            return Targets(*(tensors[key] for key in Targets._fields))
        except Exception as error:  # safetensors has several
            raise UserError(
                f"{self.folder / name}: {error}. Write the targets again: tools/store_teacher.py"
            ) from error

    def require_rows(self, description: dict[str, Any]) -> None:
        """Raise UserError, naming what differs, if the targets are not those of the rows that are described."""
        names = {
            "data_sha256": "the contents of train_files",
            "tokenizer_sha256": "the tokenizer or its chat template",
            "max_length": "max_length",
            "tokens_sha256": "exams, train_on_unfit_data or assistant_only_loss",
        }
        for key, now in description.items():
            if self.manifest.get(key) != now:
                values = f" ({self.manifest.get(key)}, now {now})" if key == "max_length" else ""
                raise UserError(
                    f"{self.folder} was written for other rows: {names[key]} differs{values}. "
                    "Use the same, or write the targets again: python tools/store_teacher.py"
                )

    def read(self, numbers: torch.Tensor) -> Targets:
        """Return the targets with these numbers, on the device of `numbers`."""
        device, numbers = numbers.device, numbers.cpu()
        files, offsets = numbers // TARGETS_PER_FILE, numbers % TARGETS_PER_FILE
        first = self.files[0]
        found = Targets(*(tensor.new_empty(len(numbers), *tensor.shape[1:]) for tensor in first))
        for number in files.unique().tolist():
            chosen = files == number
            for target, source in zip(found, self.files[number], strict=True):
                target[chosen] = source[offsets[chosen]]
        return Targets(*(tensor.to(device) for tensor in found))
