"""Whether a model with Liger's kernels still computes what it did. Needs a GPU and liger-kernel.

python tools/benchmarks/liger_equality.py
"""

import torch
from transformers import AutoModelForCausalLM

from buddygpt.model.liger_kernels import apply_liger_kernel_to_buddygpt
from buddygpt.model.presets import load_config


def compare(preset: str = "debug", dtype: torch.dtype = torch.float32, device: str = "cuda") -> dict[str, float]:
    """Relative differences of the loss and of the whole gradient, with and without Liger, of one training step.

    In bfloat16 (autocast) both are compared with float32 without Liger: `plain_*` is the error that is there anyway.
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


def main() -> None:
    for preset in ("debug", "debug-mla-moe"):
        for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):  # float32 may run as TF32 in Triton
            result = compare(preset, dtype)
            wrong = result["liger_gradient"] > max(limit, 1.5 * result["plain_gradient"])
            print("FAIL" if wrong else "ok  ", preset, dtype, {key: f"{value:.1e}" for key, value in result.items()})


if __name__ == "__main__":
    main()
