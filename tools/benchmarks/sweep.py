"""How far is the choice of planning/rules.py from the best? Vary rate, batch and shape around it on real text.

    python tools/benchmarks/sweep.py --text FILES...                       # budgets of 2, 8 and 30 CPU-minutes: hours
    python tools/benchmarks/sweep.py --text FILES... --minutes 0.33        # a quick look
    python tools/benchmarks/sweep.py --text FILES... --vary vocabulary     # other vocabularies, each with shards

One thread trains with `pretrain/pretrain.py`. A short probe measures the seconds of a step, so that every run of a
budget uses the same CPU time, without evaluation. All runs are judged by bits per byte of the same held-out documents.
A finished run is a line of `WORK/results.jsonl` and is not repeated; the table and the picture are written after each:
`WORK/sweep.md`, `WORK/sweep.png`.
"""

import glob
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import recipe
import torch
from ab import ROOT, machine
from matplotlib.figure import Figure
from transformers import TrainerCallback

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import find_files, write_atomically
from buddygpt.cli.tables import markdown_table
from buddygpt.planning import rules
from buddygpt.planning.budget import bytes_of_text, model_config
from buddygpt.planning.hardware import CORE_FLOPS

AXES = ("rate", "embedding", "batch", "shape", "vocabulary")
LARGEST_BATCH = 16  # rows of a micro-batch
PROBE_STEPS = 12
GOAL = 0.01  # the rules' choice should be within this share of the best


@dataclass
class SweepArguments:
    text: list[str] = field(metadata={"help": "Files, globs or folders of text, for training and evaluation."})
    minutes: list[float] = field(
        default_factory=lambda: [2.0, 8.0, 30.0], metadata={"help": "CPU-minutes of each run: one budget or several."}
    )
    vary: list[str] = field(
        default_factory=lambda: list(AXES[:-1]), metadata={"help": f"What to vary: {', '.join(AXES)}."}
    )
    text_column: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns that may hold the text; the first found counts."}
    )
    eval_fraction: float = field(default=0.005, metadata={"help": "Share of documents to hold out."})
    seed: int = field(default=1, metadata={"help": "Seed of weights and data order."})
    work: str = field(default="outputs/sweep", metadata={"help": "Folder of shards, results, table and picture."})

    def __post_init__(self) -> None:
        if unknown := set(self.vary) - set(AXES):
            raise ValueError(f"vary is {', '.join(sorted(unknown))}; use {', '.join(AXES)}")
        if not self.minutes or min(self.minutes) <= 0:
            raise ValueError(f"minutes is {self.minutes}; give numbers above 0")


@dataclass(frozen=True)
class Candidate:
    """A run of the sweep.

    Attributes:
        name: What differs from the rules' choice; "rules" for that itself.
        shape: Of the model.
        length: Tokens in a row.
        batch: Tokens of a step.
        rate: Peak learning rate of Muon.
        embedding: That of AdamW, which trains the embedding, over Muon's.
    """

    name: str
    shape: rules.Shape
    length: int
    batch: int
    rate: float
    embedding: float = rules.EMBEDDING_OVER_MUON

    @property
    def step_key(self) -> list[int]:
        """What the time of a step depends on."""
        shape = self.shape
        return [shape.vocab_size, shape.hidden_size, shape.num_hidden_layers, self.length, self.batch]

    @property
    def key(self) -> list[Any]:
        return [*self.step_key, self.rate, self.embedding]


# --- candidates ---


def choose(minutes: float, speed: float, text_bytes: float) -> Candidate:
    """Return the rules' choice for a budget at a speed in FLOP/s."""
    run = rules.plan_budget(minutes * 60 * speed, speed, text_bytes)
    return Candidate("rules", run.shape, run.block_size, run.batch, run.learning_rate)


