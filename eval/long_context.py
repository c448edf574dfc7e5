"""Measure models by position: bits per byte up to a length, and how well they find a number in a long text.

    python eval/long_context.py --config eval/configs/quickstart-long_context.yaml
    python eval/long_context.py --checkpoints base=DIR yarn=DIR --text SHARDS/eval.jsonl --length 4096 --output DIR

A checkpoint with fewer positions than `length` is also measured with its angles stretched, without training
(`untrained`). Writes report.md, report.png and report.json to `output`.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import buddygpt.model  # noqa: F401  registers the model with the Auto classes
from buddygpt.cli.arguments import parse_arguments, require_count
from buddygpt.cli.checkpoints import load_tokenizer, require_causal_lm
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import require_output, write_atomically
from buddygpt.cli.weights import require_all_weights, require_finite_weights
from buddygpt.eval.benchmarks.needles import CHANCE, DEPTHS, FACTS, count_found, make_texts
from buddygpt.eval.benchmarks.rows import read_rows
from buddygpt.eval.checkpoints import choose_device, read_checkpoints
from buddygpt.eval.reporting.long_report import BINS, plot, to_markdown
from buddygpt.eval.reporting.scores import proportion
from buddygpt.training.positions import extend_positions

BATCH_TOKENS = 8192
HEAD_ROWS = 1024  # logits of so many tokens at once
UNTRAINED = ("linear", "theta", "yarn", "dynamic")


@dataclass
class LongContextArguments:
    checkpoints: list[str] = field(metadata={"help": "One or more NAME=FOLDER."})
    text: str = field(metadata={"help": "jsonl file with `text`: documents that no checkpoint was trained on."})
    length: int = field(default=4096, metadata={"help": "Last position + 1."})
    untrained: list[str] = field(
        default_factory=lambda: list(UNTRAINED),
        metadata={"help": "How to stretch shorter checkpoints without training: linear, theta, yarn, dynamic."},
    )
    max_tokens: int = field(default=200_000, metadata={"help": "Tokens to score for bits per byte, at most."})
    needles: int = field(
        default=10, metadata={"help": "Texts with a number to find, by language, length and depth. 0: none."}
    )
    needle_lengths: list[int] = field(
        default_factory=list,
        metadata={"help": "Lengths of these texts. Default: a quarter, a half and all of `length`."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of these texts."})
    output: str = field(default="outputs/long_context", metadata={"help": "Folder for the report."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, mps. None: a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"choices": ["auto", "float32", "bfloat16", "float16"]})

    def __post_init__(self) -> None:
        require_count("length", self.length, 10**8)
        if self.length % BINS or self.length < 8 * BINS:
            raise ValueError(f"length is {self.length}; use a multiple of {BINS}, at least {8 * BINS}")
        require_count("max_tokens", self.max_tokens)
        if not 0 <= self.needles <= 10_000:
            raise ValueError(f"needles is {self.needles}; use a number from 0 to 10,000")
        self.needle_lengths = self.needle_lengths or [self.length // 4, self.length // 2, self.length]
        for length in self.needle_lengths:
            require_count("needle_lengths", length, self.length)
        for kind in self.untrained:
            if kind not in UNTRAINED:
                raise ValueError(f"untrained: {kind} is none of {', '.join(UNTRAINED)}")


class Variant(NamedTuple):
    """A checkpoint, or one with its angles stretched.

    Attributes:
        name: In tables and picture.
        folder: The checkpoint.
        changes: Fields of its config to replace.
        positions: Its `max_position_embeddings` as saved.
        stretched: Whether the angles differ from those in training.
    """

    name: str
    folder: str
    changes: dict[str, Any]
    positions: int
    stretched: bool


def main() -> None:
    (args,) = parse_arguments(LongContextArguments, description=__doc__)
    require_output(Path(args.output), "folder")
    device = choose_device(args.device)
    variants = []
    for name, folder in read_checkpoints(args.checkpoints).items():
        require_all_weights(folder)
        variants += list_variants(name, folder, require_causal_lm(folder), args.length, args.untrained)
    try:
        documents = [row["text"] for row in read_rows(Path(args.text), "text")]
    except (OSError, ValueError) as error:
        raise UserError(f"text: {error}") from error

    results = {}
    for variant in variants:
        model = AutoModelForCausalLM.from_pretrained(variant.folder, dtype=args.dtype, **variant.changes)
        require_finite_weights(model, variant.folder)
        model = model.to(device).eval()
        tokenizer = load_tokenizer(variant.folder)
        found = {"positions": variant.positions, "stretched": variant.stretched}
        found["bits_per_byte"] = bits_per_byte_by_position(model, tokenizer, documents, args.length, args.max_tokens)
        found["needles"] = find_needles(model, tokenizer, args)
        results[variant.name] = found
        print(variant.name, " ".join(f"{value:.3f}" for value in found["bits_per_byte"]), flush=True)

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    plot(results, args.length, args.needle_lengths, output / "report.png")
    report = {"arguments": vars(args), "results": results}
    for name, text in {
        "report.json": json.dumps(report, indent=2, ensure_ascii=False),
        "report.md": to_markdown(results, args.length, args.needle_lengths),
    }.items():
        with write_atomically(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    print(f"{output / 'report.md'}: {len(results)} models")


def list_variants(
    name: str, folder: str, config: PreTrainedConfig, length: int, untrained: list[str]
) -> list[Variant]:
    """Return a checkpoint as it is and, if it has fewer positions than `length`, stretched in each way.

    Raises:
        UserError: It has no positions, or no single set of angles.
    """
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if not positions or not isinstance(rope, dict) or "rope_theta" not in rope:
        raise UserError(f"checkpoints: {name}={folder} has no rotary positions that can be stretched")
    if positions >= length:
        return [Variant(name, folder, {}, positions, False)]

    variants = [Variant(name, folder, {"max_position_embeddings": length}, positions, False)]
    for kind in untrained:
        changes: dict[str, Any] = {"rope_parameters": {"rope_type": kind}}
        if kind == "dynamic":
            changes["rope_parameters"]["factor"] = length / positions
        else:
            changes["max_position_embeddings"] = length
        if kind == "theta":  # NTK-aware: the slowest angle is stretched by length / positions
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            theta = rope["rope_theta"] * (length / positions) ** (size / max(1, size - 2))
            changes["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        variants.append(Variant(f"{name}, {kind}", folder, extend_positions(config, changes), positions, True))
    return variants


def bits_per_byte_by_position(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int, max_tokens: int
) -> list[float]:
    """Return bits per byte in `BINS` equal ranges of positions, as pretraining computes them.

    The documents form one text, as in training. Windows of `length` tokens start at each range, so that all ranges
    score almost the same text and differ in position and context only.

    Raises:
        UserError: The text has fewer than `length` tokens, a loss is NaN, or the model changes its logits.
    """
    separator = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    tokens: list[int] = []
    for document in documents:
        tokens += [*tokenizer(document, add_special_tokens=False).input_ids, separator]
        if len(tokens) > max_tokens + length:  # enough
            break
    size = length // BINS
    starts = range(0, len(tokens) - length + 1, size)[: max(1, max_tokens // length)]
    if not starts:
        raise UserError(f"text has {len(tokens)} tokens, fewer than the length {length}; give more text")
    text = torch.tensor(tokens)
    windows = torch.stack([text[start : start + length] for start in starts])
    require_plain_head(model, windows[:1, :8].to(model.device))

    sums = torch.zeros(length - 1, dtype=torch.float64)
    for rows in windows.split(max(1, BATCH_TOKENS // length)):
        sums += token_losses(model, rows.to(model.device)).double().sum(0).cpu()
    if sums.isnan().any():
        raise UserError(f"{model.config._name_or_path} gives NaN in {model.dtype}; try --dtype float32")
    text_bytes = len(tokenizer.decode(tokens, skip_special_tokens=True).encode("utf-8"))
    scale = len(tokens) / text_bytes / math.log(2) / len(windows)
    # Entry t is the loss of the token at position t + 1; the first range has one token less.
    return [float(part.mean()) * scale for part in torch.tensor_split(sums, [n * size - 1 for n in range(1, BINS)])]


@torch.no_grad()
def require_plain_head(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Raise UserError if the logits are not simply the output head of the last hidden states (Gemma caps them)."""
    expected = F.cross_entropy(model(ids, use_cache=False).logits[:, :-1].float().transpose(1, 2), ids[:, 1:])
    if not torch.allclose(token_losses(model, ids).mean(), expected, rtol=0.05, equal_nan=True):
        raise UserError(f"a model of type {model.config.model_type} scales or caps its logits; it cannot be measured")


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of each token but the first of each row, (B, T - 1), without all logits at once."""
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    head, parts = model.get_output_embeddings(), []
    for states, targets in zip(hidden.split(HEAD_ROWS, dim=1), ids[:, 1:].split(HEAD_ROWS, dim=1), strict=True):
        logits = head(states).float().transpose(1, 2)
        parts.append(F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(parts, dim=1)


def find_needles(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: LongContextArguments
) -> list[dict[str, Any]]:
    """Return the score of every language, length and depth, with interval and chance."""
    scores = []
    for language in FACTS if args.needles else ():
        for length in args.needle_lengths:
            for depth in DEPTHS:
                texts, answers = make_texts(tokenizer, language, length, depth, args.needles, args.seed)
                found = count_found(model, tokenizer, texts, answers, max(1, BATCH_TOKENS // length))
                score = proportion(found, args.needles, CHANCE)
                scores.append({"language": language, "length": length, "depth": depth, "found": found, **score})
    return scores


if __name__ == "__main__":
    run_script(main)
