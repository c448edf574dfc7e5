"""Measure the memory of a training step on fake tensors, which have shapes and no data.

The step runs operator by operator, with PyTorch's own autograd, autocast and checkpointing, and `MemoryCounter` adds
up the storages that are alive. This works for any causal language model of transformers, allocates nothing and needs
no GPU. It does not see the scratch memory inside a kernel or the rounding of an allocator.
"""

import contextlib
import gc
import math
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from buddygpt.model import losses_buddygpt
from buddygpt.training.optimizers import split_parameters

Precision = Literal["fp32", "fp32_master", "bf16_params"]
Optimizer = Literal["adamw", "adamw_8bit", "muon"]
Parts = dict[str, int]  # name of a part of the memory -> bytes

WEIGHTS, GRADIENTS, ACTIVATIONS, LOSS_HEAD, BUFFERS = "weights", "gradients", "activations", "loss head", "buffers"
FORWARD, UPDATE = "forward", "optimizer step"  # names of moments; all others are parameters of the backward pass

# Buffers of DeepSpeed's ZeRO by default, in bytes of bf16: `reduce_bucket_size`, and `stage3_max_live_parameters`.
ZERO_BUCKET = 500_000_000 * 2
ZERO_LIVE_WEIGHTS = 1_000_000_000 * 2

MOST_TOKENS = 2**17  # in a measured micro-batch, unless the recipe has more: it takes long, as logits come in chunks


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that operators return, while they are alive, on real or on fake tensors.

    Attributes:
        live: Bytes that are alive now, by part.
        peak: `live` when its sum was largest since the last call of [`MemoryCounter.start_moment`].
        part: Part that new tensors belong to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ACTIVATIONS
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total = self._peak_total = 0
        self._storages: dict[int, tuple[str, int]] = {}  # address -> part and size

    def track(self, part: str, *tensors: torch.Tensor) -> None:
        """Count the storages of `tensors` as `part`, each storage once. A storage of another part changes its part."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self._storages:
                old_part, size = self._storages[address]
                self.live[old_part] -= size
            else:
                size = storage.nbytes()
                self._total += size
                weakref.finalize(storage, self._forget, address)
            self._storages[address] = (part, size)
            self.live[part] += size
        if self._total > self._peak_total:
            self._peak_total = self._total
            self.peak = self.live.copy()

    def start_moment(self) -> None:
        """Forget the peak so far."""
        self._peak_total = self._total
        self.peak = self.live.copy()

    def _forget(self, address: int) -> None:
        part, size = self._storages.pop(address)
        self.live[part] -= size
        self._total -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # two thirds of all calls
            return func(*args)
        # The rule for the experts' product on fake tensors accepts bfloat16 only.
        is_grouped_mm = func is torch.ops.aten._grouped_mm.default
        if is_grouped_mm and isinstance(args[0], FakeTensor) and args[0].dtype is torch.float32:
            left, right, *others = args
            result = func(left.bfloat16(), right.bfloat16(), *others, **kwargs).float()
        else:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._storages:
                self.track(self.part, leaf)
        return result


@dataclass(frozen=True)
class Setup:
    """The choices of a recipe that change the memory of a training step.

    Attributes:
        precision: "fp32"; "fp32_master": 16-bit autocast over float32 weights (`bf16: true` or `fp16: true`); or
            "bf16_params": weights, gradients and optimizer in bfloat16, without float32 copies.
        optimizer: "adamw" (fused), "adamw_8bit" (bitsandbytes) or "muon" (training/optimizers.py).
        block_size: Tokens in a row.
        checkpointing: Keep only the input of each layer, and run the layer again in the backward pass.
        accumulation: Micro-batches per step. With more than one, gradients stay alive during the forward pass.
        gpus: Data-parallel processes.
        zero_stage: What ZeRO divides among them: 1 optimizer states, 2 also gradients, 3 also weights.
        device: "cuda" or "cpu"; the chunks of logits are larger on CUDA.
        reference: Bytes of each weight of a frozen copy, the reference model of DPO; 0: there is none.
    """

    precision: Precision = "fp32_master"
    optimizer: Optimizer = "adamw"
    block_size: int = 1024
    checkpointing: bool = False
    accumulation: int = 1
    gpus: int = 1
    zero_stage: int = 0
    device: str = "cuda"
    reference: int = 0

    @property
    def computes_in(self) -> Precision:
        """Precision of the forward and backward passes. DeepSpeed's engine runs both in bf16 and keeps fp32 copies."""
        return "bf16_params" if self.zero_stage and self.precision != "fp32" else self.precision