def candidates(center: Candidate, axes: list[str]) -> list[Candidate]:
    """Return the rules' choice and its neighbours along each axis."""
    found = [center]
    if "rate" in axes:
        found += [replace(center, name=f"rate x {factor:g}", rate=center.rate * factor) for factor in (0.5, 2)]
    if "embedding" in axes:
        for factor in (1 / 3, 2):
            ratio = center.embedding * factor
            found.append(replace(center, name=f"embedding's rate {ratio:g} x Muon's", embedding=ratio))
    if "batch" in axes:
        for factor in (0.5, 2):
            batch = int(center.batch * factor)
            if batch >= center.length:
                found.append(with_rate(replace(center, name=f"batch x {factor:g}", batch=batch)))
    if "shape" in axes:
        found += [with_rate(each) for each in other_shapes(center)]
    if "vocabulary" in axes:
        for factor in (0.5, 2):
            shape = replace(center.shape, vocab_size=int(center.shape.vocab_size * factor))
            found.append(with_rate(replace(center, name=f"vocabulary {shape.vocab_size:,}", shape=shape)))
    return found


def other_shapes(center: Candidate) -> Iterator[Candidate]:
    """Yield the next narrower and wider models, and one with half as many layers more."""
    widths, shape = rules.widths(), center.shape
    place = widths.index(shape.hidden_size)
    for word, index in (("narrower", place - 1), ("wider", place + 1)):
        if 0 <= index < len(widths):
            other = rules.shape_of_width(widths[index], shape.vocab_size)
            yield replace(center, name=f"{word}: {describe(other)}", shape=other)
    deeper = replace(shape, num_hidden_layers=round(1.5 * shape.num_hidden_layers))
    yield replace(center, name=f"deeper: {describe(deeper)}", shape=deeper)


def with_rate(candidate: Candidate) -> Candidate:
    """Return the candidate with the rate that the rules have for its size and batch."""
    rate = rules.learning_rate("muon", candidate.shape.parameters, candidate.batch)
    return replace(candidate, rate=rate)


def describe(shape: rules.Shape) -> str:
    return f"{shape.hidden_size} x {shape.num_hidden_layers}"


# --- runs ---


def prepare(args: SweepArguments, work: Path, vocab_size: int) -> None:
    """Train the tokenizer and write the shards of one vocabulary, unless they exist."""
    tokenizer, shards = work / f"tokenizer-{vocab_size}", work / f"shards-{vocab_size}"
    commands = {
        tokenizer: ["tokenizer/train_tokenizer.py", "--files", *args.text, "--vocab_size", vocab_size,
                    "--text_column", *args.text_column, "--max_bytes", 20_000_000],
        shards: ["data/prepare_pretrain.py", "--sources", *args.text, "--text_key", *args.text_column,
                 "--clean", "text", "--deduplicate", "minhash", "--on_bad_row", "skip",
                 "--eval_fraction", args.eval_fraction, "--tokenizer", tokenizer],
    }  # fmt: skip
    recipe.make_missing(commands)


