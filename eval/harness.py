"""lm-eval, with every answer scored from its first token. Takes all options of `lm_eval`:

    python eval/harness.py --model hf --model_args pretrained=DIR,trust_remote_code=True --tasks TASK

To find the tokens of an answer, lm-eval tokenizes the prompt, tokenizes prompt + answer, and cuts the latter after as
many tokens as the prompt has. Tokenizers such as ours and Qwen's join a punctuation mark with the letters after it:
if `：C` is one token, `答案：C` has no more tokens than `答案：`, and the answer `C` is scored on none. Importing this
file replaces that rule for all models of lm-eval: the answer begins at the first token that it changes.

`eval/run_eval.py` and our tasks import this file. With plain `lm_eval`, your own task does so with one line:

    class: !function buddygpt.eval.harness.Task
"""

from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask

encode_pair_of_lm_eval = TemplateLM._encode_pair


def encode_pair(model: TemplateLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt and those of the answer.

    The answer's tokens begin where those of prompt + answer differ from those of the prompt alone. There is at least
    one of them. White space between the two belongs to the answer, as in lm-eval.
    """
    if model.backend != "causal":  # an encoder reads the prompt, a decoder the answer
        return encode_pair_of_lm_eval(model, context, continuation)
    tokens = model.tok_encode(context + continuation)
    n_prompt = 0
    for token, token_of_prompt in zip(tokens[:-1], model.tok_encode(context.rstrip()), strict=False):
        if token != token_of_prompt:
            break
        n_prompt += 1
    # A prompt may be a part of the first token. Then the answer follows the prefix token, as with an empty prompt.
    return tokens[:n_prompt] or [model.prefix_token_id], tokens[n_prompt:]


# A patch, because lm-eval has no plug-ins: it makes the model before it imports the code of a task.
TemplateLM._encode_pair = encode_pair


class Task(ConfigurableTask):
    """A task that a YAML file describes, as without `class`. Naming it imports this file."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