class FakeModel:
    """A model on fake tensors that measures its forward and backward passes.

    Args:
        config: Config of any causal language model.
        setup: Only precision, checkpointing, accumulation, block_size and device are used.
    """

    def __init__(self, config: PreTrainedConfig, setup: Setup) -> None:
        self.setup = setup
        self.mode = FakeTensorMode()
        with self.mode:
            dtype = torch.bfloat16 if setup.computes_in == "bf16_params" else torch.float32
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
            if setup.checkpointing:
                self.model.activation_checkpointing_enable()
        self.parameters = [each for each in self.model.parameters() if each.requires_grad]
        self._measured: dict[int, dict[str, Parts]] = {}

    def measure(self, rows: int) -> dict[str, Parts]:
        """Run one forward and backward pass with `rows` rows.

        Returns:
            Moment of the step -> the bytes of each part at its peak. The moments are the forward pass with the loss,
            and one per parameter: the part of the backward pass that ends when its gradient is complete.
        """
        if rows not in self._measured:
            gc.collect()  # cycles of an earlier model would be freed, and counted, in the middle of the step
            with self.mode, _logit_chunks_of(self.setup.device):
                self._measured[rows] = self._run_step(rows)
        return self._measured[rows]

    def _run_step(self, rows: int) -> dict[str, Parts]:
        model, counter = self.model, MemoryCounter()
        moments: dict[str, Parts] = {}

        def end_moment(name: str) -> None:
            moments[name] = dict(counter.peak)
            counter.start_moment()

        def enter_loss_head(*_) -> None:
            counter.part = LOSS_HEAD

        handles = [model.base_model.register_forward_hook(enter_loss_head)]
        for name, parameter in model.named_parameters():

            def gradient_is_complete(parameter: nn.Parameter, name: str = name) -> None:
                counter.track(GRADIENTS, parameter.grad)
                end_moment(name)

            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(gradient_is_complete))

        counter.track(WEIGHTS, *model.parameters())
        counter.track(BUFFERS, *model.buffers())
        if self.setup.accumulation > 1:  # an earlier micro-batch has left its gradients
            for parameter in self.parameters:
                parameter.grad = torch.empty_like(parameter)
                counter.track(GRADIENTS, parameter.grad)
        tokens = torch.zeros(rows, self.setup.block_size, dtype=torch.long)
        with counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.setup.computes_in == "fp32_master"):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            end_moment(FORWARD)
            counter.part = ACTIVATIONS
            loss.backward()
        for handle in handles:
            handle.remove()
        model.zero_grad()
        return moments


def _logit_chunks_of(device: str) -> contextlib.AbstractContextManager:
    """Make BuddyGPT's loss head cut the logits into chunks as it does on `device`."""
    rows_per_chunk = losses_buddygpt.rows_per_chunk
    return mock.patch.object(
        losses_buddygpt, "rows_per_chunk", lambda _, vocab_size: rows_per_chunk(torch.device(device), vocab_size)
    )


