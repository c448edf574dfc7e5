"""The plainest training loop there is: model, random tokens, fused AdamW. What every other loop is compared with.

Needs torch and transformers only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class BareLoop:
    """A model and its optimizer, ready to step on random rows.

    Args:
        model: In training mode afterwards, on `device`.
        rows, length: Of each batch, new random tokens every step.
        autocast: Compute in bf16 over the model's own weights.
        optimizer: Makes one from the model. None: fused AdamW.
        compile: Whether the model's forward pass is compiled.
        device: "cpu" or "cuda".
        forward: Further arguments of each forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        length: int,
        autocast: bool = False,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        compile: bool = False,
        device: str = "cpu",
        **forward: Any,
    ) -> None:
        self.model = model.to(device).train()
        self.vocab_size = model.config.vocab_size
        self.rows, self.length, self.autocast, self.device, self.forward = rows, length, autocast, device, forward
        make = optimizer or (lambda model: torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True))
        self.optimizer = make(self.model)
        self.run = torch.compile(self.model) if compile else self.model
        self.generator = torch.Generator(device).manual_seed(0)

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.rows * self.length

    def step(self) -> torch.Tensor:
        """Forward, backward, update -> the loss, still on the device."""
        shape = (self.rows, self.length)
        ids = torch.randint(self.vocab_size, shape, device=self.device, generator=self.generator)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.run(input_ids=ids, labels=ids, use_cache=False, **self.forward).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def steps(self, number: int) -> None:
        """So many of them."""
        for _ in range(number):
            self.step()
