"""Optimizers that transformers' `optim` option does not have, and a check that the chosen one can run here."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.optim import AdamW, Muon
from transformers import Trainer, TrainingArguments
from transformers.utils import is_bitsandbytes_available

from buddygpt.cli.errors import UserError

# Names in transformers' `OptimizerNames` that bitsandbytes implements.
BITSANDBYTES = re.compile("bnb|paged|lion|ademamix|(?<!torch_)8bit")


def use_optimizer(trainer: Trainer, name: str | None) -> None:
    """Let a trainer that has no optimizer yet build the one of [`choose_optimizer`]; not all of TRL's take one."""
    trainer.optimizer_cls_and_kwargs = choose_optimizer(name, trainer.args)


def choose_optimizer(name: str | None, args: TrainingArguments) -> tuple[Callable, dict[str, Any]] | None:
    """Return the `optimizer_cls_and_kwargs` of `Trainer`: a factory for "muon", None to let it use `args.optim`.

    Raises:
        UserError: The optimizer cannot run here.
    """
    optim = args.optim.value
    if BITSANDBYTES.search(optim) and not is_bitsandbytes_available():
        raise UserError(f"optim: {optim} needs bitsandbytes: pip install -r requirements-gpu.txt, or use adamw_torch")
    if name is None:
        return None
    if args.deepspeed_plugin is not None:
        raise UserError(
            "optimizer: muon cannot run under DeepSpeed, because ZeRO flattens the matrices it needs: use "
            "accelerate_configs/ddp.yaml, or remove the option"
        )
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(
            f"optimizer: muon uses AdamW for all other parameters and cannot use optim: {optim}. Remove one of the two"
        )
    kwargs = {
        **read_muon_arguments(args.optim_args),
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "fused": optim == "adamw_torch_fused",
    }
    # `Trainer` calls the first function, without arguments, to get the second, which it calls with model and kwargs.
    return lambda: muon_adamw, kwargs


def read_muon_arguments(text: str | None) -> dict[str, float]:
    """Return what `optim_args` says about Muon: `adamw_lr=NUMBER`, the learning rate of embeddings, heads and norms.

    Small models learn their embedding sooner at a higher rate than their matrices (docs/speedrun.md; nanochat trains
    embeddings at 0.3 and matrices at 0.02). `learning_rate` is then that of the matrices of the layers, experts too;
    the schedule scales both.

    Raises:
        UserError: Anything else.
    """
    if not text:
        return {}
    key, _, value = text.replace(" ", "").partition("=")
    try:
        if key != "adamw_lr" or not 0 < float(value) < 100:
            raise ValueError
    except ValueError as error:
        raise UserError(f"optim_args: {text}: with optimizer: muon, only adamw_lr=NUMBER is possible") from error
    return {"adamw_lr": float(value)}


class ParameterGroups(NamedTuple):
    """The trainable parameters of a model by how `optimizer: muon` trains them.

    Attributes:
        matrices: Maps between hidden states, for Muon: the matrices of the layers, and LoRA's two for each.
        experts: Matrices of the layers for AdamW. Routers are not such maps; the experts of a layer are one
            three-dimensional tensor, and LoRA's matrices of them are stacked, while torch's Muon takes one matrix.
        embeddings: Embeddings and heads, for AdamW with its own learning rate.
        vectors: Norms and biases, likewise, without weight decay.
    """

    matrices: list[nn.Parameter]
    experts: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    vectors: list[nn.Parameter]


def muon_adamw(
    model: nn.Module, lr: float, weight_decay: float, adamw_lr: float | None = None, **kwargs: Any
) -> "MuonAdamW":
    """Return a [`MuonAdamW`] over the trainable parameters of `model`.

    Raises:
        UserError: None of them is for Muon.
    """
    found = split_parameters(model)
    if not found.matrices:
        raise UserError("optimizer: muon has no matrix to train: only embeddings, heads or experts are. Remove it")
    groups = [
        {"params": found.experts, "lr": lr, "weight_decay": weight_decay},
        {"params": found.embeddings, "lr": adamw_lr or lr, "weight_decay": weight_decay},
        {"params": found.vectors, "lr": adamw_lr or lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return MuonAdamW(found.matrices, groups, lr=lr, weight_decay=weight_decay, **kwargs)


def split_parameters(model: nn.Module) -> ParameterGroups:
    stacked = set()
    for module in model.modules():
        if isinstance(module, ParamWrapper) and module.num_experts > 1:
            stacked |= {id(parameter) for pair in (module.lora_A, module.lora_B) for parameter in pair.parameters()}
    groups = ParameterGroups([], [], [], [])
    for name, parameter in model.named_parameters():
        is_in_layer = re.search(r"\.\d+\.", name)
        is_router = re.search(r"[._]gate\.", name)
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            groups.vectors.append(parameter)
        elif not is_in_layer:
            groups.embeddings.append(parameter)
        elif parameter.ndim > 2 or is_router or id(parameter) in stacked:
            groups.experts.append(parameter)
        else:
            groups.matrices.append(parameter)
    return groups


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for some parameters and AdamW for the others, as one optimizer.

    Both work on the same list of groups and the same state, so that schedulers, gradient clipping, saving and resuming
    work as usual. Muon's update is scaled to the size of AdamW's (arXiv:2502.16982 section 2.2), so that one learning
    rate and one weight decay suit both, unless they are set apart.

    Args:
        matrices: Two-dimensional parameters, for Muon.
        others: Groups for AdamW: parameters, their learning rate and weight decay. LoRA may have none.
        lr: Learning rate of Muon.
        weight_decay: Weight decay of the matrices.
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
        self.adamw = AdamW(others or [{"params": []}], lr=lr, **adamw)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, defaults={})
        self._share_groups_and_state()

    def _share_groups_and_state(self) -> None:
        self.muon.param_groups = self.param_groups[:1]
        self.adamw.param_groups = self.param_groups[1:]
        self.muon.state = self.state
        self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # replaces the groups and the state
        self._share_groups_and_state()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss
