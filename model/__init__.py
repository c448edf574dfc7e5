"""BuddyGPT, a small Chinese-English language model. Importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_buddygpt import BuddyGPTConfig
from .modeling_buddygpt import BuddyGPTForCausalLM, BuddyGPTModel, BuddyGPTPreTrainedModel

__all__ = ["BuddyGPTConfig", "BuddyGPTForCausalLM", "BuddyGPTModel", "BuddyGPTPreTrainedModel"]

AutoConfig.register("buddygpt", BuddyGPTConfig)
AutoModel.register(BuddyGPTConfig, BuddyGPTModel)
AutoModelForCausalLM.register(BuddyGPTConfig, BuddyGPTForCausalLM)

# Saving a model then copies its code next to the weights, so a checkpoint loads where this package is not installed.
BuddyGPTConfig.register_for_auto_class()
BuddyGPTModel.register_for_auto_class("AutoModel")
BuddyGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
