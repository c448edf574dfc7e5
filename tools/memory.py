"""What a pretraining step keeps in a GPU's memory, part by part, before anything is allocated.

States (weights, gradients, optimizer) are counted from the shapes of the parameters, on the meta device. Activations
are counted, not guessed: the decoder runs forward on fake tensors, and autograd says what it saves. The rest (loss
head, temporaries of the backward pass) follows PyTorch's order of events; benchmarks/memory_model.py holds the sum
against measured peaks.
"""

import contextlib
import weakref
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from buddygpt.model.modeling_buddygpt import rows_per_chunk
from buddygpt.training.optimizers import split_parameters

Precision = Literal["fp32", "fp32_master", "bf16_params"]
Optimizer = Literal["adamw", "adamw_8bit", "muon"]

# What DeepSpeed's ZeRO sets aside for reducing gradients unless told otherwise: `reduce_bucket_size` numbers in bf16.
ZERO_BUCKET = 500_000_000 * 2
ZERO_LIVE_WEIGHTS = 1_000_000_000 * 2  # and the most that ZeRO-3 gathers at once, `stage3_max_live_parameters`


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as memory is concerned.

    Attributes:
        precision: "fp32"; "fp32_master": bf16 autocast over fp32 weights, which is what `bf16: true` means; or
            "bf16_params": weights, gradients and optimizer in bf16, with no fp32 copy.
        optimizer: "adamw" (fused), "adamw_8bit" (bitsandbytes; the embedding stays 32-bit) or "muon" (momentum for
            the matrices that training/optimizers.py gives it, AdamW for the rest).
        block_size: Tokens in a row.
        checkpointing: Whether a layer keeps its input only and is run again in the backward pass.
        accumulation: Micro-batches in a step; with more than one, gradients live through the forward pass too.
        gpus: Data-parallel processes.
        zero_stage: What is divided among them: 1 optimizer states, 2 gradients too, 3 weights too.
        full_logits: A head that makes all logits at once, in place of the chunked one.
        device: Of the two kinds, "cuda" makes larger chunks of logits.
    """

    precision: Precision = "fp32_master"
    optimizer: Optimizer = "adamw"
    block_size: int = 1024
    checkpointing: bool = False
    accumulation: int = 1
    gpus: int = 1
    zero_stage: int = 0
    full_logits: bool = False
    device: str = "cuda"

    @property
    def computes_in(self) -> Precision:
        """DeepSpeed's engine computes in bf16 throughout and keeps fp32 masters."""
        return "bf16_params" if self.zero_stage and self.precision != "fp32" else self.precision


@dataclass(frozen=True)
class Activations:
    """Bytes that one row leaves for the backward pass.

    Attributes:
        layers: Saved inside each decoder layer.
        inputs: The input of each layer, all that is kept of it with checkpointing.
        ends: Saved outside the layers (final norm, position embeddings).
    """

    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    ends: int


def count_activations(config: PreTrainedConfig, block_size: int, precision: Precision) -> Activations:
    """Run the decoder forward on one row and on two, and take the difference: what is left does not grow with rows."""
    # Grouped products know no fake float32 tensors: these (small models, on processors) run for real.
    real = precision == "fp32" and getattr(config, "n_routed_experts", None)
    with contextlib.nullcontext() if real else FakeTensorMode():
        model = AutoModel.from_config(config, dtype=torch.bfloat16 if precision == "bf16_params" else torch.float32)
        model.train()
        one, two = (SavedBytes(model, rows, block_size, precision == "fp32_master") for rows in (1, 2))
    return Activations(
        tuple(b - a for a, b in zip(one.layers, two.layers, strict=True)),
        tuple(b - a for a, b in zip(one.inputs, two.inputs, strict=True)),
        two.ends - one.ends,
    )


class SavedBytes:
    """Bytes of the storages that autograd saves in a forward pass, each once, the model's own left out.

    `layers`, `inputs` and `ends` are as in [`Activations`], for all rows.
    """

    def __init__(self, model: nn.Module, rows: int, block_size: int, autocast: bool) -> None:
        self.inputs: list[int] = []
        self._total = 0
        self._marks: list[int] = []  # the total before and after each layer
        self._known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        hooks = [layer.register_forward_pre_hook(self._enter) for layer in model.layers]
        hooks += [layer.register_forward_hook(self._leave) for layer in model.layers]
        tokens = torch.zeros(rows, block_size, dtype=torch.long)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            saved_tensors_hooks(self._pack, lambda tensor: tensor),
        ):
            output = model(input_ids=tokens, use_cache=False)  # while it lives, so does what is saved
        self.layers = [after - before for before, after in zip(self._marks[::2], self._marks[1::2], strict=True)]
        self.ends = self._total - sum(self.layers)
        del output
        for hook in hooks:
            hook.remove()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._total += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return tensor

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._total -= size

    def _enter(self, layer: nn.Module, args: tuple) -> None:
        self._marks.append(self._total)
        self.inputs.append(args[0].nbytes)

    def _leave(self, *_) -> None:
        self._marks.append(self._total)


@dataclass(frozen=True)
class Parameter:
    """A tensor of weights: elements, dimensions, whether it is embedding or head, whether Muon would take it."""

    numel: int
    ndim: int
    is_end: bool
    is_matrix: bool


