"""BuddyGPT, a small Chinese-English language model. Importing it registers the model with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_buddygpt import BuddyGPTConfig
from .modeling_buddygpt import BuddyGPTForCausalLM, BuddyGPTModel, BuddyGPTPreTrainedModel

AutoConfig.register("buddygpt", BuddyGPTConfig)
AutoModel.register(BuddyGPTConfig, BuddyGPTModel)
AutoModelForCausalLM.register(BuddyGPTConfig, BuddyGPTForCausalLM)

# Saving a model copies its code beside the weights, so that a checkpoint loads where this package is not installed.
BuddyGPTConfig.register_for_auto_class()
BuddyGPTModel.register_for_auto_class("AutoModel")
BuddyGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["BuddyGPTConfig", "BuddyGPTForCausalLM", "BuddyGPTModel", "BuddyGPTPreTrainedModel"]
