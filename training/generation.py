"""Checks of the recipes whose trainer generates answers."""

from importlib.util import find_spec

from transformers import AutoConfig
from trl import DistillationConfig, GRPOConfig, ModelConfig, RLOOConfig

from buddygpt.cli.errors import UserError
from buddygpt.training.positions import require_positions


def room_for_prompts(
    model_args: ModelConfig, training_args: GRPOConfig | RLOOConfig | DistillationConfig
) -> int | None:
    """Return the tokens that an answer leaves of the model's positions; None if the model has no limit.

    Raises:
        UserError: An answer may have any length, or has no room; or vLLM cannot generate it.
    """
    length = training_args.max_completion_length
    if length is None:
        raise UserError("give max_completion_length: the most tokens of an answer")
    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(name, trust_remote_code=training_args.trust_remote_code)
    if getattr(training_args, "use_vllm", False):
        if config.model_type == "buddygpt":
            raise UserError("use_vllm: vLLM does not know BuddyGPT; train the native form (export/to_native.py)")
        if not find_spec("vllm"):
            raise UserError(
                "use_vllm: true needs vLLM 0.22 to 0.31, and 0.31 needs transformers below 5.18, older than here; set "
                "use_vllm: false"
            )
    changes = training_args.model_init_kwargs or {}
    limit = changes.get("max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    require_positions("max_completion_length", length, limit)
    return None if limit is None else limit - length
