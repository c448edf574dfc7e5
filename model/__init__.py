"""BuddyGPT, a small Chinese-English language model. Importing it registers the model with the Auto classes.

The model's modules are imported when the Auto classes are, before or after this package, or when they are asked for.
Data preparation, which needs neither, starts sooner and in less memory.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:
    from .configuration_buddygpt import BuddyGPTConfig
    from .modeling_buddygpt import BuddyGPTForCausalLM, BuddyGPTModel, BuddyGPTPreTrainedModel

__all__ = ["BuddyGPTConfig", "BuddyGPTForCausalLM", "BuddyGPTModel", "BuddyGPTPreTrainedModel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "configuration_buddygpt" if name == "BuddyGPTConfig" else "modeling_buddygpt"
    return getattr(import_module(f".{module}", __name__), name)


@when_imported("transformers.models.auto.configuration_auto")
def _import_config(_: ModuleType) -> None:
    import_module(".configuration_buddygpt", __name__)


@when_imported("transformers.models.auto.modeling_auto")
def _import_model(_: ModuleType) -> None:
    import_module(".modeling_buddygpt", __name__)


# `register_for_auto_class`: saving a model copies its code beside the weights, so that a checkpoint loads where this
# package is not installed.
@when_imported("buddygpt.configuration_buddygpt")
def _register_config(ours: ModuleType) -> None:
    from transformers import AutoConfig

    AutoConfig.register("buddygpt", ours.BuddyGPTConfig)
    ours.BuddyGPTConfig.register_for_auto_class()


@when_imported("buddygpt.modeling_buddygpt")
def _register_model(ours: ModuleType) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    for auto, model in ((AutoModel, ours.BuddyGPTModel), (AutoModelForCausalLM, ours.BuddyGPTForCausalLM)):
        auto.register(ours.BuddyGPTConfig, model)
        model.register_for_auto_class(auto)
