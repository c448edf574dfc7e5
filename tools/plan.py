"""Plan a run: does it fit, does it finish in time, what does it cost, and how good does the model become?

    python tools/plan.py --config pretrain/configs/buddygpt-0.1b.yaml --gpu 3090 --gpus 1 --hours 24
    python tools/plan.py --model_config mini-qwen-1b --memory 12GB --block_size 1024 --per_device_train_batch_size 1
    python tools/plan.py --stage sft --config sft/configs/buddygpt-0.1b.yaml --model_config buddygpt-0.1b --gpu 3090
    python tools/plan.py --gpu cpu --cores 2 --hours 1    # no model: which size suits this budget?

Reads the keys of the recipe, allocates no tensors and needs no GPU. Exit status 1 means that the run does not fit.
Memory is measured on fake tensors (buddygpt.planning.step_memory). Speed comes from measurements on such a machine
(tools/benchmarks/results) if there are any, otherwise from an assumption that the output names.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import PreTrainedConfig, TrainingArguments
from trl import DPOConfig, ModelConfig, SFTConfig

from buddygpt.cli.arguments import parse_arguments, read_option
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, library_errors, reading, run_script
from buddygpt.cli.tables import markdown_table
from buddygpt.model.parameters import count_parameters
from buddygpt.model.presets import load_config
from buddygpt.planning.hardware import GPUS, Machine, Speed, expected_speed, find_machine
from buddygpt.planning.memory import Fit, MemoryPlan, describe_memory, gib
from buddygpt.planning.rules import describe_expectation, expected_bits_per_byte, plan_budget
from buddygpt.planning.setups import read_setup, tuned_rows
from buddygpt.pretrain.pretrain import PretrainArguments
from buddygpt.training.flops import flops_per_token
from buddygpt.training.tuning import TuningArguments

STAGES = ("pretrain", "sft", "dpo")
BIG_TEXT = 1e12  # bytes: a budget is planned as if there were enough text


@dataclass
class MachineArguments:
    """What a run is planned for."""

    gpu: str | None = field(
        default=None, metadata={"help": f"cpu, laptop, an Apple chip such as M2, or one of {', '.join(GPUS)}."}
    )
    memory: str | None = field(default=None, metadata={"help": "Memory of it: 12GB (10^9 bytes) or 12GiB (2^30)."})
    gpus: int = field(default=1, metadata={"help": "Number of GPUs (data parallel)."})
    cores: int | None = field(default=None, metadata={"help": "Cores of a CPU. Default: all of this machine."})
    hours: float = field(default=24.0, metadata={"help": "Hours of training."})
    price_per_hour: float | None = field(default=None, metadata={"help": "Price of one GPU per hour."})
    mfu: float | None = field(
        default=None,
        metadata={"help": "Share of the GPU's peak that training reaches. Default: measured if possible, else 0.3."},
    )
    accelerate_config: str | None = field(default=None, metadata={"help": "File that sets the ZeRO stage or FSDP."})
    zero_stage: int = field(
        default=0, metadata={"help": "ZeRO stage, if accelerate_config is not given.", "choices": [0, 1, 2, 3]}
    )
    stage: Literal["pretrain", "sft", "dpo"] = field(default="pretrain", metadata={"help": "What the recipe is for."})


@dataclass
class PlanArguments(MachineArguments, PretrainArguments):
    train_data: str | None = field(default=None, metadata={"help": "Not read by the planner."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer; a folder sets the vocabulary size."})
    optimizer: str | None = field(
        default=None,
        metadata={"help": "Default: from the recipe's `optim`.", "choices": ["adamw", "adamw_8bit", "muon"]},
    )


@dataclass
class PlanTuningArguments(MachineArguments, TuningArguments):
    train_files: list[str] = field(default_factory=list, metadata={"help": "Not read by the planner."})
    loss_on: list[str] = field(default_factory=list, metadata={"help": "Not read by the planner."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer; a folder sets the vocabulary size."})
    model_config: str | None = field(
        default=None, metadata={"help": "Preset or config JSON of the model, if its checkpoint does not exist yet."}
    )
    vocab_size: int | None = field(default=None, metadata={"help": "Entries of the vocabulary."})


class PlannedTraining(TrainingArguments):
    """Training arguments that are not checked against this machine, since a laptop may plan a run for a GPU."""

    def __post_init__(self):
        pass


class PlannedSFT(SFTConfig):
    def __post_init__(self):
        pass


class PlannedDPO(DPOConfig):
    def __post_init__(self):
        pass


def read_arguments() -> tuple[Any, TrainingArguments, ModelConfig | None]:
    """Return the options, those of the trainer, and those of the model for SFT and DPO."""
    stage = read_option("stage") or "pretrain"
    if stage not in STAGES:
        raise UserError(f"--stage {stage}: use one of {', '.join(STAGES)}")
    if stage == "pretrain":
        return (*parse_arguments(PlanArguments, PlannedTraining, description=__doc__), None)
    trainer = PlannedSFT if stage == "sft" else PlannedDPO
    return parse_arguments(PlanTuningArguments, trainer, ModelConfig, description=__doc__)


def read_model(args: Any, model_args: ModelConfig | None) -> PreTrainedConfig:
    """Return the config of the model, with the vocabulary size that the recipe would set."""
    name = args.model_config or (model_args or args).model_name_or_path
    if name is None:
        raise UserError("give model_config: a preset's name or a config JSON")
    vocab_size = args.vocab_size
    if vocab_size is None and args.model_config and args.tokenizer and Path(args.tokenizer).is_dir():
        vocab_size = len(load_tokenizer(args.tokenizer))
    try:
        return load_config(name, **({} if vocab_size is None else {"vocab_size": vocab_size}))
    except Exception as error:  # transformers raises many kinds for odd configs
        raise UserError(f"cannot read the model config {name}: {error}") from error


def require_positive(args: Any, training: TrainingArguments) -> None:
    """Raise UserError for a number that must be positive and is not."""
    positive = {name: getattr(args, name) for name in ("gpus", "hours", "price_per_hour", "mfu", "cores")}
    positive["block_size"] = getattr(args, "block_size", None)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"):
        positive[name] = getattr(training, name, None)
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"--{name} ({value}) must be more than 0")
    if args.mfu is not None and args.mfu > 1:
        raise UserError(f"--mfu {args.mfu}: must be a share of the peak, such as 0.4")


def zero_stage(args: MachineArguments) -> int:
    """Return the ZeRO stage of the options or of the accelerate config; FSDP counts as 2 or 3."""
    if args.accelerate_config is None:
        return args.zero_stage
    path = Path(args.accelerate_config)
    if not path.is_file():
        raise UserError(f"--accelerate_config {path} is not a file")
    with reading(path):
        if path.stat().st_size > 1_000_000:
            raise ValueError("larger than any config")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(error) from error
        if content.get("distributed_type") == "FSDP":
            return 3 if content["fsdp_config"].get("fsdp_reshard_after_forward", True) else 2
        stage = content.get("deepspeed_config", {}).get("zero_stage", 0)
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is {stage}")
        return stage


def refusals(training: TrainingArguments, plan: MemoryPlan, alternatives: list[Fit]) -> list[str]:
    """Return the reasons why the run is not possible; empty if it is."""
    found = []
    machine = plan.machine
    wants_bf16 = training.bf16 or plan.setup.precision == "bf16_params"
    if not machine.has_bf16 and machine.kind == "gpu" and wants_bf16:
        found.append(
            f"a {machine.name} has no bfloat16: set `bf16: false` and `fp16: true` in the recipe, and "
            "mixed_precision: fp16 in the accelerate config (FlashAttention-2 does not run on it either)"
        )
    elif machine.kind != "gpu" and (training.bf16 or training.fp16):
        found.append(f"{machine.title} trains in float32: set `bf16: false` (on most CPUs, bf16 is many times slower)")
    if plan.setup.optimizer == "muon" and plan.setup.zero_stage:
        found.append("Muon needs whole matrices, which ZeRO splits: use DDP or AdamW")
    if not plan.fits:
        found.append(
            f"{gib(plan.as_requested.peak)} GiB do not fit into {gib(plan.usable)} GiB. What would: "
            f"{plan.remedies(alternatives)}"
        )
    return found


def recipe_hours(training: TrainingArguments, plan: MemoryPlan, speed: Speed, work: float) -> float | None:
    """Return the hours of the recipe's steps; None if it is measured in epochs."""
    if training.max_steps <= 0:
        return None
    return training.max_steps * step_tokens(training, plan) * work / speed.flops / 3600


