"""Plan before you pay: does a recipe fit on a GPU, how far does it come in the time, and what does that cost?

    python tools/plan.py --config pretrain/configs/buddygpt-0.1b.yaml --gpu 3090 --gpus 1 --hours 24
    python tools/plan.py --model_config mini-qwen-1b --memory 12GB --block_size 1024 --per_device_train_batch_size 1

Reads the recipe's own keys, allocates nothing, runs on any machine. Exit status 1 where the answer is no. Memory is
counted (tools/memory.py, held against measured peaks by benchmarks/memory_model.py); speed is taken from what was
measured on such a GPU (tools/benchmarks/results), and where nothing was, from an assumption that is named as one.
"""

import json
import re
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from memory import MemoryModel, Setup, count_activations
from transformers import PreTrainedConfig, TrainingArguments

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, run_script
from buddygpt.model.parameters import count_parameters
from buddygpt.model.presets import load_config
from buddygpt.pretrain.pretrain import PretrainArguments
from buddygpt.training.flops import GpuSpec, flops_per_token, load_gpus, peak_flops

RESULTS = Path(__file__).resolve().parent / "benchmarks" / "results"
GIB = 2**30

# Kept free, by assumption: what CUDA takes for itself, and what the allocator loses to fragmentation.
CONTEXT_BYTES = GIB // 2
FRAGMENTATION = 0.05
SMALL_VOCABULARY = 16_384
ASSUMED_MFU = 0.3


def list_gpus() -> dict[str, tuple[GpuSpec, float]]:
    """Return each version of each GPU: label -> its specification and its memory in GiB."""
    versions = {}
    for gpu in load_gpus().values():
        for memory in gpu.memory_gib:
            label = gpu.name if len(gpu.memory_gib) == 1 else f"{gpu.name} {memory:g}GB"
            versions[label] = (gpu, memory)
    return versions


GPUS = list_gpus()


@dataclass
class PlanArguments(PretrainArguments):
    train_data: str | None = field(default=None, metadata={"help": "Not read."})
    tokenizer: str | None = field(default=None, metadata={"help": "Its size is the vocabulary's, if it is a folder."})
    gpu: str | None = field(default=None, metadata={"help": f"One of {', '.join(GPUS)}."})
    memory: str | None = field(default=None, metadata={"help": "Memory of a GPU: 12GB (10^9 bytes) or 12GiB (2^30)."})
    gpus: int = field(default=1, metadata={"help": "GPUs, each with its own part of the batch."})
    hours: float = field(default=24.0, metadata={"help": "Hours of training."})
    price_per_hour: float | None = field(default=None, metadata={"help": "Price of one GPU for an hour."})
    mfu: float | None = field(
        default=None, metadata={"help": "Share of the GPU's peak that is reached. Default: as measured, else 0.3."}
    )
    optimizer: str | None = field(
        default=None, metadata={"help": "Default: as `optim` says.", "choices": ["adamw", "adamw_8bit", "muon"]}
    )
    accelerate_config: str | None = field(default=None, metadata={"help": "File whose ZeRO stage or FSDP is meant."})
    zero_stage: int = field(
        default=0, metadata={"help": "ZeRO stage, where no accelerate_config says.", "choices": [0, 1, 2, 3]}
    )


class PlannedTraining(TrainingArguments):
    """The same keys without the look at this machine: a run for a GPU is planned on a laptop."""

    def __post_init__(self):
        pass


@dataclass(frozen=True)
class Gpu:
    """A card: its name (None where only a memory was given), its memory in bytes, whether it computes in bfloat16."""

    name: str | None
    memory: float
    has_bf16: bool = True


def find_gpu(args: PlanArguments) -> Gpu:
    """The GPU that `gpu` and `memory` name; the latter wins where both say how large it is."""
    if args.gpu is None and args.memory is None:
        raise UserError("give --gpu (such as 3090) or --memory (such as 12GB)")
    memory = None if args.memory is None else _parse_memory(args.memory)
    if args.gpu is None:
        return Gpu(None, memory)
    found = [label for label, (gpu, _) in GPUS.items() if _plain(args.gpu) in (_plain(label), _plain(gpu.name))]
    if len(found) != 1:
        names = ", ".join(found or GPUS)
        raise UserError(f"--gpu {args.gpu}: {'which of' if found else 'not known; give one of'} {names}, or --memory")
    gpu, size = GPUS[found[0]]
    return Gpu(found[0], memory or size * GIB, gpu.bf16)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[\s_-]", "", name.lower())


