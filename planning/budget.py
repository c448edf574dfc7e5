"""From a machine, hours and text to the numbers of every training stage."""

from dataclasses import dataclass, replace
from pathlib import Path

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import COMPRESSIONS, file_type
from buddygpt.model.configuration_buddygpt import BuddyGPTConfig
from buddygpt.planning import rules
from buddygpt.planning.hardware import GIB, Machine, Speed, expected_speed
from buddygpt.planning.memory import MemoryPlan, gib
from buddygpt.planning.step_memory import Setup

# Seconds of everything but text preparation and training: the quickstart's 78 s on two cores (README.md), rounded up.
FIXED_SECONDS = 90
# Bytes of text that a core prepares in a second: 53.7 MB in 54 s on two cores, tokenizer included (docs/results.md).
PREPARED_BYTES = 0.5e6
GPU_CORES = 8  # of the CPU next to a GPU; assumed
# How a run's time is divided; assumed. minimind gives its SFT 48% of both, the quickstart 27% with DPO.
SHARES = {"pretrain": 0.75, "sft": 0.2, "dpo": 0.05}
# How much longer a token of SFT and DPO takes than one of pretraining, with the start of each: 1.68M tokens in 815 s
# and 0.25M in 147 s after 13.6M in 2,780 s (docs/results.md, "One hour on two CPU cores").
SLOWER = {"sft": 2.4, "dpo": 2.8}
LEAST_SECONDS = 20  # of training
BYTES_PER_PAIR = 2500  # of preference rows; assumed from the samples of docs/results.md
GIB_OF_LIBRARIES = 0.2  # free disk that a run wants next to what it writes; assumed


@dataclass(frozen=True)
class Budget:
    """What a recipe is made for.

    Attributes:
        machine: Machine.
        hours: For everything, from text to evaluation.
        text_bytes: Bytes of the text; None for public sets, of which as much is read as needed.
        chat_bytes, pair_bytes: Bytes of chats and of preference pairs; None for public sets.
        parameters: Wished size of the model, or None.
        vocab_size: Wished vocabulary, or None.
        mfu: Share of the peak, or None.
        speed: Measured speed of the machine, or None.
    """

    machine: Machine
    hours: float
    text_bytes: float | None = None
    chat_bytes: float | None = None
    pair_bytes: float | None = None
    parameters: float | None = None
    vocab_size: int | None = None
    mfu: float | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class Tuning:
    """The numbers of SFT or DPO: rows of a micro-batch, micro-batches of a step, tokens in a row."""

    rows: int
    accumulation: int
    length: int
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Plan:
    """The numbers of a whole run.

    Attributes:
        run: Pretraining.
        speed: Of the machine.
        rows, accumulation: Micro-batch of pretraining on each GPU, and how many make a step.
        checkpointing: Whether activations are computed again.
        peak: Bytes at the peak of pretraining.
        sft, dpo: Of the later stages.
        prepare_seconds: Expected seconds to prepare the text.
        epochs: How often the text is read; 1 for public sets.
        expected_bits: Bits per byte of held-out text.
        disk: Bytes that the run writes.
        warnings: What the user should know first.
    """

    run: rules.Pretraining
    speed: Speed
    rows: int
    accumulation: int
    checkpointing: bool
    peak: int
    sft: Tuning
    dpo: Tuning
    prepare_seconds: float
    epochs: float
    expected_bits: float
    disk: float
    warnings: tuple[str, ...] = ()


def make_plan(budget: Budget) -> Plan:
    """Return the plan of a budget.

    Raises:
        UserError: The budget is too small, the text too little, or the model does not fit; with what would do.
    """
    machine = budget.machine
    require_text(budget)
    speed = find_speed(budget)
    workers = machine.count if machine.kind == "cpu" else GPU_CORES
    text_bytes, prepare = budget.text_bytes, 0.0
    if text_bytes is not None:
        prepare = text_bytes / (PREPARED_BYTES * workers)
    seconds = budget.hours * 3600 - FIXED_SECONDS - prepare
    if seconds < LEAST_SECONDS:
        needed = (FIXED_SECONDS + prepare + 3 * LEAST_SECONDS) / 3600
        raise UserError(
            f"--hours {budget.hours:g} is too short: preparing the text takes about {prepare:,.0f} s and starting the "
            f"stages {FIXED_SECONDS} s before anything is trained. Give --hours {needed:.2g} or more, or less text"
        )
    run = choose_run(budget, speed, seconds * SHARES["pretrain"])
    rows, accumulation, checkpointing, peak = choose_micro_batch(run, machine)

    unique = float("inf") if text_bytes is None else text_bytes / rules.bytes_per_token(run.shape.vocab_size)
    epochs = max(1.0, run.tokens / unique)
    effective = rules.effective_tokens(run.tokens, unique)
    if text_bytes is None:  # as much as it reads
        text_bytes = run.tokens * rules.bytes_per_token(run.shape.vocab_size)
        prepare = text_bytes / (PREPARED_BYTES * workers)
    return Plan(
        run=run,
        speed=speed,
        rows=rows,
        accumulation=accumulation,
        checkpointing=checkpointing,
        peak=peak,
        sft=plan_tuning("sft", budget, run, speed, seconds, rows),
        dpo=plan_tuning("dpo", budget, run, speed, seconds, rows),
        prepare_seconds=prepare,
        epochs=epochs,
        expected_bits=rules.expected_bits_per_byte(run.shape.parameters, effective),
        disk=disk_bytes(run, text_bytes),
        warnings=tuple(_warnings(budget, run, epochs, prepare)),
    )


