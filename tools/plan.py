"""Plan a pretraining run: does it fit on a GPU, how many tokens does it read in the given time, and what does it cost?

    python tools/plan.py --config pretrain/configs/buddygpt-0.1b.yaml --gpu 3090 --gpus 1 --hours 24
    python tools/plan.py --model_config mini-qwen-1b --memory 12GB --block_size 1024 --per_device_train_batch_size 1

Reads the keys of the recipe, allocates no tensors and needs no GPU. Exit status 1 means that the run does not fit.
Memory is measured on fake tensors (tools/step_memory.py). Speed comes from measurements on such a GPU
(tools/benchmarks/results) if there are any, otherwise from an assumption that the output names.
"""

import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml
from step_memory import FakeModel, Setup, StepMemory, total_bytes
from transformers import PreTrainedConfig, TrainingArguments

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, library_errors, reading, run_script
from buddygpt.cli.tables import markdown_table
from buddygpt.model.parameters import count_parameters
from buddygpt.model.presets import load_config
from buddygpt.pretrain.pretrain import PretrainArguments
from buddygpt.training.flops import GpuSpec, flops_per_token, load_gpus, peak_flops

RESULTS = Path(__file__).resolve().parent / "benchmarks" / "results"
GIB = 2**30

# Assumed to be unavailable: the CUDA context, and the share that the allocator loses to fragmentation.
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
    train_data: str | None = field(default=None, metadata={"help": "Not read by the planner."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer; a folder sets the vocabulary size."})
    gpu: str | None = field(default=None, metadata={"help": f"One of {', '.join(GPUS)}."})
    memory: str | None = field(default=None, metadata={"help": "Memory of a GPU: 12GB (10^9 bytes) or 12GiB (2^30)."})
    gpus: int = field(default=1, metadata={"help": "Number of GPUs (data parallel)."})
    hours: float = field(default=24.0, metadata={"help": "Hours of training."})
    price_per_hour: float | None = field(default=None, metadata={"help": "Price of one GPU per hour."})
    mfu: float | None = field(
        default=None,
        metadata={"help": "Share of the GPU's peak that training reaches. Default: measured if possible, else 0.3."},
    )
    optimizer: str | None = field(
        default=None,
        metadata={"help": "Default: from the recipe's `optim`.", "choices": ["adamw", "adamw_8bit", "muon"]},
    )
    accelerate_config: str | None = field(default=None, metadata={"help": "File that sets the ZeRO stage or FSDP."})
    zero_stage: int = field(
        default=0, metadata={"help": "ZeRO stage, if accelerate_config is not given.", "choices": [0, 1, 2, 3]}
    )


class PlannedTraining(TrainingArguments):
    """Training arguments that are not checked against this machine, since a laptop may plan a run for a GPU."""

    def __post_init__(self):
        pass


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name (None if only its memory is known), its memory in bytes, whether it multiplies bfloat16."""

    name: str | None
    memory: float
    has_bf16: bool = True


def find_gpu(args: PlanArguments) -> Gpu:
    """Return the GPU that `gpu` and `memory` describe; `memory` overrides the memory of a known GPU."""
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
    """Return the config of the model, with the vocabulary size that the recipe would set."""
    name = args.model_config or args.model_name_or_path
    if name is None:
        raise UserError("give model_config: a preset's name or a config JSON")
    vocab_size = args.vocab_size
    if vocab_size is None and args.model_config and args.tokenizer and Path(args.tokenizer).is_dir():
        vocab_size = len(load_tokenizer(args.tokenizer))
    try:
        return load_config(name, **({} if vocab_size is None else {"vocab_size": vocab_size}))
    except Exception as error:  # transformers raises many kinds for odd configs
        raise UserError(f"cannot read the model config {name}: {error}") from error


def read_setup(args: PlanArguments, training: TrainingArguments) -> Setup:
    """Return the choices of the recipe that change its memory."""
    positive = {name: getattr(args, name) for name in ("gpus", "hours", "block_size", "price_per_hour", "mfu")}
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        positive[name] = getattr(training, name)
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"--{name} ({value}) must be more than 0")
    if args.mfu is not None and args.mfu > 1:
        raise UserError(f"--mfu {args.mfu}: must be a share of the peak, such as 0.4")
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


@dataclass(frozen=True)
class Fit:
    """Memory of a way of training.

    Attributes:
        name: What differs from the recipe.
        peak: Bytes with the requested rows.
        largest: Largest micro-batch that fits, in rows; None if it was not looked for.
    """

    name: str
    peak: int
    largest: int | None


class Plan:
    """A recipe on a GPU.

    Args:
        config: Config of the model.
        setup: How it is trained.
        gpu: GPU it is trained on.
        rows: Rows in a micro-batch.
    """

    def __init__(self, config: PreTrainedConfig, setup: Setup, gpu: Gpu, rows: int) -> None:
        self.config, self.setup, self.gpu, self.rows = config, setup, gpu, rows
        self.usable = (gpu.memory - CONTEXT_BYTES) / (1 + FRAGMENTATION)
        self._fake_models: dict[tuple, FakeModel] = {}
        self.step = self.measure(setup)
        largest = self.step.largest_micro_batch(self.usable, rows)
        self.as_requested = Fit("as requested", self.step.peak(rows), largest)
        self.fits = self.as_requested.peak <= self.usable

    def measure(self, setup: Setup, vocab_size: int | None = None) -> StepMemory:
        """Return the memory of a step. Setups with the same forward and backward passes share one measured model."""
        key = (setup.computes_in, setup.checkpointing, setup.accumulation > 1, vocab_size)
        if key not in self._fake_models:
            config = self.config
            if vocab_size is not None:
                config = type(config).from_dict(config.to_dict() | {"vocab_size": vocab_size})
            self._fake_models[key] = FakeModel(config, setup)
        return StepMemory(self._fake_models[key], setup)

    def fit(self, name: str, setup: Setup, vocab_size: int | None = None) -> Fit:
        """Return the memory of an alternative, with the largest micro-batch if it fits."""
        step = self.measure(setup, vocab_size)
        peak, largest = step.peak(self.rows), None
        if peak <= self.usable:
            largest = step.largest_micro_batch(self.usable, self.rows, measurements=1)
        return Fit(name, peak, largest)

    def alternatives(self) -> list[Fit]:
        """Return the fit of the recipe with one choice changed at a time, and with the least memory of all."""
        setup = self.setup
        changes: list[tuple[str, Setup]] = []
        toggled = "without" if setup.checkpointing else "with"
        changes.append((f"{toggled} activation checkpointing", replace(setup, checkpointing=not setup.checkpointing)))
        if setup.optimizer == "adamw" and not setup.zero_stage:
            changes.append(("8-bit AdamW", replace(setup, optimizer="adamw_8bit")))
            changes.append(("Muon", replace(setup, optimizer="muon")))
        if setup.computes_in != "bf16_params" and self.gpu.has_bf16:
            changes.append(("bf16 weights without fp32 copies", replace(setup, precision="bf16_params")))
        for stage in (2, 3):
            if setup.gpus > 1 and setup.zero_stage < stage:
                changes.append((f"ZeRO-{stage}", replace(setup, zero_stage=stage)))
        if not setup.zero_stage:
            least = replace(setup, checkpointing=True, accumulation=1, optimizer="muon")
            name = "checkpointing, Muon"
            if self.gpu.has_bf16:
                least = replace(least, precision="bf16_params")
                name += ", bf16 weights"
            changes.append((f"{name}, no accumulation", least))

        fits = [self.fit(name, changed) for name, changed in changes]
        if self.config.vocab_size > SMALL_VOCABULARY:
            fits.append(self.fit(f"a vocabulary of {SMALL_VOCABULARY:,}", setup, SMALL_VOCABULARY))
        return fits


def refusals(training: TrainingArguments, plan: Plan, alternatives: list[Fit]) -> list[str]:
    """Return the reasons why the run is not possible; empty if it is."""
    found = []
    if not plan.gpu.has_bf16 and (training.bf16 or plan.setup.precision == "bf16_params"):
        found.append(
            f"a {plan.gpu.name} has no bfloat16: set `bf16: false` and `fp16: true` in the recipe, and "
            "mixed_precision: fp16 in the accelerate config (FlashAttention-2 does not run on it either)"
        )
    if plan.setup.optimizer == "muon" and plan.setup.zero_stage:
        found.append("Muon needs whole matrices, which ZeRO splits: use DDP or AdamW")
    if not plan.fits:
        remedies = [fit.name for fit in alternatives if fit.peak <= plan.usable]
        if plan.as_requested.largest:
            remedies.insert(0, f"a micro-batch of {plan.as_requested.largest} with more gradient accumulation")
        what_would = "; or ".join(remedies) or "nothing here: use a smaller model, shorter rows or a larger GPU"
        found.append(
            f"{_gib(plan.as_requested.peak)} GiB do not fit into {_gib(plan.usable)} GiB. What would: {what_would}"
        )
    return found


def describe_memory(plan: Plan, alternatives: list[Fit]) -> str:
    """Return two tables: the parts of the memory at the peak of each phase, and the largest micro-batches."""
    phases = plan.step.phases(plan.rows)
    names: dict[str, None] = {}
    for parts in phases.values():
        names |= dict.fromkeys(name for name, size in parts.items() if size >= GIB / 200)
    rows = [[name, *(_gib(parts.get(name, 0)) for parts in phases.values())] for name in names]
    totals = [_gib(total_bytes(parts)) for parts in phases.values()]
    peak = _gib(plan.as_requested.peak)
    rows.append(["**total**", *(f"**{total}**" if total == peak else total for total in totals)])

    variants = []
    for fit in [plan.as_requested, *alternatives]:
        largest = f"below {plan.rows}" if fit.largest is None else f"{fit.largest:,}"
        variants.append([fit.name, _gib(fit.peak), "none fits" if largest in ("0", "below 1") else largest])
    return "\n\n".join(
        [
            f"## Peak memory of one GPU in GiB, {plan.rows} x {plan.setup.block_size:,} tokens per micro-batch",
            markdown_table(["", *phases], rows),
            f"{_gib(plan.usable)} of {_gib(plan.gpu.memory)} GiB are available: {_gib(CONTEXT_BYTES)} are reserved "
            f"for CUDA and {FRAGMENTATION:.0%} for fragmentation (assumed). torch.compile and fused kernels use less.",
            markdown_table(["", "peak", "largest micro-batch"], variants),
        ]
    )


def chinchilla_loss(parameters: float, tokens: float) -> float:
    """Return the loss in nats per token: the law of Hoffmann et al. (arXiv:2203.15556), constants of Besiroglu et al.
    (arXiv:2404.10102 table 1). They were fitted to English web text with a vocabulary of 32,000."""
    return 1.8172 + 482.01 / parameters**0.3478 + 2085.43 / tokens**0.3658


def measured_mfu(gpu: Gpu, model: str, compiled: bool = False) -> tuple[float, str] | None:
    """Return the measured MFU of the model on such a GPU and its source; of an unknown model, the lowest of any."""
    if compiled:
        model += ", compiled"
    for path in sorted(RESULTS.glob("gpu*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        device = result["machine"]["device"]
        rows = {row["name"]: row["mfu"] for row in result["rows"] if row.get("mfu") and row.get("goal")}
        if not rows or gpu.name is None:
            continue
        words = gpu.name.split(" ")
        model_number = words[-1] if "RTX" in gpu.name else words[0]
        if _plain(model_number) in _plain(device):
            name = model if model in rows else min(rows, key=rows.get)
            return rows[name], f"measured on {device} for {name} ({path.name})"
    return None


def describe_time(args: PlanArguments, training: TrainingArguments, plan: Plan) -> str:
    """Return a table of speed, tokens, loss and cost in the given time."""
    work = flops_per_token(plan.config, args.block_size)
    rows = [["work", f"{work / 1e9:.2f} GFLOP per token"]]
    dtype = torch.bfloat16 if plan.gpu.has_bf16 else torch.float16
    peak = plan.gpu.name and peak_flops(plan.gpu.name, dtype)
    if peak and plan.setup.precision != "fp32":
        rows += _describe_speed(args, training, plan, work, peak)
    else:
        rows.append(["tokens/s", "unknown: give a --gpu whose peak is known, and a recipe in bf16 or fp16"])
    if args.price_per_hour is not None:
        cost = args.price_per_hour * args.gpus * args.hours
        rows.append(["cost", f"{cost:,.2f} ({args.gpus} x {args.hours:g} h at {args.price_per_hour:g})"])
    return "## Time\n\n" + markdown_table(["", ""], rows, ["---", "---"])


def _describe_speed(args: PlanArguments, training: TrainingArguments, plan: Plan, work: float, peak: float) -> list:
    """Return the rows that follow from the GPU's peak FLOP/s and the FLOPs of a token."""
    name = Path(args.model_config or args.model_name_or_path).stem
    mfu, source = _expected_mfu(args.mfu, measured_mfu(plan.gpu, name, training.torch_compile))
    speed = mfu * peak * args.gpus / work
    tokens = speed * args.hours * 3600

    count = count_parameters(plan.config)
    active = count.active - (count.total - count.non_embedding)
    low, high = chinchilla_loss(count.active, tokens), chinchilla_loss(active, tokens)
    scaling = " (all GPUs, assuming no loss to communication)" if args.gpus > 1 else ""
    rows = [
        ["peak", f"{peak / 1e12:,.1f} TFLOP/s (datasheet, dense {'bf16' if plan.gpu.has_bf16 else 'fp16'})"],
        ["MFU", f"{mfu:.0%}, {source}"],
        ["tokens/s", f"{speed:,.0f}{scaling}"],
        [f"in {args.hours:g} h", f"{tokens / 1e9:.2f}B tokens, {tokens / active:,.0f} per active parameter"],
        ["loss", f"roughly {low:.2f} to {high:.2f} nats per token: the law of arXiv:2404.10102 with and without the "
                 "embedding, fitted to English text with 32,000 vocabulary entries, so only a hint for your data"],
    ]  # fmt: skip
    if training.max_steps > 0:
        step = plan.rows * args.block_size * plan.setup.accumulation * args.gpus
        hours = training.max_steps * step / speed / 3600
        rows.append(["the recipe", f"{training.max_steps:,} steps of {step:,} tokens: {hours:,.1f} h"])
    return rows


def _expected_mfu(given: float | None, measured: tuple[float, str] | None) -> tuple[float, str]:
    if given is not None:
        return given, "as given (--mfu)"
    return measured or (ASSUMED_MFU, "assumed: there is no measurement on this GPU (set --mfu)")


def describe_model(args: PlanArguments, plan: Plan) -> str:
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
    title = f"# {args.model_config or args.model_name_or_path} on {setup.gpus} x {plan.gpu.name or args.memory}"
    return f"{title}\n\n" + markdown_table(["", ""], rows, ["---", "---"])


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def main() -> None:
    args, training = parse_arguments(PlanArguments, PlannedTraining, description=__doc__)
    gpu, config, setup = find_gpu(args), read_model(args), read_setup(args, training)
    with library_errors(f"cannot build {args.model_config or args.model_name_or_path}", "Fix its config"):
        plan = Plan(config, setup, gpu, training.per_device_train_batch_size)
    alternatives = [] if plan.fits else plan.alternatives()
    sections = [
        describe_model(args, plan),
        describe_memory(plan, alternatives),
        describe_time(args, training, plan),
    ]
    print("\n\n".join(sections), end="\n\n")
    reasons = refusals(training, plan, alternatives)
    for reason in reasons:
        print(f"**No**: {reason}.")
    if reasons:
        sys.exit(1)
    print(f"**Yes**: {_gib(plan.as_requested.peak)} GiB at the peak.")


if __name__ == "__main__":
    run_script(main)
