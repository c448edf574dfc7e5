"""Tokens and CPU seconds until a small model reaches a fixed loss on held-out text: the table of docs/speedrun.md.

    python tools/benchmarks/speedrun.py --text FOLDER                     # every attempt of speedrun.yaml, hours
    python tools/benchmarks/speedrun.py --text FOLDER --attempts adamw muon-linear --seeds 1 2 3
    python tools/benchmarks/speedrun.py --text FOLDER --attempts minimind-2e-3 --minimind CHECKOUT
    python tools/benchmarks/speedrun.py --only_tables true

FOLDER holds files `zh_*.jsonl.gz` and `en_*.jsonl.gz` with a column `text`. The first call trains the tokenizers and
prepares the shards; all runs read the same text and are judged on the same held-out documents. An attempt of
`speedrun.yaml` changes options of `pretrain/pretrain.py` or fields of the model's config. A finished run of an attempt
and a seed is a line of `results/speedrun.jsonl` and is not repeated. One thread trains; evaluation is not counted.
"""

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import minimind
import recipe
import torch
import yaml
from ab import ROOT, insert_table, machine
from transformers import TrainerCallback

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import write_atomically
from buddygpt.cli.tables import markdown_table

HERE = Path(__file__).parent
RESULTS = HERE / "results/speedrun.jsonl"
PAGE = ROOT / "docs/speedrun.md"
VOCABULARY = 6400  # entries, of MiniMind's tokenizer and of all attempts that do not change it


@dataclass
class SpeedrunArguments:
    text: str | None = field(default=None, metadata={"help": "Folder of zh_*.jsonl.gz and en_*.jsonl.gz files."})
    attempts: list[str] | None = field(default=None, metadata={"help": "Names in speedrun.yaml. Default: all."})
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "Seeds of data order and weights."})
    minimind: str | None = field(default=None, metadata={"help": "Checkout of MiniMind, for its own trainer."})
    only_tables: bool = field(default=False, metadata={"help": "Run nothing; write the tables of the stored results."})
    work: str = field(default="outputs/speedrun", metadata={"help": "Folder of tokenizers, shards and runs."})


@dataclass
class Attempt:
    """One entry of `speedrun.yaml`, with the options and the model of the attempt that it builds on.

    Attributes:
        base: The attempt that it changes.
        options: Keys of the pretraining recipe, without `max_steps`; or of MiniMind's script.
        model: Fields of the model's config.
        trainer: "recipe", or "minimind" for its own script and model.
        tokens: Tokens to train on; the schedule ends there.
        is_race: Evaluate often towards the end, to see when it reaches the target.
        was_removed: Its code brought nothing and was not kept; only its results are.
        what: What it changes, for the table.
        kept: What became of it, for the table.
    """

    name: str
    base: str | None
    options: dict[str, Any]
    model: dict[str, Any]
    trainer: str
    tokens: int
    is_race: bool
    was_removed: bool
    what: str
    kept: str


