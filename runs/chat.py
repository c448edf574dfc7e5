"""Chat with a checkpoint in the terminal: a BuddyGPT model, a native export, a LoRA adapter or a model of the Hub.

    python runs/chat.py outputs/quickstart/dpo
    python runs/chat.py outputs/sft/adapter --system "Answer briefly." --temperature 0.7 --top_p 0.9

/reset starts a new conversation, /system TEXT sets the system prompt and does the same, /exit (or Ctrl-D) ends.
Ctrl-C stops an answer. Thoughts and tool calls are shown as the model writes them.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, logging, set_seed

from buddygpt.cli.errors import ArgumentParser, UserError, library_errors, run_script
from buddygpt.cli.files import read_json
from buddygpt.export.conversion import read_checkpoint

LIMITS = {
    "max_new_tokens": (1, 10**6),
    "temperature": (0, 100),
    "top_p": (0.001, 1),
    "top_k": (1, 10**6),
    "repetition_penalty": (0.1, 10),
}


class AnswerStreamer(TextStreamer):
    """Prints an answer while it grows, without the tokens that end it.

    Args:
        tokenizer: Decodes the tokens.
        ends: Tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False)  # <think> may be a special token
        self.ends = ends
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or value.item() not in self.ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint or adapter, or name of the Hub")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default: 512 tokens)")
    parser.add_argument("--temperature", type=float, help="0: the most likely answer (default: as the model says)")
    parser.add_argument("--top_p", type=float, help="sample among the most likely tokens of this total probability")
    parser.add_argument("--top_k", type=int, help="sample among this many tokens")
    parser.add_argument("--repetition_penalty", type=float, help="above 1: repeat less")
    parser.add_argument("--no_thinking", action="store_true", help="ask the model not to think first")
    parser.add_argument("--seed", type=int, help="seed of sampling")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    options = sampling(args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = load(args.model)
    if not tokenizer.chat_template:
        raise UserError(f"{args.model} has no chat template: it is a base model, fine-tune it first (sft/sft.py)")
    with library_errors(f"--device {args.device} cannot be used", "Leave it out, or name cpu or cuda"):
        model.to(args.device).eval()
    if args.seed is not None:
        set_seed(args.seed)
    converse(Conversation(model, tokenizer, options, not args.no_thinking, args.system))


def sampling(args: argparse.Namespace) -> dict[str, float]:
    """Return the options of `generate`. Raises UserError if one is out of range."""
    options = {}
    for key, (least, most) in LIMITS.items():
        value = getattr(args, key)
        if value is not None:
            if not least <= value <= most:
                raise UserError(f"--{key} is {value}; use a number from {least} to {most}")
            options[key] = value
    if options.get("temperature") == 0:
        del options["temperature"]
        options["do_sample"] = False
    elif options.keys() & {"temperature", "top_p", "top_k"}:
        options["do_sample"] = True
    return options


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a checkpoint, or an adapter merged into its base model, with the tokenizer.

    Raises:
        UserError: There is no such model, or a file of it is damaged.
    """
    folder = Path(name)
    settings = folder / "adapter_config.json"
    if not settings.is_file() or (folder / "config.json").is_file():
        return read_checkpoint(name)
    base = str(read_json(settings).get("base_model_name_or_path"))
    if (folder / base).is_dir():  # a path from the adapter's folder
        base = str(folder / base)
    model, tokenizer = read_checkpoint(base)
    with library_errors(f"{name} does not fit {base}", "Name the adapter of this base model"):
        return PeftModel.from_pretrained(model, name).merge_and_unload(), tokenizer


@dataclass
class Conversation:
    """A model and what was said so far.

    Attributes:
        model: Answers.
        tokenizer: Has a chat template.
        options: Options of `generate`, with `max_new_tokens`.
        thinking: Whether the model may think first.
        system: System prompt.
        turns: Questions and answers.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: dict[str, float]
    thinking: bool = True
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Print the answer while it is written, as far as it came before Ctrl-C, and remember both."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        turns = [*self.turns, {"role": "user", "content": question}]
        template_options = {} if self.thinking else {"enable_thinking": False}
        inputs = self.tokenizer.apply_chat_template(
            [*start, *turns], add_generation_prompt=True, return_dict=True, return_tensors="pt", **template_options
        ).to(self.model.device)
        context = self.model.config.max_position_embeddings
        room = context - inputs["input_ids"].shape[1]
        if room < 1:
            print(f"the conversation does not fit into the context of {context} tokens: ask less, or /reset")
            return

        ends = self.model.generation_config.eos_token_id
        streamer = AnswerStreamer(self.tokenizer, {ends} if isinstance(ends, int) else set(ends or ()))
        options = self.options | {"max_new_tokens": min(self.options["max_new_tokens"], room)}
        try:
            self.model.generate(**inputs, streamer=streamer, **options)
        except KeyboardInterrupt:
            streamer.end()
        self.turns = [*turns, {"role": "assistant", "content": streamer.text}]


def converse(conversation: Conversation) -> None:
    """Read questions and commands until the user leaves."""
    print("/reset: new conversation   /system TEXT: system prompt   /exit: leave   Ctrl-C: stop an answer")
    while True:
        try:
            text = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = text.partition(" ")
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            conversation.turns = []
            if command == "/system":
                conversation.system = rest.strip() or None
            print(f"new conversation, system prompt: {conversation.system or 'none'}")
        elif command.startswith("/"):
            print(f"there is no {command}; use /reset, /system TEXT or /exit")
        elif text:
            conversation.ask(text)


if __name__ == "__main__":
    run_script(main)
