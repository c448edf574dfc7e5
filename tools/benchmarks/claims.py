"""What people come with, answered by the planner: does this model train on that card?

    python tools/benchmarks/claims.py

Calculated, not measured: see tools/memory.py, and tools/benchmarks/memory_model.py for how far it is to be trusted.
"""

from dataclasses import dataclass, field

from ab import Report
from memory import Setup
from plan import GIB, GPUS, Gpu, Plan

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script
from buddygpt.model.presets import load_config

AUTOCAST, WITH_CHECKPOINTS = Setup(), Setup(checkpointing=True)
BF16 = Setup(precision="bf16_params")
BF16_LEAST = Setup(precision="bf16_params", optimizer="muon", checkpointing=True)
BF16_8BIT = Setup(precision="bf16_params", optimizer="adamw_8bit", checkpointing=True)
SMALL_CARD = Gpu("12 GB card", GPUS["RTX 3060"][1] * GIB)
RTX_3090 = Gpu("RTX 3090", GPUS["RTX 3090"][1] * GIB)
T4 = Gpu("T4", GPUS["T4"][1] * GIB, has_bf16=False)


@dataclass(frozen=True)
class Claim:
    """A model on a card; `overrides` are fields of its config."""

    model: str
    gpu: Gpu
    length: int
    how: str
    setup: Setup
    overrides: dict = field(default_factory=dict)


CLAIMS = [
    Claim("mini-qwen-1b", SMALL_CARD, 128, "bf16 weights, AdamW (mini_qwen's demonstration)", BF16),
    Claim("mini-qwen-1b", SMALL_CARD, 1024, "bf16 autocast, AdamW", AUTOCAST),
    Claim("mini-qwen-1b", SMALL_CARD, 1024, "bf16 weights, AdamW", BF16),
    Claim("mini-qwen-1b", SMALL_CARD, 1024, "bf16 weights, 8-bit AdamW, checkpointing", BF16_8BIT),
    Claim("mini-qwen-1b", SMALL_CARD, 1024, "bf16 weights, Muon, checkpointing", BF16_LEAST),
    Claim("bitbrain-0.6b", RTX_3090, 2048, "bf16 autocast, AdamW", AUTOCAST),
    Claim("bitbrain-0.6b", RTX_3090, 2048, "bf16 autocast, AdamW, checkpointing", WITH_CHECKPOINTS),
    Claim("buddygpt-0.1b", RTX_3090, 1024, "bf16 autocast, AdamW, 151,669 entries", AUTOCAST),
    Claim("buddygpt-0.1b", RTX_3090, 1024, "the same, 16,384 entries", AUTOCAST, {"vocab_size": 16_384}),
    Claim("buddygpt-0.1b", T4, 1024, "bf16 autocast, AdamW", AUTOCAST),
    Claim("buddygpt-0.1b", T4, 1024, "fp16 autocast, AdamW", AUTOCAST),
]


@dataclass
class ClaimsArguments:
    quick: bool = field(default=False, metadata={"help": "The last two claims; nothing is written."})


def answer(claim: Claim, plan: Plan) -> str:
    if claim.how.startswith("bf16") and not claim.gpu.has_bf16:
        return "no: no bfloat16"
    return "yes" if plan.fits else "no"


def main() -> None:
    (args,) = parse_arguments(ClaimsArguments, description=__doc__)
    report = Report(
        "claims",
        ["model", "card", "length", "how", "peak of 1 row, GiB", "largest micro-batch", "fits"],
        how="Calculated",
    )
    for claim in CLAIMS[-2:] if args.quick else CLAIMS:
        setup = Setup(**(vars(claim.setup) | {"block_size": claim.length}))
        plan = Plan(load_config(claim.model, **claim.overrides), setup, claim.gpu, rows=1)
        fit, says = plan.as_asked, answer(claim, plan)
        cells = [
            claim.model,
            claim.gpu.name,
            f"{claim.length:,}",
            claim.how,
            f"{fit.peak / GIB:.2f}",
            fit.largest,
            says,
        ]
        report.add(cells, model=claim.model, card=claim.gpu.name, how=claim.how, peak_bytes=fit.peak, fits=says)
    report.finish(args)


if __name__ == "__main__":
    run_script(main)