def step_tokens(training: TrainingArguments, plan: MemoryPlan) -> int:
    return plan.rows * plan.setup.block_size * plan.setup.accumulation * plan.setup.gpus


def describe_time(args: Any, training: TrainingArguments, plan: MemoryPlan, speed: Speed | None) -> str:
    """Return a table of speed, tokens, bits per byte and cost in the given time."""
    work = flops_per_token(plan.config, plan.setup.block_size)
    rows = [["work", f"{work / 1e9:.2f} GFLOP per token"]]
    if speed:
        rows += _describe_speed(args, training, plan, speed, work)
    else:
        rows.append(["tokens/s", "unknown: give a --gpu whose peak is known, and a recipe in bf16 or fp16"])
    if args.price_per_hour is not None:
        cost = args.price_per_hour * args.gpus * args.hours
        rows.append(["cost", f"{cost:,.2f} ({args.gpus} x {args.hours:g} h at {args.price_per_hour:g})"])
    return "## Time\n\n" + markdown_table(["", ""], rows, ["---", "---"])


def _describe_speed(
    args: Any, training: TrainingArguments, plan: MemoryPlan, speed: Speed, work: float
) -> list[list[str]]:
    """Return the rows that follow from the speed of the machine and the FLOPs of a token."""
    rate = speed.flops / work
    tokens = rate * args.hours * 3600
    count = count_parameters(plan.config)
    active = count.active - (count.total - count.non_embedding)
    scaling = " (all GPUs, assuming no loss to communication)" if args.gpus > 1 else ""
    machine, rows = plan.machine, []
    if speed.peak:
        kind = "float32" if machine.kind == "apple" else "dense bf16" if machine.has_bf16 else "dense fp16"
        rows.append(["peak", f"{speed.peak / 1e12:,.1f} TFLOP/s (datasheet, {kind})"])
        rows.append(["MFU", f"{speed.flops / speed.peak / machine.count:.0%}, {speed.source}"])
    else:
        rows.append(["speed", f"{speed.source}"])
    rows.append(["tokens/s", f"{rate:,.0f}{scaling}"])
    rows.append([f"in {args.hours:g} h", f"{tokens / 1e9:.4g}B tokens, {tokens / active:,.0f} per active parameter"])
    if args.stage == "pretrain":
        optimizer = "muon" if plan.setup.optimizer == "muon" else "adamw"
        bits = expected_bits_per_byte(count.active, tokens, optimizer)
        rows.append(["bits per byte", f"about {bits:.2f} on held-out text: {describe_expectation(active, tokens)}"])
    hours = recipe_hours(training, plan, speed, work)
    if hours is not None:
        step = step_tokens(training, plan)
        rows.append(["the recipe", f"{training.max_steps:,} steps of {step:,} tokens: {hours:,.1f} h"])
    return rows