def find_speed(budget: Budget) -> Speed:
    """Return the measured or expected speed of the budget's machine."""
    speed = budget.speed or expected_speed(budget.machine, mfu=budget.mfu)
    if speed is None:
        raise UserError("the speed of this machine is unknown: give --gpu with a name that tools/plan.py knows")
    return speed


def require_text(budget: Budget) -> None:
    """Raise UserError if there is too little text, or too little for the vocabulary."""
    if budget.text_bytes is None:
        return
    if budget.text_bytes < rules.LEAST_TEXT:
        raise UserError(
            f"--text has {budget.text_bytes / 1000:,.0f} kB: a tokenizer and a model need at least "
            f"{rules.LEAST_TEXT / 1000:,.0f} kB. Add text, or leave --text out to use public sets"
        )
    largest = rules.largest_vocabulary(budget.text_bytes)
    if budget.vocab_size and budget.vocab_size > largest:
        raise UserError(
            f"--vocab_size {budget.vocab_size:,} is more than {budget.text_bytes / 1e6:,.1f} MB of text support: at "
            f"most about {largest:,}, and {rules.vocabulary(budget.text_bytes):,} is a good size"
        )


def choose_run(budget: Budget, speed: Speed, seconds: float) -> rules.Pretraining:
    """Return the pretraining run: of the wished size, or of the size that suits the budget."""
    flops = seconds * speed.flops
    text_bytes = float("inf") if budget.text_bytes is None else budget.text_bytes
    if budget.parameters is None:
        return rules.plan_budget(flops, speed.flops, text_bytes, budget.vocab_size)
    entries = budget.vocab_size or rules.vocabulary(text_bytes)
    shape = rules.shape_of_size(budget.parameters, entries)
    while not budget.vocab_size and entries > 1024:
        if entries * shape.hidden_size <= rules.EMBEDDING_SHARE * shape.parameters:
            break
        entries //= 2
        shape = rules.shape_of_size(budget.parameters, entries)
    return rules.plan_shape(shape, flops, speed.flops)


def model_config(shape: rules.Shape, length: int) -> dict:
    """Return the JSON of a model."""
    return {
        "model_type": "buddygpt",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 4 * length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "use_qk_norm": True,
        "tie_word_embeddings": True,
    }


