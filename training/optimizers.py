"""Optimizers that transformers' `optim` does not name, and what a named one needs, said before anything is loaded."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon
from transformers import TrainingArguments
from transformers.utils import is_bitsandbytes_available

from buddygpt.cli.errors import UserError

BITSANDBYTES = re.compile("bnb|paged|lion|ademamix|(?<!torch_)8bit")  # in the names of `OptimizerNames`


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for some parameters and AdamW for the others, as one optimizer: one list of groups, one state.

    A scheduler, gradient clipping, and saving and resuming see nothing special. Muon's update is scaled to the size of
    AdamW's (arXiv:2502.16982 section 2.2), so that one learning rate and one weight decay serve both.

    Args:
        matrices: Two-dimensional parameters, for Muon.
        others: Groups for AdamW: parameters and their weight decay.
        lr, weight_decay: Learning rate of both, weight decay of the matrices.
        adamw: Further arguments of AdamW.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        **adamw: Any,
    ) -> None:
        self.muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW(others, lr=lr, **adamw)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, defaults={})
        self._share()

    def _share(self) -> None:
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters as (matrices for Muon, others with weight decay, vectors without).

    Embedding, head and routers are no maps between hidden states and stay with AdamW, as do the experts of a layer,
    which are one three-dimensional tensor: torch's Muon takes two dimensions.
    """
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    matrices, others, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and id(parameter) not in ends and ".gate." not in name:  # a router's
            matrices.append(parameter)
        else:
            (others if parameter.ndim > 1 else vectors).append(parameter)
    return matrices, others, vectors


def muon_adamw(model: nn.Module, weight_decay: float, **kwargs: Any) -> MuonAdamW:
    """[`MuonAdamW`] over the trainable parameters of `model`."""
    matrices, others, vectors = split_parameters(model)
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return MuonAdamW(matrices, [group for group in groups if group["params"]], weight_decay=weight_decay, **kwargs)


def choose_optimizer(name: str | None, args: TrainingArguments) -> tuple[Callable, dict[str, Any]] | None:
    """What `Trainer` takes as `optimizer_cls_and_kwargs`: a factory for "muon", None where `args.optim` holds.

    Raises:
        UserError: The optimizer cannot run here.
    """
    optim = args.optim.value
    if BITSANDBYTES.search(optim) and not is_bitsandbytes_available():
        raise UserError(f"optim: {optim} needs bitsandbytes: pip install -r requirements-gpu.txt, or take adamw_torch")
    if name is None:
        return None
    if args.deepspeed_plugin is not None:
        raise UserError(
            "optimizer: muon cannot run under DeepSpeed, whose ZeRO flattens the matrices it needs: take "
            "accelerate_configs/ddp.yaml, or leave optimizer out"
        )
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(f"optimizer: muon takes AdamW for what is no matrix, not optim: {optim}. Leave one out")
    betas = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    fused = {"fused": optim == "adamw_torch_fused"}
    return lambda: muon_adamw, {"lr": args.learning_rate, "weight_decay": args.weight_decay, **betas, **fused}