class Clock(TrainerCallback):
    """Notes the CPU seconds at which each step ends, and the last bits per byte."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.bits: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends.append(time.process_time())

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.process_time())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.bits = logs.get("eval_bits_per_byte", self.bits)


def train(candidate: Candidate, steps: int, seed: int, work: Path, evaluate: bool) -> Clock:
    """Train a candidate with the real recipe, as runs/new.py writes it."""
    folder, vocab_size = work / "run", candidate.shape.vocab_size
    shutil.rmtree(folder, ignore_errors=True)
    model = work / "model.json"
    model.write_text(json.dumps(model_config(candidate.shape, candidate.length)))
    rows = candidate.batch // candidate.length
    micro = min(rows, LARGEST_BATCH)
    decay = {
        "num_decay_steps": max(1, round(rules.DECAY_SHARE * steps)),
        "decay_type": "linear",
        "min_lr_ratio": rules.END_OF_DECAY,
    }
    options = {
        "train_data": work / f"shards-{vocab_size}/train",
        "eval_data": work / f"shards-{vocab_size}/eval",
        "tokenizer": work / f"tokenizer-{vocab_size}",
        "model_config": model,
        "block_size": candidate.length,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": rows // micro,
        "max_steps": steps,
        "optimizer": "muon",
        "learning_rate": candidate.rate,
        "optim_args": f"adamw_lr={candidate.embedding * candidate.rate:g}",
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": decay,
        "warmup_steps": rules.warmup_steps(candidate.shape.parameters, candidate.batch, steps),
        "weight_decay": rules.WEIGHT_DECAY,
        "adam_beta2": 0.95,
        "bf16": False,
        "use_cpu": True,
        "seed": seed,
        "output_dir": folder,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": steps,
        "save_strategy": "no",
        "logging_steps": max(1, steps // 10),
        "report_to": "none",
        "disable_tqdm": True,
    }
    clock = Clock()
    recipe.train(options, clock)
    return clock


def probe(candidate: Candidate, args: SweepArguments, work: Path) -> float:
    """Return the CPU seconds of a step: the median of a few, without the first.

    Measured once for each shape and batch, so that runs that differ in the rate only have the same number of steps.
    """
    path = work / "probes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    key = " ".join(map(str, candidate.step_key))
    if key not in known:
        known[key] = measure_step(candidate, args, work)
        path.write_text(json.dumps(known, indent=2))
    return known[key]


def measure_step(candidate: Candidate, args: SweepArguments, work: Path) -> float:
    ends = train(candidate, PROBE_STEPS, args.seed, work, evaluate=False).ends
    seconds = sorted(after - before for before, after in zip(ends[1:], ends[2:], strict=False))
    return seconds[len(seconds) // 2]


def run(candidate: Candidate, minutes: float, args: SweepArguments, work: Path) -> dict[str, Any]:
    """Train a candidate for the budget, and return the result as it is stored."""
    prepare(args, work, candidate.shape.vocab_size)
    steps = max(2, round(minutes * 60 / probe(candidate, args, work)))
    clock = train(candidate, steps, args.seed, work, evaluate=True)
    return {
        **{"minutes": minutes, "seed": args.seed, "key": candidate.key},
        **{"parameters": candidate.shape.parameters, "steps": steps, "tokens": steps * candidate.batch},
        **{"cpu_seconds": round(clock.ends[-1] - clock.ends[0], 1), "bits_per_byte": round(clock.bits, 4)},
        **{"date": time.strftime("%Y-%m-%d"), "machine": machine()},
    }


def measure_speed(center: Candidate, args: SweepArguments, work: Path) -> float:
    """Return the FLOP/s of this machine, Muon's included, with a candidate; measured once."""
    path = work / "speed.json"
    if not path.exists():
        prepare(args, work, center.shape.vocab_size)
        flops = center.batch * center.shape.flops_per_token(center.length) + center.shape.muon_flops()
        path.write_text(json.dumps(flops / probe(center, args, work)))
    return json.loads(path.read_text())


# --- table and picture ---


def read_results(work: Path) -> list[dict[str, Any]]:
    path = work / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find(results: list[dict[str, Any]], minutes: float, candidate: Candidate, seed: int) -> dict[str, Any] | None:
    wanted = (minutes, candidate.key, seed)
    return next((each for each in results if (each["minutes"], each["key"], each["seed"]) == wanted), None)


def write_report(planned: dict[float, list[Candidate]], args: SweepArguments, speed: float, work: Path) -> None:
    """Write the table of all finished runs and, if there is one, the picture."""
    results = read_results(work)
    sections, best_of = [], {}
    for minutes, group in planned.items():
        found = [(each, find(results, minutes, each, args.seed)) for each in group]
        found = [(each, result) for each, result in found if result]
        if not found:
            continue
        best = min(result["bits_per_byte"] for _, result in found)
        best_of[minutes] = (found, best)
        sections.append(f"## {minutes:g} CPU-minutes\n\n{to_table(found, best)}\n\n{verdict(found, best, len(group))}")
    seconds = f"{speed / 1e9:.0f} GFLOP/s on one thread; the rules assume {CORE_FLOPS / 1e9:.0f}"
    title = "# The rules' choice and its neighbours"
    with write_atomically(work / "sweep.md") as partial:
        partial.write_text("\n\n".join([title, f"Measured: {seconds}.", *sections]) + "\n", encoding="utf-8")
    if best_of:
        plot(best_of, work / "sweep.png")


