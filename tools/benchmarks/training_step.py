"""A training step of BuddyGPT and of stock code of the same dimensions, bare and in `Trainer`; shapes; compilation.

    python tools/benchmarks/training_step.py           # about 3 minutes on two cores
    python tools/benchmarks/training_step.py --quick   # seconds: does it run?

One number a variant and round: CPU seconds of a step. `Trainer`'s own work is in its steps; what it does before and
after training is not.
"""

import contextlib
import io
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from ab import Report, alternate, cpu_seconds
from bare_loop import BareLoop
from random_shards import make_shards
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script
from buddygpt.model import BuddyGPTConfig
from buddygpt.pretrain import pretrain


@dataclass
class TrainingStepArguments:
    rounds: int = field(default=5, metadata={"help": "Times each variant is measured."})
    steps: int = field(default=2, metadata={"help": "Training steps in one measurement."})
    rows: int = field(default=4, metadata={"help": "Rows of a batch."})
    length: int = field(default=256, metadata={"help": "Tokens in a row."})
    quick: bool = field(default=False, metadata={"help": "One round of a tiny shape; nothing is written."})


def sizes(quick: bool) -> dict[str, int]:
    """Dimensions that all dense variants share; 6.7M parameters."""
    if quick:
        return dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)  # fmt: skip
    return dict(vocab_size=6400, hidden_size=256, intermediate_size=832, num_hidden_layers=6, num_attention_heads=8,
                num_key_value_heads=4, head_dim=32, tie_word_embeddings=True)  # fmt: skip


def shapes(quick: bool) -> dict[str, object]:
    """Name -> config; the mixture has as many active feed-forward parameters as the dense layer."""
    common = sizes(quick)
    quarter, width = common["intermediate_size"] // 4, common["head_dim"]
    latent = {name: value for name, value in common.items() if name not in ("head_dim", "num_key_value_heads")}
    latent |= dict(kv_lora_rank=2 * width, qk_rope_head_dim=width // 2, qk_nope_head_dim=width, v_head_dim=width)
    experts = dict(n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=2, moe_intermediate_size=quarter)
    return {
        "BuddyGPT": BuddyGPTConfig(**common, use_qk_norm=True),
        "Qwen3": Qwen3Config(**common, max_position_embeddings=2048),
        "Qwen2": Qwen2Config(**{k: v for k, v in common.items() if k != "head_dim"}, max_position_embeddings=2048),
        "BuddyGPT, latent attention": BuddyGPTConfig(**latent),
        "BuddyGPT, mixture": BuddyGPTConfig(**common, use_qk_norm=True, **experts),
    }


class StepClock(TrainerCallback):
    """CPU seconds of each training step, from the end of the one before."""

    seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        if state.global_step > 1:
            self.seconds.append(now - self.last)
        self.last = now


def time_trainer(train) -> float:
    """Median CPU seconds of a step of the `Trainer` that `train` runs, without the first."""
    StepClock.seconds.clear()
    DEFAULT_CALLBACKS.append(StepClock)
    try:
        train()
    finally:
        DEFAULT_CALLBACKS.remove(StepClock)
    return median(StepClock.seconds)


def train_by_default(config, args: TrainingStepArguments) -> None:
    """transformers' `Trainer` with nothing set but what a processor needs."""
    ids = torch.randint(config.vocab_size, (args.rows * (args.steps + 1), args.length))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, use_cpu=True, max_steps=args.steps + 1, per_device_train_batch_size=args.rows,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        Trainer(AutoModelForCausalLM.from_config(config), settings, train_dataset=rows).train()


def train_by_recipe(config, args: TrainingStepArguments, data: Path) -> None:
    """pretrain/pretrain.py itself, with everything it shows and watches."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        options = {
            "train_data": data / "shards", "tokenizer": data / "tokenizer", "model_config": f"{folder}/config.json",
            "block_size": args.length, "per_device_train_batch_size": args.rows, "max_steps": args.steps + 1,
            "use_cpu": "true", "output_dir": f"{folder}/out", "save_strategy": "no", "disable_tqdm": "true",
        }  # fmt: skip
        argv, sys.argv = sys.argv, ["pretrain.py", *(f"--{name}={value}" for name, value in options.items())]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                pretrain.main()
        finally:
            sys.argv = argv


def main() -> None:
    (args,) = parse_arguments(TrainingStepArguments, description=__doc__)
    if args.quick:
        args.rounds, args.steps, args.rows, args.length = 1, 1, 2, 32
    configs = shapes(args.quick)
    loops = {
        f"{name}, bare loop": BareLoop(AutoModelForCausalLM.from_config(config), args.rows, args.length)
        for name, config in configs.items()
    }
    ours = configs["BuddyGPT"]
    if not args.quick:  # compiling alone takes a minute
        compiled = AutoModelForCausalLM.from_config(ours)
        loops["BuddyGPT, bare loop, compiled"] = BareLoop(compiled, args.rows, args.length, compile=True)
    variants = {
        name: lambda loop=loop: cpu_seconds(lambda: loop.steps(args.steps)) / args.steps
        for name, loop in loops.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        tokens = 64 * args.rows * args.length
        make_shards(Path(folder), tokens, ours.vocab_size)
        variants["BuddyGPT, Trainer"] = lambda: time_trainer(lambda: train_by_default(ours, args))
        variants["BuddyGPT, recipe"] = lambda: time_trainer(lambda: train_by_recipe(ours, args, Path(folder)))
        with tqdm(total=len(variants) * (args.rounds + 1), unit="run") as progress:
            samples = alternate(variants, args.rounds, progress)
    report = Report("training_step", ["variant", "CPU s a step", "ratio to the first"])
    report.add_samples(samples, "CPU s a step")
    report.finish(args)


if __name__ == "__main__":
    run_script(main)