def _parse_memory(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(gb|gib)", text.strip().lower())
    if not match or float(match[1]) == 0:
        raise UserError(f"--memory {text}: give a size such as 12GB or 12GiB")
    return float(match[1]) * (GIB if match[2] == "gib" else 10**9)


def read_model(args: PlanArguments) -> PreTrainedConfig:
    """The shape to be trained, with the vocabulary that the recipe would give it."""
    name = args.model_config or args.model_name_or_path
    if name is None:
        raise UserError("give model_config: a preset's name or a config JSON")
    vocab_size = args.vocab_size
    if vocab_size is None and args.model_config and args.tokenizer and Path(args.tokenizer).is_dir():
        vocab_size = len(load_tokenizer(args.tokenizer))
    try:
        return load_config(name, **({} if vocab_size is None else {"vocab_size": vocab_size}))
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"cannot read the model config {name}: {error}") from error


def read_setup(args: PlanArguments, training: TrainingArguments) -> Setup:
    """How the recipe trains, as far as memory is concerned."""
    for name in ("gpus", "hours", "block_size"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} ({getattr(args, name)}) must be more than 0")
    optimizer = args.optimizer or ("adamw_8bit" if "8bit" in str(training.optim) else "adamw")
    mixed = training.bf16 or training.fp16
    return Setup(
        precision="bf16_params" if args.dtype == "bfloat16" else "fp32_master" if mixed else "fp32",
        optimizer=optimizer,
        block_size=args.block_size,
        checkpointing=bool(training.activation_checkpointing or training.gradient_checkpointing),
        accumulation=int(training.gradient_accumulation_steps),
        gpus=args.gpus,
        zero_stage=_zero_stage(args),
    )