class StepMemory:
    """Memory of one GPU during a training step, as a function of the rows in the micro-batch.

    The forward and backward passes are measured. The rest is exact arithmetic and is added: optimizer states, the
    copies that DeepSpeed keeps, and what ZeRO divides among the processes.

    Args:
        fake_model: The model, made with the same precision, checkpointing and accumulation.
        setup: How it is trained.
    """

    def __init__(self, fake_model: FakeModel, setup: Setup) -> None:
        self.fake_model, self.setup = fake_model, setup
        self.element = 2 if setup.computes_in == "bf16_params" else 4
        self.total = sum(parameter.numel() for parameter in fake_model.parameters)
        self.states = self._states()

    def _states(self) -> Parts:
        """Return the bytes that are in use during the whole step, other than weights and gradients."""
        setup = self.setup
        parts = {"optimizer states": self._optimizer_bytes()}
        if setup.zero_stage:
            parts["fp32 weights"] = 4 * self.total
            parts = {name: size // setup.gpus for name, size in parts.items()}
        if setup.zero_stage == 3:
            parts["communication"] = ZERO_BUCKET + min(2 * self.total, ZERO_LIVE_WEIGHTS)
        elif setup.zero_stage:
            parts["communication"] = ZERO_BUCKET
        elif setup.gpus > 1:  # DDP's buckets are copies of the gradients
            parts["communication"] = self.element * self.total
        if setup.reference:
            parts["reference model"] = setup.reference * self.total
        return parts

    def _optimizer_bytes(self) -> int:
        """Return the bytes of all optimizer states, before ZeRO divides them."""
        setup, model = self.setup, self.fake_model.model
        element = 4 if setup.zero_stage else self.element
        muon_takes = {id(matrix) for matrix in split_parameters(model).matrices}
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        end_weights = {id(end.weight) for end in ends if end is not None}

        total = 0
        for parameter in self.fake_model.parameters:
            size = parameter.numel()
            if setup.optimizer == "muon" and id(parameter) in muon_takes:
                total += element * size  # momentum
            elif setup.optimizer != "adamw_8bit":
                total += 2 * element * size  # averages of the gradient and of its square
            elif id(parameter) in end_weights or size < 4096:  # bitsandbytes keeps these in float32
                total += 2 * 4 * size
            else:  # a byte each, and a float32 scale for each block of 256
                total += 2 * (size + 4 * math.ceil(size / 256))
        return total

    def _update(self) -> Parts:
        """Return the parts at the peak of the optimizer step."""
        model, working = self.fake_model.model, 0  # fused AdamW works in place
        if self.setup.optimizer == "muon":
            largest = max(split_parameters(model).matrices, key=torch.Tensor.numel)
            working = _muon_bytes(largest.shape, largest.dtype)
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        size = self.element * self.total
        return {WEIGHTS: size, BUFFERS: buffers, GRADIENTS: size, "working copies": working}

    def moments(self, rows: int) -> dict[str, Parts]:
        """Return each moment of a step with `rows` rows -> part -> bytes at the peak of that moment."""
        setup = self.setup
        found = {}
        for name, measured in (self.fake_model.measure(rows) | {UPDATE: self._update()}).items():
            parts = measured | self.states
            if setup.zero_stage >= 2:
                parts[GRADIENTS] = parts.get(GRADIENTS, 0) // setup.gpus
            if setup.zero_stage >= 3:
                parts[WEIGHTS] //= setup.gpus
            found[name] = parts
        return found

    def phases(self, rows: int) -> dict[str, Parts]:
        """Return the fullest moment of the forward pass, of the backward pass and of the optimizer step."""
        moments = self.moments(rows)
        forward, update = moments.pop(FORWARD), moments.pop(UPDATE)
        return {"forward and loss": forward, "backward": max(moments.values(), key=total_bytes), UPDATE: update}

    def peak(self, rows: int) -> int:
        """Return the bytes at the fullest moment of a step with `rows` rows."""
        return max(map(total_bytes, self.moments(rows).values()))

    def largest_micro_batch(self, memory: float, rows: int, measurements: int = 2) -> int:
        """Return the largest number of rows whose peak is at most `memory` bytes; 0 if not even one row fits.

        Every moment of a step is linear in the rows, except that BuddyGPT's chunks of logits stop growing at some
        number of rows. So the straight line through two measurements near the answer gives it.

        Args:
            memory: Bytes.
            rows: Rows that have been measured already.
            measurements: Further measurements.
        """
        if rows == 1 and self.peak(rows) > memory:
            return 0
        # First guess: the activations alone are proportional to the rows.
        forward = self.moments(rows)[FORWARD]
        guess = rows + int((memory - total_bytes(forward)) * rows / forward[ACTIVATIONS])
        limit = max(2 * rows, MOST_TOKENS // self.setup.block_size)
        points = [rows]
        for _ in range(measurements):
            point = min(max(guess, 1), limit)
            if point in points:
                point = point // 2 or 2
            if point not in points:
                points.append(point)
            nearest = sorted(points, key=lambda point: abs(point - guess))
            guess = self._largest_on_lines(memory, *nearest[:2])
        return guess

    def _largest_on_lines(self, memory: float, first: int, second: int) -> int:
        """Return the largest number of rows by the straight line of each moment through two measurements."""
        one, two = self.moments(first), self.moments(second)
        largest = math.inf
        for name, parts in one.items():
            size = total_bytes(parts)
            slope = (total_bytes(two[name]) - size) / (second - first)
            if slope > 0:
                largest = min(largest, first + (memory - size) / slope)
            elif size > memory:
                return 0
        return max(0, math.floor(largest))


def total_bytes(parts: Parts) -> int:
    return sum(parts.values())


@cache
def _muon_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    """Measure the most that a step of Muon allocates for a matrix, once it has its momentum."""
    with FakeTensorMode():
        matrix = nn.Parameter(torch.empty(shape, dtype=dtype))
        matrix.grad = torch.empty_like(matrix)
        optimizer = torch.optim.Muon([matrix])
        optimizer.step()
        with MemoryCounter() as counter:
            optimizer.step()
        return total_bytes(counter.peak)
