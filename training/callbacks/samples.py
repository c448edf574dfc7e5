"""Generate samples at every evaluation; print them and append them to `samples.md`."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from trl.models.utils import unwrap_model_for_generation

from buddygpt.cli.tables import escape_markdown


class SampleCallback(TrainerCallback):
    """Generates greedily from each prompt at every evaluation.

    All ranks generate, because sharded weights need every rank; only rank 0 prints and writes.

    Args:
        trainer: Provides the model, the tokenizer and the accelerator.
        prompts: Strings to continue, or lists of chat messages to answer.
        max_new_tokens: Maximum length of a sample in tokens.
    """

    def __init__(self, trainer: Trainer, prompts: list[Any], max_new_tokens: int = 48):
        self.trainer = trainer
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.last_step = -1

    def on_evaluate(self, args, state, control, **kwargs):
        # With several evaluation sets this is called once for each; sample once per step.
        if not self.prompts or state.global_step == self.last_step:
            return
        self.last_step = state.global_step

        lines = []
        with (
            torch.no_grad(),
            unwrap_model_for_generation(self.trainer.model_wrapped, self.trainer.accelerator) as model,
        ):
            was_training = model.training
            model.eval()
            for prompt in self.prompts:
                question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                lines.append(f"{question!r} → {self._generate(model, prompt)!r}")
            model.train(was_training)

        if state.is_world_process_zero:
            samples = "\n".join(f"- {line}" for line in lines)
            tqdm.write(f"samples at step {state.global_step}\n{samples}")
            samples = "\n".join(f"- {escape_markdown(line)}" for line in lines)
            with open(Path(args.output_dir) / "samples.md", "a", encoding="utf-8") as file:
                file.write(f"## step {state.global_step}\n{samples}\n\n")

    def _generate(self, model, prompt: str | list[dict[str, str]]) -> str:
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
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(new_tokens, skip_special_tokens=True).strip()
