"""MFU, memory and speed of the real sizes on a GPU, after correctness checks in bf16.

    python tools/benchmarks/gpu.py                          # one GPU, ends within --minutes
    python tools/benchmarks/gpu.py --device cpu --quick     # only checks that it runs

Needs torch >= 2.11, transformers >= 5.17, numpy, PyYAML and this checkout; nothing is installed. flash_attn,
liger_kernel and bitsandbytes are used if they are installed. Rows use a bare loop with bf16 autocast over float32
weights and fused AdamW unless they say otherwise, and float32 on a CPU. Rows that did not fit in time are listed.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from ab import BareLoop, Report, alternate, ratios, spread
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from buddygpt.model.liger_kernels import apply_liger_kernel_to_buddygpt
from buddygpt.model.presets import load_config
from buddygpt.training.flops import flops_per_token, peak_flops

TINY = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
TINY_GROUPED, TINY_LATENT = TINY | dict(num_key_value_heads=2, head_dim=16), TINY | dict(num_key_value_heads=4)
# Dense, and a mixture with as many active feed-forward parameters: 2 of 16 experts and 2 shared, each a quarter wide.
MIXTURE = dict(n_routed_experts=16, num_experts_per_tok=2, n_shared_experts=2)


class Machine:
    """The device, the time that is left, and suitable shapes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.quick, self.rounds = args.device, args.quick, 1 if args.quick else args.rounds
        self.cuda = args.device == "cuda"
        self.end = time.monotonic() + 60 * args.minutes
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.peak = peak_flops(name, torch.bfloat16) if self.cuda else None

    def config(self, name: str, **overrides: Any):
        """Return the config of a preset; a tiny one if the run is quick."""
        if self.quick:
            small = TINY_LATENT if load_config(name).kv_lora_rank else TINY_GROUPED
            overrides = small | {key: min(value, 64) for key, value in overrides.items()}
        return load_config(name, **overrides)

    def model(self, config, dtype: torch.dtype = torch.float32, attention: str | None = None) -> PreTrainedModel:
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @contextmanager
    def peak_memory(self):
        """Yield a list that receives the peak GiB of tensors made inside, and the peak GiB that the allocator held."""
        found: list[float] = []
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        yield found
        if self.cuda:
            after = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            found += [(late - early) / 2**30 for late, early in zip(after, before, strict=True)]


# Correctness, in bf16 ------------------------------------------------------------------------------------------------


def difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference of a token's logits over their spread, at the 90th percentile of tokens.

    Different rounding may make a router choose other experts for a few tokens, so the maximum says nothing.
    """
    gap = (logits.float() - reference.float()).abs().amax(-1) / reference.float().std()
    return gap.flatten().quantile(0.9).item()


@torch.no_grad()
def check_model(machine: Machine, config) -> dict[str, float]:
    """Return name of a check -> difference between two ways to compute the same logits or losses."""
    config.initializer_range = config.hidden_size**-0.5  # larger than in training, so that faults show
    model = machine.model(config, torch.bfloat16).eval()
    ids = torch.randint(config.vocab_size, (2, 48), device=machine.device)
    plain = model(ids, use_cache=False).logits
    found = {}

    changed = ids.clone()
    changed[:, 32:] = (changed[:, 32:] + 1) % config.vocab_size
    found["causality"] = difference(model(changed, use_cache=False).logits[:, :32], plain[:, :32])

    cache = model(ids[:, :40], use_cache=True)
    steps = [cache.logits]
    for position in range(40, 48):
        cache = model(ids[:, position : position + 1], past_key_values=cache.past_key_values, use_cache=True)
        steps.append(cache.logits)
    found["cached = uncached"] = difference(torch.cat(steps, 1), plain)

    positions = torch.cat([torch.arange(20), torch.arange(28)]).to(machine.device).expand(2, -1)
    apart = torch.cat([model(part, use_cache=False).logits for part in ids.split([20, 28], 1)], 1)
    found["packed = separate"] = difference(model(ids, position_ids=positions, use_cache=False).logits, apart)

    for backend in ("eager", "flash_attention_2"):
        if backend == "eager" or (machine.cuda and importlib.util.find_spec("flash_attn")):
            model.set_attn_implementation(backend)
            found[f"sdpa = {backend}"] = difference(model(ids, use_cache=False).logits, plain)
    model.set_attn_implementation("sdpa")
    if config.n_routed_experts:
        for implementation in ("eager", "batched_mm"):
            model.set_experts_implementation(implementation)
            found[f"grouped_mm = {implementation}"] = difference(model(ids, use_cache=False).logits, plain)
        model.set_experts_implementation("grouped_mm")

    with torch.enable_grad():
        losses, gradients = [], []
        for skip_logits in (True, False):
            loss = model.train()(ids, labels=ids, use_cache=False, skip_logits=skip_logits).loss
            (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
            losses.append(loss.item())
            gradients.append(gradient.float())
    found["loss without logits"] = abs(losses[0] / losses[1] - 1)
    found["its gradient"] = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    return found


def run_checks(machine: Machine) -> bool:
    """Run all checks on three kinds of small models and print them; return True if all hold."""
    sound = True
    shapes = {"buddygpt-0.3b": TINY_GROUPED, "buddygpt-0.3b-mla": TINY_LATENT, "buddygpt-0.7b-mla-moe": TINY_LATENT}
    for name, shape in shapes.items():
        for check, value in check_model(machine, load_config(name, **shape)).items():
            holds = value < 0.1  # reordered sums differ by hundredths in bf16; faults differ by 1
            sound &= holds
            print(f"{'ok  ' if holds else 'FAIL'} {name:22} {check:24} {value:.2g}")
    return sound


def compare_liger(preset: str = "debug", dtype: torch.dtype = torch.float32, device: str = "cuda") -> dict[str, float]:
    """Return relative differences of the loss and of the whole gradient of one step, with and without Liger's kernels.

    Both are compared with float32 without Liger, so under bfloat16 autocast `plain_*` is the unavoidable error.
    """

    def step(liger: bool, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(load_config(preset)).to(device).train()
        if liger:
            apply_liger_kernel_to_buddygpt(model)
        ids = torch.randint(model.config.vocab_size, (4, 128), device=device)
        labels = ids.masked_fill(ids % 5 == 0, -100)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters()])

    loss, gradient = step(False, torch.float32)
    result = {}
    for name, liger in (("liger", True), ("plain", False)):
        other_loss, other_gradient = step(liger, dtype)
        result[f"{name}_loss"] = abs(other_loss / loss - 1)
        result[f"{name}_gradient"] = ((other_gradient - gradient).norm() / gradient.norm()).item()
    return result


def check_liger() -> bool:
    """Print for two presets whether Liger's kernels give the same loss and gradient; return True if they do."""
    sound = True
    for preset in ("debug", "debug-mla-moe"):
        for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):  # float32 may run as TF32 in Triton
            result = compare_liger(preset, dtype)
            holds = result["liger_gradient"] <= max(limit, 1.5 * result["plain_gradient"])
            sound &= holds
            print("ok  " if holds else "FAIL", preset, dtype, {key: f"{value:.1e}" for key, value in result.items()})
    return sound


# Speed ---------------------------------------------------------------------------------------------------------------


