"""How fast a run is, and what share of the hardware that is: FLOPs of a token, peaks of devices, tokens/s and MFU.

`flops_per_token` is the definition of every MFU (model FLOPs utilisation, arXiv:2204.02311 appendix B) shown here:

    MFU = FLOPs of a token x tokens per second / (devices x peak of one device)
"""

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, Trainer, TrainerCallback

# Dense tensor-core peaks in TFLOP/s, the same for bfloat16 and float16, from NVIDIA's datasheets and architecture
# white papers (half of what they quote "with sparsity"). GeForce cards: accumulating in float32, as training does,
# which is half of the peak with float16 accumulation.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H200 NVL": 835,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H800": 989,
    "H800 PCIe": 756,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 149.7,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 5080": 112.6,
    "RTX 5070 Ti": 87.9,
    "RTX 5070": 61.7,
    "RTX 4090": 165.2,
    "RTX 4090 D": 147.1,
    "RTX 4080 SUPER": 104.4,
    "RTX 4080": 97.5,
    "RTX 4070 Ti": 80.2,
    "RTX 4070": 58.3,
    "RTX 4060 Ti": 44.1,
    "RTX 4060": 30.2,
    "RTX 3090 Ti": 80,
    "RTX 3090": 71.2,
    "RTX 3080": 59.5,
    "RTX 3070": 40.6,
    "RTX 3060": 25.5,
}
# Without bfloat16 tensor cores; RTX 20 with float32 accumulation, as above.
PEAK_TFLOPS_FLOAT16_ONLY = {
    "V100": 125,
    "V100-PCIE": 112,
    "V100S": 130,
    "T4": 65,
    "RTX 2080 Ti": 53.8,
}
_OTHER_CARD = r"(?! (Ti|SUPER|D|Laptop|Mobile|with Max-Q|MIG))"  # a variant that has a peak of its own


def flops_per_token(config: PreTrainedConfig, length: int) -> float:
    """FLOPs that training spends on one token: the forward pass and, twice as much, the backward pass.

        6 x matrix parameters + 6 x layers x heads x (width of a query or key + width of a value) x length

    - Matrix parameters: every matrix that a token is multiplied with. The output head once, tied or not; the embedding
      not, it is looked up; of routed experts the `num_experts_per_tok` that a token goes through; routers, shared
      experts and all experts of a soft mixture.
    - Attention as if each token saw all `length` tokens of its row, not halved for causality (as in PaLM, Megatron and
      nanoGPT), nor cut at document ends where attention is kept inside documents: the full row is counted.
    - Nothing is added for what gradient checkpointing computes again, for norms, activations or the optimizer.

    Args:
        config: Of BuddyGPT or of a stock architecture with grouped-query or multi-head latent attention.
        length: Tokens in a row.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attention = config.num_hidden_layers * config.num_attention_heads * _attention_width(config)
    return 6 * (_matrix_parameters(model, config) + attention * length)


def _matrix_parameters(model: nn.Module, config: PreTrainedConfig) -> float:
    head = model.get_output_embeddings().weight
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} - {head}
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1 and parameter not in looked_up]
    idle = sum(
        parameter.numel() * (1 - config.num_experts_per_tok / experts.num_experts)
        for name, experts in model.named_modules()
        if name.endswith(".experts")
        for parameter in experts.parameters()
        if parameter.ndim > 1
    )
    return sum(matrix.numel() for matrix in matrices) - idle


def _attention_width(config: PreTrainedConfig) -> int:
    """Of one head: elements of a query, which a key has too, and of a value."""
    if getattr(config, "kv_lora_rank", None):
        return config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s that a device reaches at best in dense products of `dtype`; None where that is not known for sure.

    Args:
        device_name: As `torch.cuda.get_device_name()` gives it. The longest name in the tables that it holds counts.
        dtype: What the products are computed in; only bfloat16 and float16 are known.
    """
    tables = [PEAK_TFLOPS] if dtype is torch.bfloat16 else []
    tables = [PEAK_TFLOPS, PEAK_TFLOPS_FLOAT16_ONLY] if dtype is torch.float16 else tables
    known = {name: peak for table in tables for name, peak in table.items()}
    found = [name for name in known if re.search(rf"\b{name}\b{_OTHER_CARD}", device_name, re.IGNORECASE)]
    return known[max(found, key=len)] * 1e12 if found else None


