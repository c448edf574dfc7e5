"""Whether a way of training fits into the memory of a machine, and what would fit instead."""

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from buddygpt.cli.tables import markdown_table
from buddygpt.planning.hardware import GIB, Machine
from buddygpt.planning.step_memory import FakeModel, Setup, StepMemory, total_bytes

SMALL_VOCABULARY = 16_384


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


class MemoryPlan:
    """A way of training on a machine.

    Args:
        config: Config of the model.
        setup: How it is trained.
        machine: Machine it is trained on.
        rows: Rows in a micro-batch.
    """

    def __init__(self, config: PreTrainedConfig, setup: Setup, machine: Machine, rows: int) -> None:
        self.config, self.setup, self.machine, self.rows = config, setup, machine, rows
        self.usable = machine.usable
        self._fake_models: dict[tuple, FakeModel] = {}
        self.step = self.measure(setup)
        self.as_requested = Fit("as requested", self.step.peak(rows), None)
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

    def with_largest(self) -> Fit:
        """Return `as_requested` with the largest micro-batch."""
        return replace(self.as_requested, largest=self.step.largest_micro_batch(self.usable, self.rows))

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
        if setup.reference:
            changes.append(("precompute_ref_log_probs", replace(setup, reference=0)))
        if setup.optimizer == "adamw" and not setup.zero_stage:
            if self.machine.kind == "gpu":  # bitsandbytes
                changes.append(("8-bit AdamW", replace(setup, optimizer="adamw_8bit")))
            changes.append(("Muon", replace(setup, optimizer="muon")))
        if setup.computes_in != "bf16_params" and self.machine.has_bf16:
            changes.append(("bf16 weights without fp32 copies", replace(setup, precision="bf16_params")))
        for stage in (2, 3):
            if setup.gpus > 1 and setup.zero_stage < stage:
                changes.append((f"ZeRO-{stage}", replace(setup, zero_stage=stage)))
        if not setup.zero_stage:
            least = replace(setup, checkpointing=True, accumulation=1, optimizer="muon", reference=0)
            name = "checkpointing, Muon"
            if self.machine.has_bf16:
                least = replace(least, precision="bf16_params")
                name += ", bf16 weights"
            changes.append((f"{name}, no accumulation", least))

        fits = [self.fit(name, changed) for name, changed in changes]
        if self.config.vocab_size > SMALL_VOCABULARY:
            fits.append(self.fit(f"a vocabulary of {SMALL_VOCABULARY:,}", setup, SMALL_VOCABULARY))
        return fits

    def remedies(self, alternatives: list[Fit]) -> str:
        """Return what would fit, if the recipe does not."""
        found = [fit.name for fit in alternatives if fit.peak <= self.usable]
        largest = self.with_largest().largest
        if largest:
            found.insert(0, f"a micro-batch of {largest} with more gradient accumulation")
        return "; or ".join(found) or "nothing here: use a smaller model, shorter rows or a larger machine"


def describe_memory(plan: MemoryPlan, alternatives: list[Fit]) -> str:
    """Return two tables: the parts of the memory at the peak of each phase, and the largest micro-batches."""
    phases = plan.step.phases(plan.rows)
    names: dict[str, None] = {}
    for parts in phases.values():
        names |= dict.fromkeys(name for name, size in parts.items() if size >= GIB / 200)
    rows = [[name, *(gib(parts.get(name, 0)) for parts in phases.values())] for name in names]
    totals = [gib(total_bytes(parts)) for parts in phases.values()]
    peak = gib(plan.as_requested.peak)
    rows.append(["**total**", *(f"**{total}**" if total == peak else total for total in totals)])

    variants = []
    for fit in [plan.with_largest(), *alternatives]:
        largest = f"below {plan.rows}" if fit.largest is None else f"{fit.largest:,}"
        variants.append([fit.name, gib(fit.peak), "none fits" if largest in ("0", "below 1") else largest])
    where = "one GPU" if plan.machine.kind == "gpu" else "the machine"
    machine = plan.machine
    return "\n\n".join(
        [
            f"## Peak memory of {where} in GiB, {plan.rows} x {plan.setup.block_size:,} tokens per micro-batch",
            markdown_table(["", *phases], rows),
            f"{gib(machine.usable)} of {gib(machine.memory)} GiB are available: {machine.reserved}.",
            markdown_table(["", "peak", "largest micro-batch"], variants),
        ]
    )


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"