def make_loop(machine: Machine, config, rows: int, length: int, dtype=torch.float32, attention=None, **options):
    """Return a [`BareLoop`]. `compile_layers`, `checkpointing` and `liger` of `options` change the model."""
    model = machine.model(config, dtype, attention)
    if options.pop("checkpointing", False):
        model.activation_checkpointing_enable()
    if options.pop("liger", False):
        apply_liger_kernel_to_buddygpt(model)
    if options.pop("compile_layers", False):  # layers share the code compiled for the first: seconds, not minutes
        for layer in model.model.layers:
            layer.compile()
    rows, length = (2, 32) if machine.quick else (rows, length)
    if options.pop("documents", False):
        options["position_ids"] = (torch.arange(length, device=machine.device) % (length // 4)).expand(rows, -1)
    autocast = machine.cuda and dtype == torch.float32
    return BareLoop(model, rows, length, autocast=autocast, device=machine.device, **options)


def muon(model: PreTrainedModel):
    """Return an optimizer with Muon for the matrices of the layers and AdamW for the rest."""
    matrices = [p for name, p in model.model.layers.named_parameters() if p.ndim == 2 and ".gate." not in name]
    taken = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in taken]
    both = torch.optim.Muon(matrices, lr=3e-4, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(others, fused=True)
    return SimpleNamespace(
        step=lambda: [each.step() for each in both], zero_grad=lambda: [each.zero_grad() for each in both]
    )


def speed(machine: Machine, loop: BareLoop, steps: int) -> float:
    """Return tokens per second over `steps` steps."""
    machine.synchronize()
    start = time.perf_counter()
    loop.steps(steps)
    machine.synchronize()
    return steps * loop.tokens / (time.perf_counter() - start)


def compare(machine: Machine, makers: dict[str, Callable[[int], BareLoop]], rows: int) -> dict[str, Any]:
    """Measure loops in turns: name -> (loop, speeds, GiB). If memory runs out, all of them get half the rows."""
    while True:
        try:
            loops, memory = {}, {}
            for name, make in makers.items():
                with machine.peak_memory() as memory[name]:
                    loops[name] = make(rows)
                    loops[name].steps(1 if machine.quick else 3)  # compiles, and allocates the optimizer states
            steps = 1 if machine.quick else 8
            speeds = alternate(
                {name: partial(speed, machine, loop, steps) for name, loop in loops.items()}, machine.rounds
            )
            return {name: (loops[name], speeds[name], memory[name]) for name in makers}
        except torch.OutOfMemoryError:
            loops.clear()
            if rows == 1:
                raise
            rows //= 2


def train_group(machine: Machine, report: Report, makers: dict[str, Callable], rows: int, goal: str) -> None:
    """Add the rows of a comparison to the report, with MFU."""
    results = compare(machine, makers, rows)
    first = next(iter(results.values()))[1]
    for name, (loop, speeds, memory) in results.items():
        work = flops_per_token(loop.model.config, loop.length)
        mfu = median(speeds) * work / machine.peak if machine.peak else None
        peak = memory[0] if memory else None
        cells = [name, f"{loop.rows} x {loop.length:,}", spread(speeds), f"{mfu:.1%}" if mfu else "-"]
        cells += [spread(ratios(speeds, first)), f"{peak:.1f}" if peak else "-", goal]
        report.add(cells, name=name, rows=loop.rows, length=loop.length, tokens_per_second=speeds, mfu=mfu,
                   peak_gib=peak, flops_per_token=work, goal=goal)  # fmt: skip


def training_groups(machine: Machine) -> dict[str, Callable[[Report], None]]:
    """Return the groups to measure, the most important first."""

    def loops(name: str, length: int, rows: int, goal: str, peer: bool = False, label: str | None = None, **overrides):
        config, label = machine.config(name, **overrides), label or name
        make = partial(make_loop, machine, config, length=length)
        makers = {label: lambda rows: make(rows=rows)}
        if not machine.quick:
            makers[f"{label}, compiled"] = lambda rows: make(rows=rows, compile_layers=True)
        if peer:
            makers[f"{label}, stock Qwen3"] = lambda rows: make_loop(machine, stock(config), rows, length)
        if peer and not machine.quick:
            compiled = partial(make_loop, machine, stock(config), length=length, compile_layers=True)
            makers[f"{label}, stock Qwen3, compiled"] = lambda rows: compiled(rows=rows)
        return lambda report: train_group(machine, report, makers, rows, goal)

    def stock(config) -> Qwen3Config:
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "tie_word_embeddings")  # fmt: skip
        return Qwen3Config(**{key: getattr(config, key) for key in keys})

    def switches(report: Report) -> None:
        make = partial(make_loop, machine, machine.config("buddygpt-0.3b"), length=1024)
        changes = {
            "full logits": {"skip_logits": False}, "isolate_documents": {"documents": True},
            "activation_checkpointing": {"checkpointing": True}, "muon": {"optimizer": muon},
            "bf16 weights": {"dtype": torch.bfloat16},
        }  # fmt: skip
        if not machine.quick:
            changes["compiled layers"] = {"compile_layers": True}
        if machine.cuda and importlib.util.find_spec("flash_attn"):
            changes["flash_attention_2"] = {"attention": "flash_attention_2"}
            changes["flash_attention_2, isolate_documents"] = {"attention": "flash_attention_2", "documents": True}
        if machine.cuda and importlib.util.find_spec("liger_kernel"):
            changes["liger kernels"] = {"liger": True}
        for name, change in changes.items():  # two at a time: memory
            makers = {"switches: defaults": lambda rows: make(rows=rows)}
            makers[f"switch: {name}"] = lambda rows, change=change: make(rows=rows, **change)
            train_group(machine, report, makers, 16, "")

    def mixture(report: Report) -> None:
        dense = machine.config("buddygpt-0.3b")
        mixed = machine.config("buddygpt-0.3b", **MIXTURE, moe_intermediate_size=dense.intermediate_size // 4)
        makers = {
            "dense": lambda rows: make_loop(machine, dense, rows, 1024),
            "mixture, as many active": lambda rows: make_loop(machine, mixed, rows, 1024),
        }
        train_group(machine, report, makers, 16, "0.8 of dense")

    return {
        "Qwen3-0.6B's dimensions": loops("bitbrain-0.6b", 2048, 16, "50% MFU", peer=True),
        "buddygpt-0.3b": loops("buddygpt-0.3b", 1024, 32, "45% MFU"),
        "buddygpt-0.1b": loops("buddygpt-0.1b", 1024, 32, "40% MFU"),
        "buddygpt-0.1b with 16k entries": loops(
            "buddygpt-0.1b", 1024, 64, "40% MFU", label="buddygpt-0.1b-16k", vocab_size=16_384
        ),
        "mixture against dense": mixture,
        "1B in 12 GB": partial(largest_in_least, machine),
        "generation": partial(generation, machine),
        "switches": switches,
    }


def largest_in_least(machine: Machine, report: Report) -> None:
    """Measure mini-qwen-1b at 1 x 1,024 with bf16 weights, checkpointing, and Muon or 8-bit AdamW."""
    optimizers = {"Muon": muon}
    if machine.cuda and importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes  # pyright: ignore  optional

        optimizers["8-bit AdamW"] = lambda model: bitsandbytes.optim.AdamW8bit(model.parameters())
    config = machine.config("mini-qwen-1b")
    for name, optimizer in optimizers.items():
        options = dict(dtype=torch.bfloat16, checkpointing=True, optimizer=optimizer)
        with machine.peak_memory() as memory:
            loop = make_loop(machine, config, 1, 1024, **options)
            loop.steps(2)
        batch = f"{loop.rows} x {loop.length:,}"
        del loop
        peak = f"{memory[0]:.2f} ({memory[1]:.2f} held)" if memory else "-"
        label = f"mini-qwen-1b, bf16 weights, checkpointing, {name}"
        report.add([label, batch, "-", "-", "-", peak, "12 GB"], name=label, peak_gib=memory)


def generation(machine: Machine, report: Report) -> None:
    """Measure greedy decoding in bf16 after a prompt of 128 tokens."""
    new = 4 if machine.quick else 128
    for batch in (1, 32):
        variants = {}
        for name in ("buddygpt-0.3b", "buddygpt-0.3b-mla"):
            model = machine.model(machine.config(name), torch.bfloat16).eval()
            prompt = torch.randint(
                model.config.vocab_size, (batch, 16 if machine.quick else 128), device=machine.device
            )
            variants[f"{name}, generation, batch {batch}"] = partial(decode, machine, model, prompt, new)
        samples = alternate(variants, machine.rounds)
        for name, values in samples.items():
            by_round = ratios(values, next(iter(samples.values())))
            report.add([name, f"{batch} x {new}", spread(values), "-", spread(by_round), "-", ""], name=name,
                       generated_per_second=values)  # fmt: skip


def decode(machine: Machine, model: PreTrainedModel, prompt: torch.Tensor, new: int) -> float:
    """Return generated tokens per second."""
    machine.synchronize()
    start = time.perf_counter()
    model.generate(prompt, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    machine.synchronize()
    return prompt.shape[0] * new / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round; nothing is written")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new group starts after this time")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU was found; use --device cpu --quick to check that the script runs")
    machine = Machine(args)
    sound = run_checks(machine)
    if machine.cuda and importlib.util.find_spec("liger_kernel"):
        sound &= check_liger()
    if not sound:
        sys.exit("a correctness check failed, so speed is not measured")
    report = Report("gpu", ["what", "batch", "tokens/s", "MFU", "ratio to the group's first", "peak GiB", "goal"])
    longest = 0.0
    for name, group in training_groups(machine).items():
        start = time.monotonic()
        if machine.end - start < longest:  # the next group may take as long as the longest so far
            report.add([name, "not reached in time", "", "", "", "", ""], name=name, skipped=True)
            continue
        try:
            group(report)
        except torch.OutOfMemoryError:
            report.add([name, "out of memory", "", "", "", "", ""], name=name, skipped=True)
        longest = max(longest, time.monotonic() - start)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    report.finish(args)
    if not machine.cuda:
        print("On a CPU, in float32: these figures are no claim about a GPU.")


if __name__ == "__main__":
    main()
