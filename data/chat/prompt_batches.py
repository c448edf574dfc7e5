"""How TRL's trainers that generate read prompts: each with its own tools, in an order that a resumed run continues."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from buddygpt.data.chat.prompts import render_prompt


class OrderOfEpoch(Sampler):
    """The order of a `RepeatSampler`, shuffled by the number of the epoch, so that a resumed run continues it."""

    def __init__(self, sampler, trainer):
        self.sampler = sampler
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + int(self.trainer.state.epoch or 0))
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class PromptsWithTools:
    """Gives the tools of each row to the chat template; TRL only knows tools that it runs itself."""

    def _get_train_sampler(self, dataset=None) -> Sampler:
        return OrderOfEpoch(super()._get_train_sampler(dataset), self)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.tools_of_rows = [row["tools"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[list[dict[str, Any]]]) -> tuple[list[list[int]], None, dict]:
        ids = []
        for prompt, tools in zip(prompts, self.tools_of_rows, strict=True):
            ids.append(render_prompt(prompt, tools, self.processing_class, **self.chat_template_kwargs))
        return ids, None, {}
