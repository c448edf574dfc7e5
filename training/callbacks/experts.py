"""Which experts of a mixture the tokens go to: counted, shown, and in pretraining kept even."""

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn
from transformers import Trainer, TrainerCallback


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a mixture of experts, from the bottom layer up; empty for a dense model."""
    return [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]


def load_statistics(counts: torch.Tensor, routed: int) -> dict[str, float]:
    """Summarise the tokens that each expert received.

    Args:
        counts: (layers, experts) tokens received.
        routed: Token-expert pairs that the routers of one layer chose.

    Returns:
        `router/load_max` and `router/load_min`: the busiest and the idlest expert of any layer, relative to an even
        load (both 1 at perfect balance). `router/entropy`: of the load, relative to an even one's, mean over layers.
        `router/dropped`: share of the chosen pairs that no expert received.
    """
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(1) / torch.log(torch.tensor(counts.shape[1]))
    load = share * counts.shape[1]
    return {
        "router/load_max": load.max().item(),
        "router/load_min": load.min().item(),
        "router/entropy": entropy.mean().item(),
        "router/dropped": 1 - counts.sum().item() / max(routed * len(counts), 1),
    }


class ExpertLoadCallback(TrainerCallback):
    """Counts tokens per expert over all processes, without waiting for the device before something is logged.

    The counts go into each log of the loss and, as `expert_load.png`, into `output_dir` at each evaluation. With
    `bias_update_speed` each step moves every expert's selection bias by that much towards an even load (loss-free
    balancing, arXiv:2408.15664). Gradient checkpointing runs each router twice: all counts double, shares stay.

    Args:
        trainer: Its model has routers (see `find_routers`).
        bias_update_speed: 0: only count.
    """

    def __init__(self, trainer: Trainer, bias_update_speed: float = 0.0):
        self.trainer, self.bias_update_speed = trainer, bias_update_speed
        self.routers = find_routers(trainer.model)
        experts = self.routers[0].e_score_correction_bias.numel()
        # One row per layer; the last column counts the pairs chosen.
        self.step = torch.zeros(len(self.routers), experts + 1, dtype=torch.long, device=trainer.args.device)
        self.logged, self.drawn = torch.zeros_like(self.step), torch.zeros_like(self.step)
        for row, router in zip(self.step, self.routers, strict=True):
            router.register_forward_hook(self._counter(row))

    @staticmethod
    def _counter(row: torch.Tensor):
        @torch.no_grad()
        def count(router: nn.Module, args: tuple, output: tuple) -> None:
            if router.training:
                indices = output[2].flatten()
                row.scatter_add_(0, indices, torch.ones_like(indices))
                row[-1] += indices.numel()

        return count

    def on_step_end(self, args, state, control, **kwargs):
        counts = self.trainer.accelerator.reduce(self.step, "sum")
        if self.bias_update_speed:
            self._balance(counts[:, :-1])
        self.logged += counts
        self.drawn += counts
        self.step.zero_()

    @torch.no_grad()
    def _balance(self, counts: torch.Tensor) -> None:
        for router, row in zip(self.routers, counts, strict=True):
            router.e_score_correction_bias += self.bias_update_speed * torch.sign(row.float().mean() - row)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        self.last_logged = self.logged[:, :-1].cpu()
        found = load_statistics(self.last_logged, int(self.logged[0, -1]))
        logs.update(found)
        state.log_history[-1].update(found)  # it was filled before the callbacks were called
        self.logged = torch.zeros_like(self.logged)

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.drawn.any():
            draw_load(self.drawn[:, :-1].cpu(), Path(args.output_dir) / "expert_load.png")
        self.drawn.zero_()

    on_train_end = on_evaluate


def draw_load(counts: torch.Tensor, path: Path) -> None:
    """Draw (layers, experts) tokens received as a map of loads relative to an even one."""
    load = counts / counts.float().mean(1, keepdim=True).clamp(min=1)
    layers, experts = load.shape
    figure, axis = plt.subplots(figsize=(2.5 + 0.45 * experts, 1.5 + 0.4 * layers))
    image = axis.imshow(load, vmin=0, vmax=2, cmap="coolwarm", aspect="auto")
    if experts <= 32:
        for layer, row in enumerate(load.tolist()):
            for expert, value in enumerate(row):
                axis.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axis.set(title="tokens per expert, 1 = even", xlabel="expert", ylabel="layer of experts")
    axis.set_yticks(range(layers))
    axis.set_xticks(range(0, experts, max(1, experts // 16)))
    figure.colorbar(image)
    figure.tight_layout()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
    os.replace(partial, path)
