"""The marks of a chat template around what an assistant says, for readers other than transformers."""

import re


def hide_generation_marks(template: str) -> str:
    """Turn `{% generation %}`, which only transformers can parse, into a comment; the template renders the same."""
    return re.sub(r"\{%(-?)\s*((?:end)?generation)\s*(-?)%\}", r"{#\1 \2 \3#}", template)


def restore_generation_marks(template: str) -> str:
    """Undo [`hide_generation_marks`], so that an exported model can be fine-tuned again."""
    return re.sub(r"\{#(-?) ((?:end)?generation) (-?)#\}", r"{%\1 \2 \3%}", template)