def list_parameters(config: PreTrainedConfig) -> list[Parameter]:
    """Every parameter of the causal language model of `config`, a tied embedding once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices = {id(parameter) for parameter in split_parameters(model)[0]}
    return [Parameter(p.numel(), p.ndim, id(p) in ends, id(p) in matrices) for p in model.parameters()]


class MemoryModel:
    """Bytes on one GPU at the moments of a step when a peak can be.

    Args:
        config: Of BuddyGPT, or of a stock architecture whose decoder keeps its layers in `layers`.
        setup: How it is trained.
        activations: What [`count_activations`] found, where it has been asked before.
    """

    def __init__(self, config: PreTrainedConfig, setup: Setup, activations: Activations | None = None) -> None:
        self.config = config
        self.setup = setup
        self.precision = setup.computes_in
        self.full_logits = setup.full_logits or config.model_type != "buddygpt"  # stock architectures make all
        self.element = 2 if self.precision == "bf16_params" else 4
        self.parameters = list_parameters(config)
        self.total = sum(parameter.numel for parameter in self.parameters)
        self.activations = activations or count_activations(config, setup.block_size, self.precision)

    def states(self) -> dict[str, int]:
        """What is there all the time."""
        setup = self.setup
        parts = {"weights": self.element * self.total, "optimizer": sum(map(self._optimizer_bytes, self.parameters))}
        if setup.zero_stage:
            parts["master weights"] = 4 * self.total
        for name, stage in (("optimizer", 1), ("master weights", 1), ("weights", 3)):
            if setup.zero_stage >= stage:
                parts[name] //= setup.gpus
        if setup.zero_stage == 3:
            parts["communication"] = ZERO_BUCKET + min(2 * self.total, ZERO_LIVE_WEIGHTS)
        elif setup.zero_stage:
            parts["communication"] = ZERO_BUCKET
        elif setup.gpus > 1:  # DDP's buckets are copies of the gradients
            parts["communication"] = self.element * self.total
        return parts

    def _optimizer_bytes(self, parameter: Parameter) -> int:
        element = 4 if self.setup.zero_stage else self.element
        kind = self.setup.optimizer
        if kind == "muon" and parameter.is_matrix:
            return element * parameter.numel
        if kind == "adamw_8bit":
            if parameter.is_end or parameter.numel < 4096:  # bitsandbytes' own threshold
                return 8 * parameter.numel
            return 2 * parameter.numel + 2 * 4 * -(-parameter.numel // 256)  # a scale for each block of 256
        return 2 * element * parameter.numel

    def gradients(self) -> int:
        whole = self.element * self.total
        return whole // self.setup.gpus if self.setup.zero_stage >= 2 else whole

    def head(self, rows: int) -> int:
        """The output head's loss and gradient: logits some at a time, see `ChunkedCrossEntropy`."""
        tokens = rows * self.setup.block_size
        vocab_size, width = self.config.vocab_size, self.config.hidden_size
        gradients = self.element * (vocab_size + tokens) * width
        cast = 2 * vocab_size * width if self.precision == "fp32_master" else 0  # the weight in bf16
        if self.full_logits:  # logits, their log-softmax, the gradients of both: three in float32 at once
            return cast + 12 * tokens * vocab_size
        chunk = min(tokens, rows_per_chunk(torch.device(self.setup.device), vocab_size))
        if self.precision == "fp32":
            return gradients + 4 * chunk * vocab_size
        # bf16 logits, the same in float32, their bf16 gradient; the last two again, left over from the chunk before.
        left_over = 0 if chunk == tokens else 4 * chunk * vocab_size
        return gradients + cast + 8 * chunk * vocab_size + max(left_over, cast)

    def moments(self, rows: int) -> dict[str, dict[str, int]]:
        """Moment of the step -> part -> bytes, with `rows` rows in the micro-batch. The peak is at one of them."""
        act, checkpointing = self.activations, self.setup.checkpointing
        ends = [parameter.numel for parameter in self.parameters if parameter.is_end]
        end, tied = self.element * max(ends), len(ends) == 1
        gradients, accumulating = self.gradients(), self.setup.accumulation > 1
        held = gradients if accumulating else 0
        saved = rows * (act.ends + sum(act.inputs if checkpointing else act.layers))
        layer = rows * max(act.layers)
        working = layer // 4  # gradients of a layer's activations come and go: about so much at once
        casts = 0
        if self.precision == "fp32_master":
            casts = 2 * sum(p.numel for p in self.parameters if p.ndim >= 2 and not p.is_end)
        # A tied embedding has two gradients, and for a moment their sum beside them.
        embedding = end * (2 * tied + accumulating)
        states = self.states()
        moments = {
            "loss": {"gradients": held, "activations": saved, "autocast copies": casts, "loss head": self.head(rows)},
            "last layer's backward": {
                "gradients": held + end,
                "activations": saved + working + (layer if checkpointing else 0),
                "autocast copies": 0 if checkpointing else casts,
            },
            "first layer's backward": {"gradients": gradients, "activations": layer + working},
            "embedding's backward": {"gradients": gradients + embedding},
            "optimizer step": {"gradients": gradients, "working copies": self._optimizer_working_bytes()},
        }
        return {moment: states | parts for moment, parts in moments.items()}

    def _optimizer_working_bytes(self) -> int:
        if self.setup.optimizer != "muon":
            return 0  # fused AdamW works in place
        largest = max((p.numel for p in self.parameters if p.is_matrix), default=0)
        return (self.element + 3 * 2) * largest  # Newton-Schulz: the update, and it three times over in bf16

    def peak(self, rows: int) -> int:
        """Bytes at the fullest moment."""
        return max(sum(parts.values()) for parts in self.moments(rows).values())

    def largest_micro_batch(self, memory: int) -> int:
        """The most rows whose peak is within `memory` bytes; 0 where not even one fits."""
        rows, step = 0, 1 << 16
        while step:
            if self.peak(rows + step) <= memory:
                rows += step
            step >>= 1
        return rows