class ThroughputCallback(TrainerCallback):
    """Adds the speed since the last one to each log of the loss, without waiting for the device before that.

    - `tokens_per_second`: over all processes, counting real tokens where the batch has an `attention_mask`, else all
      tokens of its rows. The clock stands still during evaluations, samples and checkpoints.
    - `mfu`: see [`flops_per_token`]; left out where the device's peak is unknown (a CPU, float32), and where the
      work is another than the formula's: adapters on frozen weights, a reference model beside the trained one.
    - `data_wait`: share of that time which this process spent fetching batches: from the workers, or reading them
      itself. On CUDA this is the loader's part alone only with pinned memory and `non_blocking` copies.
    - `eta_seconds`: to the last step, at the pace of this session so far, evaluations and all.

    Args:
        trainer: Its `get_batch_samples` is wrapped to take the time of each fetch.
        run_card: Receives the entry `throughput`: medians over the logs, FLOPs per token, peak memory.
    """

    def __init__(self, trainer: Trainer, run_card: dict[str, Any]):
        self.trainer, self.run_card = trainer, run_card
        self.flops = find_flops(trainer)
        self.peak = find_peak(trainer) if self.flops else None
        trainer.get_batch_samples = self._timed(trainer.get_batch_samples)

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.began = state.global_step, time.perf_counter()
        self.away, self.last_step_end = False, self.began
        self._reset()

    def _reset(self) -> None:
        self.since, self.waited, self.paused = time.perf_counter(), 0.0, 0.0
        self.tokens: torch.Tensor | int = 0
        self.rows = self.row_tokens = 0

    def _timed(self, get_batch_samples: Callable) -> Callable:
        def fetch(batches, *args):
            if self.away:
                self.paused += time.perf_counter() - self.last_step_end
                self.away = False
            return get_batch_samples(self._watched(batches), *args)

        return fetch

    def _watched(self, batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            self._count(batch)
            yield batch

    def _count(self, batch: dict[str, torch.Tensor]) -> None:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        self.tokens = self.tokens + (ids.numel() if mask is None else mask.sum())
        longest = getattr(self.trainer.args, "max_length", None) or ids.shape[-1]  # rows packed into one are split
        self.rows += max(1, -(-ids.shape[-1] // longest)) * (ids.numel() // ids.shape[-1])
        self.row_tokens += ids.numel()

    def on_step_end(self, args, state, control, **kwargs):
        self.last_step_end = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        self.away = True

    on_save = on_evaluate

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        now = self.last_step_end = time.perf_counter()
        seconds = now - self.since - self.paused
        tokens = torch.as_tensor(self.tokens, device=args.device).reshape(1)
        speed = self.trainer.accelerator.reduce(tokens, "sum").item() / seconds
        found = {"tokens_per_second": speed}
        if self.peak:
            found["mfu"] = speed * self.flops(self.length) / (self.peak * args.world_size)
        found["data_wait"] = self.waited / seconds
        pace = (now - self.began) / (state.global_step - self.first_step)
        found["eta_seconds"] = pace * (state.max_steps - state.global_step)
        logs.update(found)
        state.log_history[-1].update(found)  # it was filled before the callbacks were called
        self.run_card["throughput"] = self._summary(state.log_history)
        self._reset()

    @property
    def length(self) -> int:
        return round(self.row_tokens / self.rows)

    def _summary(self, history: list[dict[str, float]]) -> dict[str, Any]:
        series = {
            key: [row[key] for row in history if key in row] for key in ("tokens_per_second", "mfu", "data_wait")
        }
        medians = {f"median_{key}": statistics.median(values) for key, values in series.items() if values}
        work = {"row_length": self.length, "flops_per_token": self.flops(self.length)} if self.flops else {}
        return {**medians, **work, **peak_memory(self.trainer.args.device)}


def find_flops(trainer: Trainer) -> Callable[[int], float] | None:
    """[`flops_per_token`] of the trainer's model by row length, or None where training does other work than that."""
    if isinstance(trainer.model, PeftModel) or hasattr(trainer, "ref_model"):
        return None
    fixed, one = (flops_per_token(trainer.model.config, length) for length in (0, 1))
    return lambda length: fixed + (one - fixed) * length  # rows of chat differ in length from log to log


def find_peak(trainer: Trainer) -> float | None:
    """FLOP/s of one of the run's devices at best, or None where it is not known."""
    args = trainer.args
    if args.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else trainer.model.dtype
    return peak_flops(torch.cuda.get_device_name(args.device), dtype)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: of tensors on a CUDA device at most, else of this process in main memory at most."""
    if device.type == "cuda":
        return {"peak_cuda_memory_bytes": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_process_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