def choose_micro_batch(run: rules.Pretraining, machine: Machine) -> tuple[int, int, bool, int]:
    """Return rows of a micro-batch, micro-batches of a step, whether to checkpoint activations, and the peak in bytes.

    Raises:
        UserError: Not even one row fits; with the size of a model that does.
    """
    wished = max(1, run.batch // run.block_size // (machine.count if machine.kind == "gpu" else 1))
    most = min(wished, 64 if machine.kind == "gpu" else 16)
    for checkpointing in (False, True):
        plan = _memory(run, machine, checkpointing)
        if plan.fits:
            largest = max(1, plan.step.largest_micro_batch(plan.usable, 1, measurements=1))
            rows = min(most, 2 ** (largest.bit_length() - 1))
            while rows > 1 and plan.step.peak(rows) > plan.usable:
                rows //= 2
            return rows, max(1, wished // rows), checkpointing, plan.step.peak(rows)
    raise UserError(
        f"a model of {run.shape.parameters / 1e6:,.0f}M parameters needs {gib(plan.step.peak(1))} GiB, but "
        f"{machine.title} has {gib(machine.usable)} GiB for it. "
        f"{_what_would_fit(run, machine, plan.step.peak(1))}"
    )


def _memory(run: rules.Pretraining, machine: Machine, checkpointing: bool) -> MemoryPlan:
    config = BuddyGPTConfig(**{**model_config(run.shape, run.block_size), "model_type": "buddygpt"})
    setup = Setup(
        precision="fp32_master" if machine.kind == "gpu" else "fp32",
        optimizer=run.optimizer,
        block_size=run.block_size,
        checkpointing=checkpointing,
        accumulation=2,
        gpus=machine.count if machine.kind == "gpu" else 1,
        device="cpu" if machine.kind == "cpu" else "cuda",
    )
    return MemoryPlan(config, setup, machine, rows=1)


def _what_would_fit(run: rules.Pretraining, machine: Machine, peak: int) -> str:
    """Return a smaller size that fits, in words; `peak` is that of the run. Memory is nearly proportional to size."""
    parameters = run.shape.parameters * machine.usable / peak
    for _ in range(3):
        parameters *= 0.8
        if parameters < 2e5:
            break
        smaller = replace(run, shape=rules.shape_of_size(parameters, min(run.shape.vocab_size, 8192)))
        if _memory(smaller, machine, checkpointing=True).fits:
            return f"--params {smaller.shape.parameters / 1e6:.1f}M would fit"
    return "No model would fit: give more --memory"


def plan_tuning(stage: str, budget: Budget, run: rules.Pretraining, speed: Speed, seconds: float, rows: int) -> Tuning:
    """Return the numbers of SFT or DPO: as many steps as its share of the time allows, and not too many epochs."""
    length = run.block_size
    rate = rules.learning_rate("adamw", run.shape.parameters, run.batch) * rules.SFT_RATE
    answers = max(4, min(rows, run.batch // length // 2))
    gpus = budget.machine.count if budget.machine.kind == "gpu" else 1
    tokens = answers * length * gpus * (2 if stage == "dpo" else 1)
    work = run.shape.flops_per_token(length) * SLOWER[stage]
    steps = seconds * SHARES[stage] * speed.flops / (work * tokens)
    if stage == "sft" and budget.chat_bytes:
        available = budget.chat_bytes / rules.bytes_per_token(run.shape.vocab_size)
        steps = min(steps, rules.SFT_EPOCHS * available / tokens)
    if stage == "dpo":
        rate *= rules.DPO_RATE
        if budget.pair_bytes:
            steps = min(steps, rules.DPO_EPOCHS * budget.pair_bytes / BYTES_PER_PAIR / answers / gpus)
    return Tuning(answers, 1, length, max(4, round(steps)), float(f"{rate:.1e}"))


def disk_bytes(run: rules.Pretraining, text_bytes: float) -> float:
    """Return what a run writes: cleaned text and its working copy, shards, checkpoints with AdamW's states."""
    entry = 2 if run.shape.vocab_size < 65_536 else 4
    shards = entry * text_bytes / rules.bytes_per_token(run.shape.vocab_size)
    checkpoints = 3 * 3 * 4 * run.shape.parameters * 2 + 4 * 4 * run.shape.parameters
    return 2 * text_bytes + shards + checkpoints + GIB_OF_LIBRARIES * GIB


def _warnings(budget: Budget, run: rules.Pretraining, epochs: float, prepare: float) -> list[str]:
    found = []
    if epochs > rules.GOOD_EPOCHS:
        enough = run.tokens / rules.GOOD_EPOCHS * rules.bytes_per_token(run.shape.vocab_size) / 1e6
        found.append(
            f"the text is too little for this budget: {budget.text_bytes / 1e6:,.1f} MB are read {epochs:.0f} times. "
            f"Up to {rules.GOOD_EPOCHS} times is nearly as good as new text: add text up to {enough:,.0f} MB, or give "
            "fewer hours"
        )
    if prepare > 0.3 * budget.hours * 3600:
        found.append(f"preparing the text takes {prepare / budget.hours / 36:.0f}% of the time: give fewer files")
    if run.steps < 200:
        found.append(f"{run.steps} steps of pretraining are few: a smaller model (--params) or more hours learn more")
    return found


# Bytes of text in a byte of a compressed file: 53.7 MB of text came from 22 MB of .jsonl.gz (docs/results.md).
COMPRESSION = 2.4


def bytes_of_text(path: Path) -> float:
    """Return about how many bytes of text a file holds."""
    packed = path.suffix.lower() in COMPRESSIONS or file_type(path) == ".parquet"
    return path.stat().st_size * (COMPRESSION if packed else 1)


def relative(path: Path, root: Path) -> str:
    """Return a path as recipes name it: relative to the repository if it is in there."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
