"""lm-eval's model for checkpoints, which also tells where answers end, and fits them into the context."""

from collections import defaultdict
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from buddygpt.eval.running.answers import Answer, fit_to_context

DOCUMENT_SEPARATOR = "<|endoftext|>"  # before the first token of a document, as in training


class Checkpoint(HFLM):
    """lm-eval's `hf` model. Answers are [`Answer`], and `max_gen_toks` is lowered where the context is too short.

    Attributes:
        shortened: `max_gen_toks` before and after, for each task whose answers had to be shortened.
        only_full_answers: Whether to forbid answers to end before `max_gen_toks`: for measurements.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shortened: dict[str, list[int]] = {}
        self.only_full_answers = False
        self._ends = Ends()
        self.set_cache_hook(self._ends)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self.shortened |= fit_to_context(requests, lengths, self.max_length, self.max_gen_toks)
        self._ends.reset()
        texts = super().generate_until(requests, disable_tqdm)
        return [self._ends.pop(request.args[0], text) for request, text in zip(requests, texts, strict=True)]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> torch.Tensor:
        if self.only_full_answers:
            settings["min_new_tokens"] = max_length - context.shape[1]
        tokens = super()._model_generate(context, max_length, stop, **settings)
        ends = self.model.generation_config.eos_token_id
        ends = {self.eot_token_id, *([ends] if isinstance(ends, int) else ends or [])}
        special = self.tokenizer.added_tokens_encoder
        ends |= {special[text] for text in stop if text in special}
        for row in tokens[:, context.shape[1] :].tolist():
            place = next((place for place, token in enumerate(row) if token in ends), len(row))
            self._ends.generated.append((place < len(row), place))
        return tokens


class Ends:
    """How answers end. lm-eval sorts them before it generates and after, and tells its cache about each in between."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.generated: list[tuple[bool, int]] = []  # ended, tokens: in the order of generation
        self.seen: dict[tuple[str, str], list[tuple[bool, int]]] = defaultdict(list)

    def add_partial(self, method: str, request: tuple[Any, ...], result: Any) -> None:
        """Take the place of lm-eval's cache."""
        if method == "generate_until":
            self.seen[request[0], result].append(self.generated.pop(0))

    def pop(self, prompt: str, text: str) -> Answer:
        return Answer(text, *self.seen[prompt, text].pop(0))
