"""CPU time of a training step: against stock code, with each switch of the recipe, and with packed chats.

    python tools/benchmarks/training_step.py                    # about 8 minutes on two cores
    python tools/benchmarks/training_step.py --parts switches   # one of: stock, switches, packing
    python tools/benchmarks/training_step.py --quick            # checks in seconds that it runs

`stock` compares BuddyGPT with Qwen2 and Qwen3 of the same dimensions, in a bare loop, in `Trainer` and in the recipe.
`switches` changes one thing at a time in a bare loop. `packing` trains on chats with TRL's `SFTTrainer`, whose packed
rows are joined to one, and with that of sft/sft.py, which keeps them apart; the lengths of the chats are drawn from a
log-normal distribution. gpu.py compares the switches on a GPU.
"""

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from ab import BareLoop, Report, alternate, cpu_seconds, ratios, spread
from datasets import Dataset
from loader import make_shards, make_tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS
from trl import SFTConfig, SFTTrainer

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.model import BuddyGPTConfig
from buddygpt.pretrain import pretrain
from buddygpt.training.optimizers import muon_adamw
from buddygpt.training.packed_rows import PackedRowsTrainer


@dataclass
class TrainingStepArguments:
    parts: list[str] = field(
        default_factory=lambda: ["stock", "switches", "packing"], metadata={"help": "Comparisons to run."}
    )
    rounds: int = field(default=5, metadata={"help": "Measurements of each variant."})
    steps: int = field(default=2, metadata={"help": "Training steps in one measurement."})
    rows: int = field(default=4, metadata={"help": "Rows of a batch."})
    length: int = field(default=256, metadata={"help": "Tokens in a row."})
    chats: int = field(default=96, metadata={"help": "packing: chats in an epoch, in batches of twice the rows."})
    quick: bool = field(default=False, metadata={"help": "One round of a tiny shape; nothing is written."})


def sizes(quick: bool) -> dict[str, int]:
    """Return the dimensions that all dense variants share (6.7M parameters)."""
    if quick:
        return dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)  # fmt: skip
    return dict(vocab_size=6400, hidden_size=256, intermediate_size=832, num_hidden_layers=6, num_attention_heads=8,
                num_key_value_heads=4, head_dim=32, tie_word_embeddings=True)  # fmt: skip


def shapes(quick: bool) -> dict[str, object]:
    """Return name -> config. The mixture has as many active feed-forward parameters as the dense layer."""
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


def measure(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call [`alternate`] with a progress bar."""
    with tqdm(total=len(variants) * (rounds + 1), unit="run") as progress:
        return alternate(variants, rounds, progress)


def timed(loop: BareLoop, steps: int) -> Callable[[], float]:
    """Return a measurement: CPU seconds per step, over `steps` training steps."""
    return lambda: cpu_seconds(lambda: loop.steps(steps)) / steps


# Stock code ----------------------------------------------------------------------------------------------------------


class StepClock(TrainerCallback):
    """Records the CPU seconds of each training step after the first, from the end of the step before."""

    seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        if state.global_step > 1:
            self.seconds.append(now - self.last)
        self.last = now


def time_trainer(train: Callable[[], None]) -> float:
    """Return the median CPU seconds per step of the `Trainer` that `train` runs, without the first step."""
    StepClock.seconds.clear()
    DEFAULT_CALLBACKS.append(StepClock)
    try:
        train()
    finally:
        DEFAULT_CALLBACKS.remove(StepClock)
    return median(StepClock.seconds)


def train_by_default(config, args: TrainingStepArguments) -> None:
    """Train with transformers' `Trainer` and its defaults."""
    ids = torch.randint(config.vocab_size, (args.rows * (args.steps + 1), args.length))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, use_cpu=True, max_steps=args.steps + 1, per_device_train_batch_size=args.rows,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        Trainer(AutoModelForCausalLM.from_config(config), settings, train_dataset=rows).train()


def train_by_recipe(config, args: TrainingStepArguments, data: Path) -> None:
    """Train with pretrain/pretrain.py and all of its callbacks."""
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


def compare_stock(args: TrainingStepArguments) -> None:
    configs = shapes(args.quick)
    variants = {}
    for name, config in configs.items():
        loop = BareLoop(AutoModelForCausalLM.from_config(config), args.rows, args.length)
        variants[f"{name}, bare loop"] = timed(loop, args.steps)
    ours = configs["BuddyGPT"]
    if not args.quick:  # compilation takes a minute
        model = AutoModelForCausalLM.from_config(ours)
        loop = BareLoop(model, args.rows, args.length, compile=True)
        variants["BuddyGPT, bare loop, compiled"] = timed(loop, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), 64 * args.rows * args.length, ours.vocab_size)
        variants["BuddyGPT, Trainer"] = lambda: time_trainer(lambda: train_by_default(ours, args))
        variants["BuddyGPT, recipe"] = lambda: time_trainer(lambda: train_by_recipe(ours, args, Path(folder)))
        samples = measure(variants, args.rounds)
    report = Report("training_step", ["variant", "CPU s a step", "ratio to the first"])
    report.add_samples(samples, "CPU s a step")
    report.finish(args)