def describe_model(args: Any, name: str, plan: MemoryPlan) -> str:
    """Return a table of the model's size and of how it is trained."""
    count, setup = count_parameters(plan.config), plan.setup
    precision = {
        "fp32": "float32",
        "fp32_master": "16-bit autocast over float32 weights",
        "bf16_params": "bfloat16 weights, gradients and optimizer",
    }[setup.precision]
    training = [precision, setup.optimizer, f"{'with' if setup.checkpointing else 'without'} activation checkpointing"]
    training.append(f"{setup.accumulation} micro-batch{'es' if setup.accumulation > 1 else ''} per step")
    if setup.zero_stage:
        training.append(f"ZeRO-{setup.zero_stage}")
    rows = [
        ["parameters", f"{count.total / 1e6:,.1f}M; {count.non_embedding / 1e6:,.1f}M without embedding and head; "
                       f"{count.active / 1e6:,.1f}M active per token"],
        ["vocabulary", f"{plan.config.vocab_size:,}"],
        ["training", ", ".join(training)],
    ]  # fmt: skip
    stage = "" if args.stage == "pretrain" else f", {args.stage.upper()}"
    return f"# {name}{stage} on {plan.machine.title}\n\n" + markdown_table(["", ""], rows, ["---", "---"])


def verdict(reasons: list[str], args: Any, training: TrainingArguments, plan: MemoryPlan, speed: Speed | None) -> str:
    """Return whether the run fits and whether it finishes in time, a line each."""
    if reasons:
        lines = [f"Fits: **No**: {reason}." for reason in reasons]
    else:
        lines = [f"Fits: **Yes**: {gib(plan.as_requested.peak)} GiB at the peak, {gib(plan.usable)} are available."]
    hours = speed and recipe_hours(training, plan, speed, flops_per_token(plan.config, plan.setup.block_size))
    if hours is None:
        reason = "its speed is unknown" if speed is None else "the recipe sets no max_steps"
        lines.append(f"Finishes in time: **unknown**: {reason}.")
    else:
        answer = "Yes" if hours <= args.hours else "No"
        lines.append(f"Finishes in time: **{answer}**: about {hours:,.2g} of {args.hours:g} h.")
    return "\n".join(lines)