def read_attempts(path: Path = HERE / "speedrun.yaml") -> tuple[dict[str, Attempt], float]:
    """Return the attempts by name, and the target in bits per byte."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    attempts: dict[str, Attempt] = {}
    for name, entry in (content["races"] | content["screening"]).items():
        base = attempts[entry["base"]] if "base" in entry else None
        options = (base.options if base else content["options"]) | entry.get("options", {})
        model = (base.model if base else content["model"]) | entry.get("model", {})
        tokens = int(entry.get("tokens", base.tokens if base else 0))
        is_race = name in content["races"]
        texts = entry.get("was_removed", False), entry["what"], entry.get("kept", "")
        trainer = entry.get("trainer", "recipe")
        if trainer == "minimind":
            options, model = entry["options"], {}
        attempts[name] = Attempt(name, entry.get("base"), options, model, trainer, tokens, is_race, *texts)
    return attempts, content["target"]


def prepare(text: Path, work: Path, vocab_size: int) -> None:
    """Train the tokenizer and write the shards of one vocabulary, unless they exist."""
    files = [str(path) for pattern in ("zh_*", "en_*") for path in sorted(text.glob(f"{pattern}.jsonl.gz"))]
    if not files:
        raise UserError(f"--text {text}: no zh_*.jsonl.gz or en_*.jsonl.gz file there")
    tokenizer, shards = folders(work, vocab_size)
    commands = {
        tokenizer: ["tokenizer/train_tokenizer.py", "--files", *files, "--vocab_size", vocab_size],
        shards: ["data/prepare_pretrain.py", "--sources", *files, "--clean", "text", "--deduplicate", "minhash",
                 "--eval_fraction", 0.005, "--workers", 1, "--tokenizer", tokenizer],
    }  # fmt: skip
    recipe.make_missing(commands)


def folders(work: Path, vocab_size: int) -> tuple[Path, Path]:
    """Return where tokenizer and shards of a vocabulary are."""
    return work / f"tokenizer-{vocab_size}", work / f"shards-{vocab_size}"


class Clock(TrainerCallback):
    """Counts the CPU seconds of training without evaluation, and evaluates at some shares of the run."""

    def __init__(self, is_race: bool) -> None:
        self.shares = [0.5, 0.85, 0.9, 0.95, 1] if is_race else [1]
        self.seconds = 0.0
        self.evaluations: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.process_time()
        self.steps = {round(state.max_steps * share) for share in self.shares}

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        self.seconds += now - self.mark
        self.mark = now
        control.should_evaluate = state.global_step in self.steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_bits_per_byte" in logs:
            row = {"step": state.global_step, "tokens": state.num_input_tokens_seen}
            row |= {"cpu_seconds": round(self.seconds, 1), "bits_per_byte": round(logs["eval_bits_per_byte"], 4)}
            self.evaluations.append(row)
            self.mark = time.process_time()


def train(attempt: Attempt, seed: int, work: Path) -> list[dict[str, float]]:
    """Train with the real recipe; return its evaluations."""
    folder, model = work / "run", work / "model.json"
    tokenizer, shards = folders(work, attempt.model["vocab_size"])
    shutil.rmtree(folder, ignore_errors=True)
    model.write_text(json.dumps(attempt.model))
    block = attempt.options["per_device_train_batch_size"] * attempt.options["block_size"]
    options = attempt.options | {"max_steps": round(attempt.tokens / block), "seed": seed, "output_dir": folder}
    options |= {"train_data": shards / "train", "eval_data": shards / "eval", "tokenizer": tokenizer}
    options |= {"model_config": model}
    options |= {"eval_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    clock = Clock(attempt.is_race)
    recipe.train(options, clock)
    return clock.evaluations


def run(attempt: Attempt, seed: int, args: SpeedrunArguments, work: Path) -> dict[str, Any]:
    """Run an attempt; return the result as it is stored."""
    if attempt.was_removed:
        raise UserError(f"{attempt.name} has no result with seed {seed}, and its code was not kept")
    if args.text is None:
        raise UserError(f"{attempt.name} has no result with seed {seed}: give the folder of the text as --text")
    vocab_size = attempt.model.get("vocab_size", VOCABULARY)
    prepare(Path(args.text).absolute(), work, vocab_size)
    if attempt.trainer == "minimind":
        if args.minimind is None:
            raise UserError(f"{attempt.name} runs MiniMind's own script: give a checkout as --minimind")
        checkout = Path(args.minimind).absolute()
        evaluations = minimind.train(checkout, work, *folders(work, vocab_size), attempt.options, attempt.tokens, seed)
    else:
        evaluations = train(attempt, seed, work)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        **{"attempt": attempt.name, "seed": seed, "commit": commit.strip(), "date": time.strftime("%Y-%m-%d")},
        **{"options": attempt.options, "model": attempt.model, "tokens": attempt.tokens},
        **{"evaluations": evaluations, "machine": machine()},
    }


def read_results() -> list[dict[str, Any]]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


# Tables --------------------------------------------------------------------------------------------------------------


def race_table(attempts: dict[str, Attempt], results: list[dict[str, Any]], target: float) -> str:
    """Return the table of the attempts that race to the target."""
    rows = []
    for attempt in attempts.values():
        runs = [result["evaluations"] for result in results if result["attempt"] == attempt.name]
        if not (attempt.is_race and runs):
            continue
        reached = [next((row for row in run if row["bits_per_byte"] <= target), None) for run in runs]
        times = [row for row in reached if row]
        cells = [f"not reached by {len(runs) - len(times)}"] * 2
        if len(times) == len(runs):
            tokens = spread([row["tokens"] / 1e6 for row in times], "{:.2f}")
            cells = [f"{tokens} M", spread([row["cpu_seconds"] for row in times], "{:.0f}")]
        ends = spread([run[-1]["bits_per_byte"] for run in runs], "{:.3f}")
        rows.append([f"`{attempt.name}`", attempt.what, str(len(runs)), *cells, ends, _commits(results, attempt.name)])
    header = ["attempt", "what it is", "seeds", "tokens to the target", "CPU seconds", "bits per byte at its end"]
    return markdown_table([*header, "commit"], rows, ["---", "---", *["--:"] * 4, "---"])


def screening_table(attempts: dict[str, Attempt], results: list[dict[str, Any]]) -> str:
    """Return the table of the attempts that were stopped after a fixed number of tokens.

    A difference is the median over the seeds that the attempt and its base share, if both read the same tokens.
    """
    ends: dict[str, dict[int, dict[str, float]]] = {}
    for result in results:
        ends.setdefault(result["attempt"], {})[result["seed"]] = result["evaluations"][-1]
    rows = []
    for attempt in attempts.values():
        if attempt.is_race or attempt.name not in ends:
            continue
        runs, base = ends[attempt.name], attempts[attempt.base]
        comparison = ["", ""]
        pairs = [(row, ends[base.name][seed]) for seed, row in runs.items() if seed in ends.get(base.name, {})]
        if pairs and attempt.tokens == base.tokens:
            differences = [row["bits_per_byte"] - other["bits_per_byte"] for row, other in pairs]
            comparison = [f"`{base.name}`", spread(differences, "{:+.3f}")]
        cells = [f"`{attempt.name}`", attempt.what, f"{attempt.tokens:,}", str(len(runs))]
        cells.append(spread([row["bits_per_byte"] for row in runs.values()], "{:.3f}"))
        seconds = spread([row["cpu_seconds"] for row in runs.values()], "{:.0f}")
        rows.append([*cells, *comparison, seconds, attempt.kept])
    header = ["attempt", "what it changes", "tokens", "seeds", "bits per byte", "of", "difference", "CPU s", "kept"]
    return markdown_table(header, rows, ["---", "---", *["--:"] * 3, "---", "--:", "--:", "---"])


def spread(values: list[float], form: str) -> str:
    """Return the median, with the range if there are several values."""
    middle = form.format(median(values))
    if len(values) == 1:
        return middle
    return f"{middle} [{form.format(min(values))}, {form.format(max(values))}]"


def _commits(results: list[dict[str, Any]], name: str) -> str:
    return ", ".join(sorted({result["commit"] for result in results if result["attempt"] == name}))


def write_tables(attempts: dict[str, Attempt], target: float) -> None:
    """Replace the tables of docs/speedrun.md."""
    results = read_results()
    page = PAGE.read_text(encoding="utf-8")
    page = insert_table(page, "races", race_table(attempts, results, target))
    page = insert_table(page, "screening", screening_table(attempts, results))
    with write_atomically(PAGE) as path:
        path.write_text(page, encoding="utf-8")


def main() -> None:
    (args,) = parse_arguments(SpeedrunArguments, description=__doc__)
    attempts, target = read_attempts()
    names = list(attempts) if args.attempts is None else args.attempts
    names = [] if args.only_tables else names
    unknown = set(names) - set(attempts)
    if unknown:
        raise UserError(
            f"--attempts {' '.join(sorted(unknown))}: not in speedrun.yaml, which has {', '.join(attempts)}"
        )
    torch.set_num_threads(1)
    work = Path(args.work).absolute()
    os.chdir(ROOT)
    for seed in args.seeds:
        for name in names:
            if any((result["attempt"], result["seed"]) == (name, seed) for result in read_results()):
                continue
            result = run(attempts[name], seed, args, work)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
            print(f"{name}, seed {seed}: {result['evaluations'][-1]}", flush=True)
    write_tables(attempts, target)


if __name__ == "__main__":
    run_script(main)