# Switches of the recipe ----------------------------------------------------------------------------------------------


def compare_switches(args: TrainingStepArguments) -> None:
    config = shapes(args.quick)["BuddyGPT"]

    def loop(checkpointing: bool = False, **options) -> BareLoop:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if checkpointing:
            model.activation_checkpointing_enable()
        return BareLoop(model, args.rows, args.length, **options)

    documents = torch.arange(args.length) % (args.length // 4)  # four per row
    loops = {
        "defaults (chunked loss head, AdamW, sdpa)": loop(),
        "full logits instead of the chunked head": loop(skip_logits=False),
        "isolate_documents": loop(position_ids=documents.expand(args.rows, -1)),
        "activation_checkpointing": loop(checkpointing=True),
        "optimizer: muon": loop(optimizer=lambda model: muon_adamw(model, weight_decay=0.1, lr=3e-4, fused=True)),
    }
    if not args.quick:
        loops["torch_compile"] = loop(compile=True)
    samples = measure({name: timed(loop, args.steps) for name, loop in loops.items()}, args.rounds)
    report = Report("speed_switches", ["switch", "CPU s a step", "ratio to the first"])
    report.add_samples(samples, "CPU s a step")
    report.finish(args)


# Packing -------------------------------------------------------------------------------------------------------------

PACKING = {"packing": True, "packing_strategy": "bfd"}
WAYS = {
    "padding": (SFTTrainer, {}),
    "padding, grouped by length": (SFTTrainer, {"train_sampling_strategy": "group_by_length"}),
    "packing, rows joined": (SFTTrainer, PACKING),
    "packing, rows apart (sft/sft.py)": (PackedRowsTrainer, PACKING),
}


def make_chats(args: TrainingStepArguments, vocab_size: int) -> Dataset:
    """Return rows of random ids. The median length is a fifth of the maximum."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(np.log(args.length / 5), 0.9, args.chats)).clip(4, args.length).astype(int)
    return Dataset.from_dict({"input_ids": [random.integers(3, vocab_size, size).tolist() for size in lengths]})


class Epoch:
    """Trains one epoch per call and returns the real tokens per CPU second; `share` is the share of real tokens."""

    def __init__(self, make_trainer: Callable[[], SFTTrainer], real_tokens: int) -> None:
        self.make_trainer, self.real_tokens = make_trainer, real_tokens
        batches = make_trainer().get_train_dataloader()
        self.share = real_tokens / sum(batch["input_ids"].numel() for batch in batches)

    def __call__(self) -> float:
        trainer = self.make_trainer()
        start = time.process_time()
        trainer.train()
        return self.real_tokens / (time.process_time() - start)


def compare_packing(args: TrainingStepArguments) -> None:
    config, rows = shapes(args.quick)["BuddyGPT"], 2 * args.rows
    chats = make_chats(args, config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder) / "tokenizer", config.vocab_size)

        def trainer(kind: type[SFTTrainer], options: dict) -> SFTTrainer:
            settings = SFTConfig(
                folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=args.length,
                num_train_epochs=1, save_strategy="no", disable_tqdm=True, logging_strategy="no",
                per_device_train_batch_size=1 + rows // 4 if options.get("packing") else rows, **options,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_config(config)
            return kind(model, settings, train_dataset=chats, processing_class=tokenizer)

        real = sum(map(len, chats["input_ids"]))
        variants = {name: Epoch(lambda way=way: trainer(*way), real) for name, way in WAYS.items()}
        samples = measure(variants, args.rounds)
    report = Report("packing", ["way", "share of real tokens", "real tokens a CPU second", "ratio to the first"])
    for name, values in samples.items():
        share, by_round = variants[name].share, ratios(values, samples["padding"])
        report.add([name, f"{share:.1%}", spread(values), spread(by_round)], name=name, share=share, values=values)
    report.finish(args)


PARTS = {"stock": compare_stock, "switches": compare_switches, "packing": compare_packing}


def main() -> None:
    (args,) = parse_arguments(TrainingStepArguments, description=__doc__)
    if unknown := set(args.parts) - set(PARTS):
        raise UserError(f"parts: {', '.join(unknown)} is not one of {', '.join(PARTS)}")
    if args.quick:
        args.rounds, args.steps, args.rows, args.length, args.chats = 1, 1, 2, 32, 8
    for part in args.parts:
        PARTS[part](args)


if __name__ == "__main__":
    run_script(main)
