"""What the model says while it learns: greedy continuations at every evaluation, printed and kept in `samples.md`."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from trl.models.utils import unwrap_model_for_generation


class SampleCallback(TrainerCallback):
    """Generates from each prompt at every evaluation. Every process takes part, as sharded weights need; one prints.

    Args:
        trainer: Gives the model, the tokenizer and the accelerator.
        prompts: Strings to continue, or lists of chat messages to answer.
        max_new_tokens: Longest sample, in tokens.
    """

    def __init__(self, trainer: Trainer, prompts: list[Any], max_new_tokens: int = 48):
        self.trainer, self.prompts, self.max_new_tokens = trainer, prompts, max_new_tokens
        self.sampled_at = -1

    def on_evaluate(self, args, state, control, **kwargs):
        if not self.prompts or state.global_step == self.sampled_at:  # once, though called for each evaluation set
            return
        self.sampled_at = state.global_step
        with (
            torch.no_grad(),
            unwrap_model_for_generation(self.trainer.model_wrapped, self.trainer.accelerator) as model,
        ):
            was_training = model.training
            model.eval()
            lines = [f"- {_shown(prompt)!r} → {self._continue(model, prompt)!r}" for prompt in self.prompts]
            model.train(was_training)
        if state.is_world_process_zero:
            tqdm.write(f"samples at step {state.global_step}\n" + "\n".join(lines))
            with open(Path(args.output_dir) / "samples.md", "a", encoding="utf-8") as file:
                file.write(f"## step {state.global_step}\n" + "\n".join(lines) + "\n\n")

    def _continue(self, model, prompt) -> str:
        tokenizer = self.trainer.processing_class
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        else:
            inputs = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        inputs = inputs.to(model.device)
        output = model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, use_cache=True, synced_gpus=False
        )
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