def _zero_stage(args: PlanArguments) -> int:
    if args.accelerate_config is None:
        return args.zero_stage
    try:
        content = yaml.safe_load(Path(args.accelerate_config).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --accelerate_config {args.accelerate_config}: {error}") from error
    if content.get("distributed_type") == "FSDP":
        return 3 if content["fsdp_config"].get("fsdp_reshard_after_forward", True) else 2
    return content.get("deepspeed_config", {}).get("zero_stage", 0)


@dataclass(frozen=True)
class Fit:
    """Whether a way of training fits on the GPU, and with how many rows."""

    name: str
    peak: int
    largest: int


class Plan:
    """A recipe on a GPU.

    Args:
        config: The model's shape.
        setup: How it is trained.
        gpu: On what.
        rows: Of the micro-batch.
    """

    def __init__(self, config: PreTrainedConfig, setup: Setup, gpu: Gpu, rows: int) -> None:
        self.config, self.setup, self.gpu, self.rows = config, setup, gpu, rows
        self._activations = cache(lambda precision: count_activations(config, setup.block_size, precision))
        self.model = self._memory(setup)
        self.usable = (gpu.memory - CONTEXT_BYTES) / (1 + FRAGMENTATION)
        self.as_asked = self.fit("as asked", setup)
        self.fits = self.as_asked.peak <= self.usable

    def _memory(self, setup: Setup, vocab_size: int | None = None) -> MemoryModel:
        config = self.config
        if vocab_size is not None:
            config = type(config).from_dict(config.to_dict() | {"vocab_size": vocab_size})
        return MemoryModel(config, setup, self._activations(setup.computes_in))

    def fit(self, name: str, setup: Setup, vocab_size: int | None = None) -> Fit:
        memory = self._memory(setup, vocab_size)
        return Fit(name, memory.peak(self.rows), memory.largest_micro_batch(self.usable))

    def alternatives(self) -> list[Fit]:
        """The same with one thing changed at a time, and with the least of everything."""
        setup = self.setup
        found = []
        toggled = "without" if setup.checkpointing else "with"
        found.append(
            self.fit(f"{toggled} activation checkpointing", replace(setup, checkpointing=not setup.checkpointing))
        )
        found.append(self.fit("all logits at once (not the chunked head)", replace(setup, full_logits=True)))
        if setup.optimizer == "adamw" and not setup.zero_stage:
            found.append(self.fit("8-bit AdamW", replace(setup, optimizer="adamw_8bit")))
            found.append(self.fit("Muon", replace(setup, optimizer="muon")))
        if setup.computes_in != "bf16_params" and self.gpu.has_bf16:
            found.append(self.fit("bf16 weights without fp32 copies", replace(setup, precision="bf16_params")))
        if self.config.vocab_size > SMALL_VOCABULARY:
            found.append(self.fit(f"a vocabulary of {SMALL_VOCABULARY:,}", setup, SMALL_VOCABULARY))
        if setup.gpus > 1 and setup.zero_stage < 2:
            found.append(self.fit("ZeRO-2", replace(setup, zero_stage=2)))
        if setup.gpus > 1 and setup.zero_stage < 3:
            found.append(self.fit("ZeRO-3", replace(setup, zero_stage=3)))
        least = replace(setup, checkpointing=True, accumulation=1)
        if not setup.zero_stage:
            least = replace(least, optimizer="muon", precision="bf16_params" if self.gpu.has_bf16 else setup.precision)
            names = "checkpointing, Muon" + (", bf16 weights" if self.gpu.has_bf16 else "")
            found.append(self.fit(f"{names}, no accumulation", least))
        return found


def refusals(args: PlanArguments, training: TrainingArguments, plan: Plan) -> list[str]:
    """Why the answer is no; empty where it is yes."""
    found = []
    if not plan.gpu.has_bf16 and (training.bf16 or plan.setup.precision == "bf16_params"):
        found.append(
            f"a {plan.gpu.name} has no bfloat16: set `bf16: false` and `fp16: true` in the recipe, and "
            "mixed_precision: fp16 in the accelerate config (FlashAttention-2 does not run on it either)"
        )
    if plan.setup.optimizer == "muon" and plan.setup.zero_stage:
        found.append("Muon needs whole matrices, which ZeRO cuts: take DDP, or AdamW")
    if not plan.fits:
        remedies = [fit.name for fit in plan.alternatives() if fit.peak <= plan.usable]
        if plan.as_asked.largest:
            remedies.insert(0, f"a micro-batch of {plan.as_asked.largest} with more gradient accumulation")
        what_would = "; or ".join(remedies) or "nothing here: a smaller model, shorter rows or a larger GPU"
        found.append(
            f"{_gib(plan.as_asked.peak)} GiB do not fit into {_gib(plan.usable)} GiB. What would: {what_would}"
        )
    return found


def describe_memory(plan: Plan) -> str:
    """Two tables: each part at each moment of a step; and what would change how much."""
    moments = plan.model.moments(plan.rows)
    names = dict.fromkeys(name for parts in moments.values() for name, size in parts.items() if size)
    rows = [[name, *(_gib(parts.get(name, 0)) for parts in moments.values())] for name in names]
    totals = [sum(parts.values()) for parts in moments.values()]
    peak = max(totals)
    rows.append(["**together**", *(f"**{_gib(total)}**" if total == peak else _gib(total) for total in totals)])
    fits = [plan.as_asked, *plan.alternatives()]
    variants = [[fit.name, _gib(fit.peak), f"{fit.largest:,}" if fit.largest else "none fits"] for fit in fits]
    return "\n\n".join(
        [
            f"## Memory of one GPU in GiB, {plan.rows} x {plan.setup.block_size:,} tokens at a time",
            _table(["", *moments], rows),
            f"Of {_gib(plan.gpu.memory)} GiB, {_gib(plan.usable)} are counted on: {_gib(CONTEXT_BYTES)} are left to "
            f"CUDA and {FRAGMENTATION:.0%} to fragmentation (assumed). torch.compile and fused kernels need less.",
            _table(["", "peak", "largest micro-batch"], variants),
        ]
    )


def chinchilla_loss(parameters: float, tokens: float) -> float:
    """Nats per token after `tokens` of text: Hoffmann et al.'s law (arXiv:2203.15556) with the constants of Besiroglu
    et al. (arXiv:2404.10102 table 1). Of English web text in a vocabulary of 32,000, and of models tuned for it."""
    return 1.8172 + 482.01 / parameters**0.3478 + 2085.43 / tokens**0.3658


def measured_mfu(gpu: Gpu, model: str, compiled: bool = False) -> tuple[float, str] | None:
    """MFU of the model on such a GPU, else the lowest of any, from `benchmarks/results`; and where it comes from."""
    model += ", compiled" if compiled else ""
    for path in sorted(RESULTS.glob("gpu*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        device = result["machine"]["device"]
        rows = {row["name"]: row["mfu"] for row in result["rows"] if row.get("mfu") and row.get("goal")}
        if rows and gpu.name and _plain(gpu.name.split(" ")[-1 if "RTX" in gpu.name else 0]) in _plain(device):
            name = model if model in rows else min(rows, key=rows.get)
            return rows[name], f"measured on {device} for {name} ({path.name})"
    return None


def describe_time(args: PlanArguments, training: TrainingArguments, plan: Plan) -> str:
    """Speed, tokens, loss and cost in the time given."""
    count = count_parameters(plan.config)
    work = flops_per_token(plan.config, args.block_size)
    dtype = torch.bfloat16 if plan.gpu.has_bf16 else torch.float16
    peak = plan.gpu.name and peak_flops(plan.gpu.name, dtype)
    rows = [["work", f"{work / 1e9:.2f} GFLOP a token"]]
    if peak and plan.setup.precision != "fp32":
        name = Path(args.model_config or args.model_name_or_path).stem
        mfu, source = _expected_mfu(args.mfu, measured_mfu(plan.gpu, name, training.torch_compile))
        speed = mfu * peak * args.gpus / work
        tokens = speed * args.hours * 3600
        active = count.active - (count.total - count.non_embedding)
        low, high = chinchilla_loss(count.active, tokens), chinchilla_loss(active, tokens)
        rows += [
            ["peak", f"{peak / 1e12:,.1f} TFLOP/s (datasheet, dense {'bf16' if plan.gpu.has_bf16 else 'fp16'})"],
            ["MFU", f"{mfu:.0%}, {source}"],
            ["tokens/s", f"{speed:,.0f}" + (" (all GPUs, no loss in communication assumed)" if args.gpus > 1 else "")],
            [f"in {args.hours:g} h", f"{tokens / 1e9:.2f}B tokens, {tokens / active:,.0f} for each active parameter"],
            ["loss", f"{low:.2f} to {high:.2f} nats per token, roughly: the law of arXiv:2404.10102 with and without "
                     "the embedding, which holds for its own English data and 32,000 entries, not for yours"],
        ]  # fmt: skip
        if training.max_steps > 0:
            step = plan.rows * args.block_size * plan.setup.accumulation * args.gpus
            hours = training.max_steps * step / speed / 3600
            rows.append(["the recipe", f"{training.max_steps:,} steps of {step:,} tokens: {hours:,.1f} h"])
    else:
        rows.append(["tokens/s", "unknown: name a --gpu whose peak is known, and a recipe in bf16 or fp16"])
    if args.price_per_hour is not None:
        cost = args.price_per_hour * args.gpus * args.hours
        rows.append(["cost", f"{cost:,.2f} ({args.gpus} x {args.hours:g} h at {args.price_per_hour:g})"])
    return "## Time\n\n" + _table(["", ""], rows)


def _expected_mfu(given: float | None, measured: tuple[float, str] | None) -> tuple[float, str]:
    if given is not None:
        if not 0 < given <= 1:
            raise UserError(f"--mfu {given}: a share of the peak, such as 0.4")
        return given, "as given (--mfu)"
    return measured or (ASSUMED_MFU, "assumed: nothing was measured on this GPU (--mfu for another)")


def describe_model(args: PlanArguments, plan: Plan) -> str:
    count, setup = count_parameters(plan.config), plan.setup
    precision = {
        "fp32": "float32",
        "fp32_master": "autocast over float32 weights",
        "bf16_params": "bfloat16 weights, gradients and optimizer",
    }[setup.precision]
    rows = [
        ["parameters", f"{count.total / 1e6:,.1f}M; {count.non_embedding / 1e6:,.1f}M without embedding and head; "
                       f"{count.active / 1e6:,.1f}M active for a token"],
        ["vocabulary", f"{plan.config.vocab_size:,}"],
        ["training", f"{precision}, {setup.optimizer}, {'with' if setup.checkpointing else 'without'} activation "
                     f"checkpointing, {setup.accumulation} micro-batch{'es' * (setup.accumulation > 1)} a step"
                     + (f", ZeRO-{setup.zero_stage}" if setup.zero_stage else "")],
    ]  # fmt: skip
    title = f"# {args.model_config or args.model_name_or_path} on {setup.gpus} x {plan.gpu.name or args.memory}"
    return f"{title}\n\n" + _table(["", ""], rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    args, training = parse_arguments(PlanArguments, PlannedTraining, description=__doc__)
    gpu, config, setup = find_gpu(args), read_model(args), read_setup(args, training)
    plan = Plan(config, setup, gpu, training.per_device_train_batch_size)
    no = refusals(args, training, plan)
    print(
        describe_model(args, plan), describe_memory(plan), describe_time(args, training, plan), sep="\n\n", end="\n\n"
    )
    print("\n".join(f"**No**: {reason}." for reason in no) or f"**Yes**: {_gib(plan.as_asked.peak)} GiB at the peak.")
    if no:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