def to_table(found: list[tuple[Candidate, dict[str, Any]]], best: float) -> str:
    rows = []
    for each, result in sorted(found, key=lambda pair: pair[1]["bits_per_byte"]):
        bits = result["bits_per_byte"]
        rows.append([each.name, f"{result['parameters'] / 1e6:.2f}M, {describe(each.shape)}", f"{each.batch:,}",
                     f"{each.rate:.1e}", f"{result['steps']:,}", f"{result['tokens'] / 1e6:.2f}M",
                     f"{result['cpu_seconds']:.0f}", f"{bits:.3f}", f"{100 * (bits / best - 1):+.1f}%"])  # fmt: skip
    header = ["run", "model", "batch", "rate", "steps", "tokens", "CPU s", "bits per byte", "over the best"]
    return markdown_table(header, rows)


def verdict(found: list[tuple[Candidate, dict[str, Any]]], best: float, planned: int) -> str:
    """Return how far the rules' choice is from the best, in a sentence."""
    ours = next((result["bits_per_byte"] for each, result in found if each.name == "rules"), None)
    if ours is None:
        return "The rules' choice has not run yet."
    distance = ours / best - 1
    goal = "within the goal" if distance <= GOAL else "**outside** the goal"
    waiting = f" Not run yet: {planned - len(found)}." if len(found) < planned else ""
    return f"The rules' choice is {100 * distance:.1f}% from the best, {goal} of {GOAL:.0%}.{waiting}"


def plot(best_of: dict[float, tuple[list[tuple[Candidate, dict[str, Any]]], float]], path: Path) -> None:
    """Draw bits per byte of every run, a row of points per budget."""
    figure = Figure(figsize=(9, 1 + 1.8 * len(best_of)), layout="constrained")
    axes = figure.subplots(len(best_of), squeeze=False)[:, 0]
    for panel, (minutes, (found, best)) in zip(axes, best_of.items(), strict=True):
        for row, (each, result) in enumerate(found):
            color = "tab:red" if each.name == "rules" else "tab:blue"
            panel.plot(result["bits_per_byte"], row, "o", color=color)
        panel.set_yticks(range(len(found)), [each.name for each, _ in found], fontsize=7)
        panel.axvspan(best, best * (1 + GOAL), alpha=0.15)
        panel.set_title(f"{minutes:g} CPU-minutes; shaded: within {GOAL:.0%} of the best", fontsize=9)
    axes[-1].set_xlabel("bits per byte of held-out text")
    with write_atomically(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def main() -> None:
    (args,) = parse_arguments(SweepArguments, description=__doc__)
    files = find_files(args.text)
    args.text = [glob.escape(str(file.absolute())) for file in files]
    torch.set_num_threads(1)
    work = Path(args.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    text_bytes = sum(bytes_of_text(file) for file in files)
    if text_bytes < rules.LEAST_TEXT:
        raise UserError(f"--text has {text_bytes / 1000:,.0f} kB; give at least a few MB")
    speed = measure_speed(choose(min(args.minutes), CORE_FLOPS, text_bytes), args, work)
    planned = {minutes: candidates(choose(minutes, speed, text_bytes), args.vary) for minutes in sorted(args.minutes)}
    for minutes, group in planned.items():
        for candidate in group:
            if find(read_results(work), minutes, candidate, args.seed):
                continue
            result = run(candidate, minutes, args, work)
            with (work / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{minutes:g} min, {candidate.name}: {result['bits_per_byte']} bits per byte", flush=True)
            write_report(planned, args, speed, work)
    write_report(planned, args, speed, work)
    print(f"{work}/sweep.md and sweep.png")


if __name__ == "__main__":
    run_script(main)