def suggest_size(args: MachineArguments, machine: Machine) -> str:
    """Return the size of model that the rules choose for the hours on this machine."""
    speed = expected_speed(machine, mfu=args.mfu)
    if speed is None:
        raise UserError("give model_config: a preset's name or a config JSON; or a --gpu whose peak is known")
    run = plan_budget(speed.flops * args.hours * 3600, speed.flops, BIG_TEXT)
    shape = run.shape
    bits = expected_bits_per_byte(shape.parameters, run.tokens)
    rows = [
        ["parameters", f"{shape.parameters / 1e6:,.1f}M: {shape.num_hidden_layers} layers, width {shape.hidden_size}, "
                       f"vocabulary {shape.vocab_size:,}"],
        ["tokens", f"{run.tokens / 1e6:,.1f}M: {run.steps:,} steps of {run.batch:,}"],
        ["bits per byte", f"about {bits:.2f}: {describe_expectation(shape.parameters, run.tokens)}"],
        ["speed", speed.source],
    ]  # fmt: skip
    size = f"{shape.parameters / 1e6:,.0f}M"
    title = f"A model of about **{size}** parameters suits {args.hours:g} h of pretraining on {machine.title}."
    table = markdown_table(["", ""], rows, ["---", "---"])
    return f"{title}\n\n{table}\n\nIts recipe: `python runs/new.py NAME --gpu {args.gpu} --hours {args.hours:g}`"


def main() -> None:
    args, training, model_args = read_arguments()
    machine = find_machine(args.gpu, args.memory, args.gpus, args.cores)
    require_positive(args, training)
    name = args.model_config or (model_args or args).model_name_or_path
    if name is None and args.gpu and args.stage == "pretrain":
        print(suggest_size(args, machine))
        return
    config = read_model(args, model_args)
    setup = read_setup(args.stage, machine, args, training, model_args, zero_stage(args))
    with library_errors(f"cannot build {name}", "Fix its config"):
        plan = MemoryPlan(config, setup, machine, tuned_rows(args.stage, training))
    alternatives = [] if plan.fits else plan.alternatives()
    trains_in_16_bit = setup.precision != "fp32"
    speed = None
    if trains_in_16_bit or machine.kind != "gpu":
        speed = expected_speed(machine, Path(name).stem, training.torch_compile, args.mfu)
    reasons = refusals(training, plan, alternatives)
    sections = [
        verdict(reasons, args, training, plan, speed),
        describe_model(args, name, plan),
        describe_memory(plan, alternatives),
        describe_time(args, training, plan, speed),
    ]
    print("\n\n".join(sections))
    if reasons:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
