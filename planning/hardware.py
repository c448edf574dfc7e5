"""Machines that a run can be planned for: their memory, and how much of the work they do in a second."""

import json
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml

from buddygpt.cli.errors import UserError, did_you_mean
from buddygpt.training.flops import GpuSpec, load_gpus, peak_flops

RESULTS = Path(__file__).resolve().parents[1] / "tools" / "benchmarks" / "results"
MACHINES_FILE = Path(__file__).with_name("machines.yaml")
GIB = 2**30

# Assumed to be unavailable on a GPU: the CUDA context, and the share that the allocator loses to fragmentation.
CONTEXT_BYTES = GIB // 2
FRAGMENTATION = 0.05
# Assumed to be taken on a CPU by the system and by Python with its libraries, and on Apple chips by all but the GPU.
SYSTEM_BYTES = 2 * GIB
APPLE_GPU_SHARE = 0.7

ASSUMED_MFU = 0.3
# Training FLOP/s of one core in float32, measured in two ways on an Intel Xeon: 1,024 tokens of a model of 6.7M
# parameters in 0.546 CPU s (docs/performance.md, "Training step"), and 2.87M tokens of 4.0M parameters in 551 s on two
# cores (docs/results.md, "Real text on two CPU cores").
CORE_FLOPS = 72e9


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes:
        name: Its label; None if only its memory is known.
        kind: A GPU of NVIDIA, the GPU of an Apple chip, or a CPU.
        count: GPUs, or cores of the CPU.
        memory: Bytes of one GPU, or of the machine.
        has_bf16: Whether it trains in bfloat16.
    """

    name: str | None
    kind: Literal["gpu", "apple", "cpu"]
    count: int
    memory: float
    has_bf16: bool = True

    @property
    def usable(self) -> float:
        """Bytes that training can use."""
        if self.kind == "cpu":
            return self.memory - SYSTEM_BYTES
        if self.kind == "apple":
            return self.memory * APPLE_GPU_SHARE
        return (self.memory - CONTEXT_BYTES) / (1 + FRAGMENTATION)

    @property
    def reserved(self) -> str:
        """What `usable` leaves out, in words."""
        if self.kind == "cpu":
            return f"{SYSTEM_BYTES / GIB:.0f} GiB are reserved for the system and the libraries (assumed)"
        if self.kind == "apple":
            return f"{1 - APPLE_GPU_SHARE:.0%} are reserved for everything but the GPU (assumed)"
        return (
            f"{CONTEXT_BYTES / GIB:.2f} are reserved for CUDA and {FRAGMENTATION:.0%} for fragmentation (assumed). "
            "torch.compile and fused kernels use less"
        )

    @property
    def title(self) -> str:
        """The machine in words, such as "2 x RTX 3090"."""
        if self.kind == "cpu":
            return f"{self.name} with {self.count} core{'s' if self.count > 1 else ''}"
        return f"{self.count} x {self.name or f'a GPU of {self.memory / GIB:.1f} GiB'}"


def list_gpus() -> dict[str, tuple[GpuSpec, float]]:
    """Return each version of each GPU: label -> its specification and its memory in GiB."""
    versions = {}
    for gpu in load_gpus().values():
        for memory in gpu.memory_gib:
            label = gpu.name if len(gpu.memory_gib) == 1 else f"{gpu.name} {memory:g}GB"
            versions[label] = (gpu, memory)
    return versions


GPUS = list_gpus()


@cache
def load_machines() -> dict[str, dict[str, Any]]:
    """Return the entries of machines.yaml: "apple" and "cpu"."""
    return yaml.safe_load(MACHINES_FILE.read_text(encoding="utf-8"))


def find_machine(name: str | None, memory: str | None, gpus: int, cores: int | None = None) -> Machine:
    """Return the machine of this name; `memory` overrides that of a known one.

    Raises:
        UserError: The name is unknown or could be several, neither name nor memory is given, or a number is wrong.
    """
    size = None if memory is None else parse_memory(memory)
    if name is None:
        if size is None:
            raise UserError("give --gpu (such as 3090, M2 or cpu) or --memory (such as 12GB)")
        return Machine(None, "gpu", gpus, size)
    machine = _find_cpu(name, cores) or _find_apple(name) or _find_gpu(name, gpus, size)
    return machine if size is None else replace(machine, memory=size)


def _find_cpu(name: str, cores: int | None) -> Machine | None:
    if _plain(name) not in load_machines()["cpu"]:
        return None
    entry = load_machines()["cpu"][_plain(name)]
    count = cores or entry.get("cores") or os.cpu_count() or 1
    if count < 1:
        raise UserError(f"--cores {count} must be more than 0")
    memory = entry["memory_gib"] * GIB if "memory_gib" in entry else psutil.virtual_memory().total
    return Machine("a laptop" if entry else "a CPU", "cpu", count, memory, has_bf16=False)


def _find_apple(name: str) -> Machine | None:
    for label, entry in load_machines()["apple"].items():
        if _plain(label) == _plain(name):
            return Machine(label, "apple", 1, entry["memory_gib"] * GIB, has_bf16=False)
    return None


def _find_gpu(name: str, gpus: int, memory: float | None) -> Machine:
    found = [label for label, (gpu, _) in GPUS.items() if _plain(name) in (_plain(label), _plain(gpu.name))]
    if len(found) == 1 or (found and memory):  # the memory that is given decides between versions
        gpu, size = GPUS[found[0]]
        return Machine(found[0], "gpu", gpus, size * GIB, gpu.bf16)
    if found:
        raise UserError(f"--gpu {name}: which of {', '.join(found)}?")
    known = [*load_machines()["cpu"], *load_machines()["apple"], *GPUS]
    short = {_plain(label): label for label in known}
    match = did_you_mean(_plain(name), short)
    names = f"did you mean {short[match]}?" if match else f"give one of {', '.join(known)}, or --memory"
    raise UserError(f"--gpu {name}: not known; {names}")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|apple|[\s_-]", "", name.lower())


def parse_memory(text: str) -> float:
    """Return the bytes of a size such as 12GB (10^9) or 12GiB (2^30)."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(gb|gib)", text.strip().lower())
    if not match or float(match[1]) == 0:
        raise UserError(f"--memory {text}: give a size such as 12GB or 12GiB")
    return float(match[1]) * (GIB if match[2] == "gib" else 10**9)


