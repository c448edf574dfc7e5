"""The BuddyGPT model. Importing this package registers it with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_buddygpt import BuddyGPTConfig
from .modeling_buddygpt import (
    BuddyGPTForCausalLM,
    BuddyGPTForSequenceClassification,
    BuddyGPTModel,
    BuddyGPTPreTrainedModel,
)

__all__ = [
    "BuddyGPTConfig",
    "BuddyGPTForCausalLM",
    "BuddyGPTForSequenceClassification",
    "BuddyGPTModel",
    "BuddyGPTPreTrainedModel",
]

AutoConfig.register("buddygpt", BuddyGPTConfig)
AutoModel.register(BuddyGPTConfig, BuddyGPTModel)
AutoModelForCausalLM.register(BuddyGPTConfig, BuddyGPTForCausalLM)
AutoModelForSequenceClassification.register(BuddyGPTConfig, BuddyGPTForSequenceClassification)

# Save the code with every checkpoint, so that it loads where this package is not installed (`trust_remote_code`).
BuddyGPTConfig.register_for_auto_class()
BuddyGPTModel.register_for_auto_class("AutoModel")
BuddyGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
BuddyGPTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
