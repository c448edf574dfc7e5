"""Measure how fast models read a prompt and generate, by batch and length, with and without cache.

    python eval/speed.py --checkpoints base=DIR native=DIR --batch_sizes 1 8 --lengths 128 512

Writes speed.json and speed.md to `output`. Each figure is the median of `rounds` measurements after one that does not
count; the table shows the fastest and the slowest, too. Compare figures of one run only: they depend on the machine
and on what else runs there.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import buddygpt.model  # noqa: F401  registers the model with the Auto classes
from buddygpt.cli.arguments import parse_arguments, require_count
from buddygpt.cli.checkpoints import require_causal_lm
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import require_output, write_atomically
from buddygpt.cli.tables import escape_markdown, markdown_table
from buddygpt.cli.weights import require_all_weights, require_finite_weights
from buddygpt.eval.checkpoints import choose_device, read_checkpoints

Speed = dict[str, float]  # median, slowest, fastest: tokens per second


@dataclass
class SpeedArguments:
    checkpoints: list[str] = field(metadata={"help": "One or more NAME=FOLDER or NAME=OWNER/MODEL (of the Hub)."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Prompts at once."})
    lengths: list[int] = field(default_factory=lambda: [128, 512], metadata={"help": "Tokens of a prompt."})
    new_tokens: int = field(default=32, metadata={"help": "Tokens to generate after each prompt, at least 2."})
    rounds: int = field(default=5, metadata={"help": "Measurements of each figure."})
    output: str = field(default="outputs/speed", metadata={"help": "Folder for speed.json and speed.md."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, mps. None: a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"choices": ["auto", "float32", "bfloat16", "float16"]})

    def __post_init__(self) -> None:
        for key in ("batch_sizes", "lengths"):
            if not getattr(self, key):
                raise ValueError(f"{key} is empty; give one or more numbers")
            for value in getattr(self, key):
                require_count(key, value, 10**6)
        require_count("rounds", self.rounds, 1000)
        if not 2 <= self.new_tokens <= 10**6:
            raise ValueError(f"new_tokens is {self.new_tokens}; use a number from 2 to 1,000,000")


def main() -> None:
    (args,) = parse_arguments(SpeedArguments, description=__doc__)
    require_output(Path(args.output), "folder")
    device = choose_device(args.device)
    places = read_checkpoints(args.checkpoints)
    for name, place in places.items():
        require_all_weights(place)
        positions = getattr(require_causal_lm(place), "max_position_embeddings", None)
        longest = max(args.lengths) + args.new_tokens
        if positions and longest > positions:
            raise UserError(
                f"lengths: {name}={place} has {positions} positions, fewer than the {longest} of the longest prompt "
                "and new_tokens"
            )

    results = []
    with tqdm(total=len(places) * len(args.batch_sizes) * len(args.lengths), unit="setting", leave=False) as progress:
        for name, place in places.items():
            model = AutoModelForCausalLM.from_pretrained(place, dtype=args.dtype)
            require_finite_weights(model, place)
            model = model.to(device).eval()
            for batch_size in args.batch_sizes:
                for length in args.lengths:
                    setting = {"checkpoint": name, "batch_size": batch_size, "length": length}
                    results.append(setting | measure(model, batch_size, length, args.new_tokens, args.rounds))
                    progress.update()

    report = {"machine": describe_machine(torch.device(device)), "arguments": vars(args), "results": results}
    for file, text in {"speed.json": json.dumps(report, indent=2), "speed.md": to_markdown(report)}.items():
        with write_atomically(Path(args.output) / file) as partial:
            partial.write_text(text, encoding="utf-8")
    print(to_markdown(report))


@torch.inference_mode()
def measure(model: PreTrainedModel, batch_size: int, length: int, new_tokens: int, rounds: int) -> dict[str, Speed]:
    """Return the tokens per second of all rows together, when reading prompts and when generating after them.

    Generation is what `generate` takes for `new_tokens` tokens less what it takes for the first one, greedily.
    """
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.get_text_config().vocab_size, (batch_size, length), generator=draw)
    prompts = prompts.to(model.device)
    mask = torch.ones_like(prompts)

    def prefill() -> None:
        model(input_ids=prompts, attention_mask=mask, use_cache=True, logits_to_keep=1)

    def generate(count: int, use_cache: bool) -> None:
        settings = GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=use_cache, pad_token_id=0
        )
        tokens = model.generate(prompts, attention_mask=mask, generation_config=settings)
        if tokens.shape[1] != length + count:
            raise RuntimeError(f"generated {tokens.shape[1] - length} tokens, not {count}")

    def decode_seconds(use_cache: bool) -> float:
        first = seconds_of(lambda: generate(1, use_cache), model.device)
        return max(seconds_of(lambda: generate(new_tokens, use_cache), model.device) - first, 1e-9)

    n_new = batch_size * (new_tokens - 1)
    return {
        "prefill": speed(lambda: seconds_of(prefill, model.device), prompts.numel(), rounds),
        "decode": speed(lambda: decode_seconds(True), n_new, rounds),
        "decode_without_cache": speed(lambda: decode_seconds(False), n_new, rounds),
    }


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Return the wall-clock seconds of some work, until an accelerator has finished it."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def speed(take: Callable[[], float], tokens: int, rounds: int) -> Speed:
    """Return tokens per second from `rounds` measurements, after one that warms up."""
    take()
    speeds = [tokens / take() for _ in range(rounds)]
    return {"median": statistics.median(speeds), "slowest": min(speeds), "fastest": max(speeds)}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Return the table of a report."""
    machine, rows = report["machine"], []
    for row in report["results"]:
        cells = [f"{row[key]['median']:,.0f} ({row[key]['slowest']:,.0f} to {row[key]['fastest']:,.0f})"
                 for key in ("prefill", "decode", "decode_without_cache")]  # fmt: skip
        rows.append([escape_markdown(row["checkpoint"]), str(row["batch_size"]), str(row["length"]), *cells])
    header = ["model", "batch", "prompt", "prefill", "generation", "generation without cache"]
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    place = f"{escape_markdown(machine['name'])} ({machine['device']}{threads})"
    return "\n\n".join(
        [
            "# Speed",
            f"Tokens per second on {place}, torch {machine['torch']}: median, and the slowest to the fastest of "
            f"{report['arguments']['rounds']} measurements. Generation: {report['arguments']['new_tokens']} tokens.",
            markdown_table(header, rows),
            "",
        ]
    )


if __name__ == "__main__":
    run_script(main)