# --- speed ---


@dataclass(frozen=True)
class Speed:
    """How fast a machine trains.

    Attributes:
        flops: FLOPs of training a second, of all GPUs or cores.
        peak: Its peak, or None on a CPU, where no peak is known.
        source: Where the number comes from.
    """

    flops: float
    peak: float | None
    source: str


def expected_speed(
    machine: Machine, model: str = "", compiled: bool = False, mfu: float | None = None
) -> Speed | None:
    """Return the speed of a machine, or None if it is unknown. Several GPUs are assumed to lose nothing.

    Args:
        machine: The machine.
        model: Name of the model, whose own measurement is preferred.
        compiled: Whether torch.compile is used.
        mfu: Share of the peak, instead of the measured or assumed one.
    """
    if machine.kind == "cpu":
        return Speed(
            CORE_FLOPS * machine.count,
            None,
            f"{CORE_FLOPS / 1e9:.0f} GFLOP/s a core, measured on an Intel Xeon (docs/performance.md); "
            "that of this CPU is assumed to be the same",
        )
    if machine.kind == "apple":
        entry = load_machines()["apple"][machine.name]
        peak = (entry["peak_tflops"] or load_machines()["apple"][entry["like"]]["peak_tflops"]) * 1e12
        source = _expected_mfu(mfu, None)[1]
        if not entry["peak_tflops"]:
            source += f"; Apple publishes no peak of the {machine.name}: that of the {entry['like']} is assumed"
        return Speed((mfu or ASSUMED_MFU) * peak, peak, source)
    dtype = torch.bfloat16 if machine.has_bf16 else torch.float16
    peak = machine.name and peak_flops(machine.name, dtype)
    if not peak:
        return None
    share, source = _expected_mfu(mfu, measured_mfu(machine, model, compiled))
    return Speed(share * peak * machine.count, peak, source)


def _expected_mfu(given: float | None, measured: tuple[float, str] | None) -> tuple[float, str]:
    if given is not None:
        return given, "as given (--mfu)"
    return measured or (ASSUMED_MFU, "assumed: there is no measurement on this GPU (set --mfu)")


def measured_mfu(machine: Machine, model: str, compiled: bool = False) -> tuple[float, str] | None:
    """Return the measured MFU of the model on such a GPU and its source; of an unknown model, the lowest of any."""
    if compiled:
        model += ", compiled"
    for path in sorted(RESULTS.glob("gpu*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        device = result["machine"]["device"]
        rows = {row["name"]: row["mfu"] for row in result["rows"] if row.get("mfu") and row.get("goal")}
        if not rows or machine.name is None:
            continue
        words = machine.name.split(" ")
        model_number = words[-1] if "RTX" in machine.name else words[0]
        if _plain(model_number) in _plain(device):
            name = model if model in rows else min(rows, key=rows.get)
            return rows[name], f"measured on {device} for {name} ({path.name})"
    return None
