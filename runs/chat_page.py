"""A page to chat with one checkpoint in the browser, or with two side by side; in the language of the browser.

    make chat                                       # the newest finished run
    make chat MODEL=outputs/quickstart/dpo
    python runs/chat_page.py --models outputs/quickstart/sft outputs/quickstart/dpo

`transformers serve` answers, on this machine. A BuddyGPT checkpoint is exported to a stock architecture first.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr
from openai import OpenAI, OpenAIError

from buddygpt.cli.arguments import parse_arguments, require_count
from buddygpt.cli.checkpoints import load_tokenizer, require_causal_lm
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import read_json
from buddygpt.export.serving import newest_run, servable, serve

TEXTS = read_json(Path(__file__).with_name("chat_page.json"))  # what the page says, by language

Message = dict[str, Any]  # of OpenAI's API


@dataclass
class PageArguments:
    models: list[str] = field(
        default_factory=list, metadata={"help": "One or two checkpoints. None: the newest finished run in outputs."}
    )
    exports: str = field(default="outputs/exports", metadata={"help": "Folder for exports to a stock architecture."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, mps. auto: a GPU if there is one."})
    host: str = field(default="127.0.0.1", metadata={"help": "0.0.0.0 lets other machines in, such as your phone."})
    port: int = field(default=7860, metadata={"help": "Port of the page."})
    open_browser: bool = field(default=True, metadata={"help": "Open the page in a browser of this machine."})

    def __post_init__(self) -> None:
        require_count("port", self.port, largest=65_535)
        if not isinstance(self.models, list) or len(self.models) > 2:
            raise ValueError(f"models is {self.models}; give one or two checkpoints")


@dataclass
class Model:
    """A model as the page shows it."""

    name: str
    folder: str  # what the server loads
    context: int  # positions
    can_think: bool


@dataclass
class Conversation:
    """The questions put to one model, and its answers.

    An answer that is under way ends as soon as `turns` is another list: so "stop", "new chat" and a new question work
    in whatever order the server hears of them. A browser's request to cancel can come too early or too late.
    """

    turns: list[Message] = field(default_factory=list)


def main() -> None:
    (args,) = parse_arguments(PageArguments, description=__doc__)
    checkpoints = args.models or [str(newest_run(Path("outputs")))]
    models = [prepare(checkpoint, Path(args.exports)) for checkpoint in checkpoints]
    with serve(device=args.device) as address:
        page = build_page(models, OpenAI(base_url=f"{address}/v1", api_key="none"))
        print(f"Chat with {' and '.join(checkpoints)}; Ctrl-C ends it.", flush=True)
        try:
            page.launch(
                server_name=args.host,
                server_port=args.port,
                inbrowser=args.open_browser,
                i18n=gr.I18n(**TEXTS),
                theme=gr.themes.Default(
                    font=["system-ui", "sans-serif"], font_mono=["monospace"]
                ),  # none from the net
                footer_links=["settings"],
                show_error=True,
            )
        except OSError as error:
            raise UserError(f"port: {error}") from error


def prepare(checkpoint: str, exports: Path) -> Model:
    """Return a model that can be served; UserError if it cannot, or has no chat template."""
    config = require_causal_lm(checkpoint)
    template = load_tokenizer(checkpoint).chat_template
    if not template:
        raise UserError(f"{checkpoint} has no chat template: tune it first, with sft/sft.py")
    folder = servable(checkpoint, exports)
    return Model(checkpoint, folder, config.max_position_embeddings, "enable_thinking" in template)


def build_page(models: list[Model], client: OpenAI) -> gr.Blocks:
    """Return the page: a conversation per model, one box for questions, and the settings."""
    text = gr.I18n()
    with gr.Blocks(title="BuddyGPT", fill_height=True) as page:
        conversations, chatbots, notes = [], [], []
        with gr.Row(scale=1):
            for model in models:
                with gr.Column():
                    conversations.append(gr.State(Conversation()))
                    chatbots.append(
                        gr.Chatbot(
                            label=model.name,
                            height="60vh" if len(models) == 1 else "40vh",
                            buttons=["copy"],
                            feedback_options=None,
                        )
                    )
                    notes.append(gr.Markdown())
        with gr.Row():
            box = gr.Textbox(placeholder=text("ask"), show_label=False, autofocus=True, scale=8, min_width=200)
            send = gr.Button(text("send"), variant="primary", min_width=80)
        with gr.Row():
            stop, retry, clear = (gr.Button(text(key), size="sm", min_width=60) for key in ("stop", "retry", "clear"))
        settings = build_settings(models, text)

        asked = gr.on(
            [box.submit, send.click],
            ask,
            [box, *conversations],
            [box, *chatbots],
            show_progress="hidden",
        )
        for model, conversation, chatbot, note in zip(models, conversations, chatbots, notes, strict=True):
            inputs, outputs = [conversation, *settings], [chatbot, note]
            first, again = make_answer(model, client), make_answer(model, client, again=True)
            asked.then(first, inputs, outputs, show_progress="hidden")
            retry.click(again, inputs, outputs, show_progress="hidden")
            chatbot.clear(forget, conversation, [chatbot, note])
        stop.click(stop_answers, conversations)
        emptied = clear.click(forget, conversations, [*chatbots, *notes])
        # An answer may have sent its last words at the same moment; show what stands now.
        emptied.then(show, conversations, chatbots, show_progress="hidden")
    return page


def build_settings(models: list[Model], text: gr.I18n) -> list[gr.components.Component]:
    """Add the folded settings to the page and return them in the order of [`build_request`]'s arguments."""
    context = min(model.context for model in models)
    with gr.Accordion(text("settings"), open=False):
        system = gr.Textbox("", label=text("system"), lines=2)
        with gr.Row():
            temperature = gr.Slider(0, 2, 0.7, step=0.05, label=text("temperature"), min_width=140)
            top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label=text("top_p"), min_width=140)
            repetition = gr.Slider(1, 2, 1, step=0.05, label=text("repetition"), min_width=140)
            length = gr.Slider(1, context, min(512, context // 2), step=1, label=text("length"), min_width=140)
        can_think = any(model.can_think for model in models)
        thinking = gr.Checkbox(True, label=text("thinking"), visible=can_think)
        tools = gr.Code("", language="json", label=text("tools"), lines=3)
    return [system, temperature, top_p, repetition, length, thinking, tools]


def ask(question: str, *conversations: Conversation) -> list[Any]:
    """Add the question to every conversation, and empty the box."""
    if question.strip():
        for conversation in conversations:
            conversation.turns = [*conversation.turns, {"role": "user", "content": question}]
    return ["", *(display(conversation.turns) for conversation in conversations)]


def stop_answers(*conversations: Conversation) -> None:
    """Stop the answers that are under way, and keep what they have said."""
    for conversation in conversations:
        conversation.turns = list(conversation.turns)


def forget(*conversations: Conversation) -> list[Any]:
    """Begin new conversations; return an empty chat and an empty line below it for each."""
    for conversation in conversations:
        conversation.turns = []
    return [[]] * len(conversations) + [""] * len(conversations)


def show(*conversations: Conversation) -> list[Any]:
    """Return what stands in the conversations, for the page: a list for each, or the list of the only one."""
    shown = [display(conversation.turns) for conversation in conversations]
    return shown if len(shown) > 1 else shown[0]


def make_answer(model: Model, client: OpenAI, again: bool = False) -> Any:
    """Return the function that streams a model's answer into its conversation; `again` replaces the last answer."""

    def answer(browser: gr.Request, conversation: Conversation, *settings: Any) -> Iterator[tuple]:
        text = TEXTS["zh" if browser.headers.get("accept-language", "").startswith("zh") else "en"]
        turns = list(conversation.turns)
        if again and turns and turns[-1]["role"] == "assistant":
            turns.pop()
        note = ""
        if turns and turns[-1]["role"] == "user":
            conversation.turns = turns
            try:
                request = build_request(model, turns, *settings)
                with client.chat.completions.create(model=model.folder, stream=True, **request) as stream:
                    for note in stream_reply(stream, model, conversation, turns, text):
                        yield display(turns, text), note
            except (OpenAIError, ValueError) as error:
                raise gr.Error(str(error)) from error
        yield display(conversation.turns, text), note  # other turns by now, if the answer was stopped

    return answer


def stream_reply(
    stream: Any, model: Model, conversation: Conversation, turns: list[Message], text: dict[str, str]
) -> Iterator[str]:
    """Add the answer to `turns` piece by piece, until it ends or `turns` are no longer those of the conversation.

    Yields:
        The line below the answer: empty until it ends.
    """
    reply: Message = {"role": "assistant", "content": ""}
    started, usage = None, None
    for chunk in stream:
        if conversation.turns is not turns:
            return
        usage = chunk.usage or usage
        if add_chunk(reply, chunk.choices[0].delta) and started is None:
            started = time.monotonic()  # after the prompt was read, and the model loaded
            turns.append(reply)
        yield ""
    if usage:
        yield describe(usage, started, model.context, text)


def build_request(
    model: Model,
    conversation: list[Message],
    system: str,
    temperature: float,
    top_p: float,
    repetition: float,
    length: int,
    thinking: bool,
    tools: str,
) -> dict[str, Any]:
    """Return the arguments of a request; ValueError if the tools are no JSON list."""
    start = [{"role": "system", "content": system}] if system.strip() else []
    turns = [{key: turn[key] for key in ("role", "content", "tool_calls") if key in turn} for turn in conversation]
    arguments = {
        "messages": start + turns,
        "temperature": temperature,
        "top_p": top_p,
        "frequency_penalty": repetition - 1,  # the server adds 1 and uses it as transformers' repetition_penalty
        "max_tokens": length,
    }
    if model.can_think:
        arguments["extra_body"] = {"chat_template_kwargs": {"enable_thinking": thinking}}
    if tools.strip():
        arguments["tools"] = json.loads(tools)
    return arguments


def add_chunk(reply: Message, delta: Any) -> bool:
    """Add a piece of the stream to the answer: text, thoughts or whole tool calls. Return False if it is empty."""
    thought = getattr(delta, "reasoning_content", None)
    reply["content"] += delta.content or ""
    if thought:
        reply["reasoning_content"] = reply.get("reasoning_content", "") + thought
    for call in delta.tool_calls or []:
        reply.setdefault("tool_calls", []).append(call.model_dump(exclude={"index"}))
    return bool(delta.content or thought or delta.tool_calls)


def display(conversation: list[Message], text: dict[str, str] = TEXTS["en"]) -> list[Message]:
    """Return the conversation for the page, with thoughts and tool calls as parts that unfold."""
    shown = []
    for turn in conversation:
        if "reasoning_content" in turn:
            metadata = {"title": text["thought"], "status": "done"}  # folded
            shown.append({"role": "assistant", "content": turn["reasoning_content"], "metadata": metadata})
        for call in turn.get("tool_calls", []):
            function = call["function"]
            metadata = {"title": f"{text['call']}: {function['name']}", "status": "done"}
            content = f"```json\n{function['arguments']}\n```"
            shown.append({"role": "assistant", "content": content, "metadata": metadata})
        if turn["content"] or turn["role"] == "user":
            shown.append({"role": turn["role"], "content": turn["content"]})
    return shown


def describe(usage: Any, started: float | None, context: int, text: dict[str, str]) -> str:
    """Return the line below an answer: its tokens, tokens per second, and a warning if the context is exceeded.

    Args:
        usage: The server's count of tokens.
        started: Time of the first piece of the answer.
        context: Positions of the model.
        text: What the page says, in the reader's language.
    """
    tokens = usage.completion_tokens
    line = text["tokens"].format(tokens=tokens)
    if started is not None and tokens > 1:
        line += text["speed"].format(speed=(tokens - 1) / (time.monotonic() - started))
    if usage.total_tokens > context:
        line += text["too_long"].format(total=usage.total_tokens, context=context)
    return line


if __name__ == "__main__":
    run_script(main)
