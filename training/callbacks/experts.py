"""Count tokens per expert, plot the load, and balance it during pretraining."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from buddygpt.training.callbacks.figures import plt, save_figure


def find_routers(model: nn.Module) -> list[nn.Module]:
    """Return the routers of a mixture of experts, from the first layer to the last; empty for a dense model."""
    return [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]


class ExpertLoadCallback(TrainerCallback):
    """Counts tokens per expert over all processes; reads from the device only when something is logged.

    The load is added to each log of the loss and drawn as `output_dir/expert_load.png` at each evaluation. With
    `bias_update_speed`, each step moves the selection bias of every expert by that amount towards an even load
    (loss-free balancing, arXiv:2408.15664). Gradient checkpointing runs each router twice, which doubles all counts
    and leaves the shares unchanged.

    Args:
        trainer: Its model has routers (see [`find_routers`]).
        bias_update_speed: Change of the bias per step; 0 only counts.
    """

    def __init__(self, trainer: Trainer, bias_update_speed: float = 0.0):
        self.trainer = trainer
        self.bias_update_speed = bias_update_speed
        self.routers = find_routers(trainer.model)
        experts = self.routers[0].e_score_correction_bias.numel()
        # (layers, experts + 1): tokens per expert, and in the last column the token-expert pairs that were chosen.
        # Counted since the last step, the last log and the last drawing.
        self.step = torch.zeros(len(self.routers), experts + 1, dtype=torch.long, device=trainer.args.device)
        self.logged = torch.zeros_like(self.step)
        self.drawn = torch.zeros_like(self.step)
        self.last_logged: torch.Tensor  # (layers, experts) of the last log, for the alarms
        for row, router in zip(self.step, self.routers, strict=True):
            router.register_forward_hook(self._counter(row))

    @staticmethod
    def _counter(row: torch.Tensor) -> Callable:
        @torch.no_grad()
        def count(router: nn.Module, args: tuple, output: tuple) -> None:
            if router.training:
                indices = output[2].flatten()  # expert indices, (tokens, experts per token)
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
        statistics = load_statistics(self.last_logged, int(self.logged[0, -1]))
        logs.update(statistics)
        state.log_history[-1].update(statistics)  # the trainer copied the logs before it called the callbacks
        self.logged = torch.zeros_like(self.logged)  # a new tensor: `last_logged` may be a view of the old one

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.drawn.any():
            draw_load(self.drawn[:, :-1].cpu(), Path(args.output_dir) / "expert_load.png")
        self.drawn.zero_()

    on_train_end = on_evaluate


def load_statistics(counts: torch.Tensor, routed: int) -> dict[str, float]:
    """Summarize the tokens that each expert received.

    Args:
        counts: (layers, experts) tokens received.
        routed: Token-expert pairs that the router of one layer chose.

    Returns:
        `router/load_max` and `router/load_min`: load of the busiest and of the idlest expert of any layer, relative to
        an even load (both 1 if balanced). `router/entropy`: entropy of the load relative to that of an even load, mean
        over layers. `router/dropped`: share of the chosen pairs that no expert received.
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


def draw_load(counts: torch.Tensor, path: Path) -> None:
    """Draw (layers, experts) tokens received as a heat map, relative to an even load."""
    load = counts / counts.float().mean(1, keepdim=True).clamp(min=1)
    layers, experts = load.shape
    figure, axis = plt.subplots(figsize=(2.5 + 0.45 * experts, 1.5 + 0.4 * layers))
    image = axis.imshow(load, vmin=0, vmax=2, cmap="coolwarm", aspect="auto")
    if experts <= 32:  # more would not be readable
        for layer, row in enumerate(load.tolist()):
            for expert, value in enumerate(row):
                axis.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axis.set(title="tokens per expert, 1 = even", xlabel="expert", ylabel="layer of experts")
    axis.set_yticks(range(layers))
    axis.set_xticks(range(0, experts, max(1, experts // 16)))
    figure.colorbar(image)
    figure.tight_layout()
    save_figure(figure, path)
