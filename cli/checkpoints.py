"""Tokenizers and checkpoints given by name: check that the folder or Hub repository can be used, in one line."""

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_sha256

if sys.platform != "win32":
    import resource

MAX_LAYERS = 10_000

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # one class under its names in transformers 4 and 5
TEMPLATE_SECONDS = 2  # of a CPU; a usual template takes milliseconds
TEMPLATE_BYTES = 2**29
TEMPLATE_TURNS = 8  # a loop in a loop over the turns of a chat shows


def load_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase":
    """Return what `AutoTokenizer.from_pretrained` does, and warn if it reads the files in another way than they say.

    Raises:
        UserError: The folder is missing, or no tokenizer can be read from it.
    """
    if "/" in name_or_path and _is_missing(name_or_path):
        raise UserError(f"no such tokenizer folder: {name_or_path}")
    try:
        tokenizer = _read_tokenizer(name_or_path)
        _warn_if_class_overrides_file(tokenizer)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError(f"model_max_length is {tokenizer.model_max_length!r}")
    except Exception as error:  # transformers and tokenizers raise many kinds for damaged files
        raise UserError(f"cannot read a tokenizer from {name_or_path}: {_first_line(error)}") from error
    require_quick_template(tokenizer)
    return tokenizer


def _read_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase":
    """Call `AutoTokenizer.from_pretrained`, which imports torch; not for a folder where it would take the plain class.

    That is one with no model, whose tokenizer is all in tokenizer.json.
    """
    file = Path(name_or_path) / "tokenizer_config.json"
    if file.is_file() and not (file.parent / "config.json").exists():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") in PLAIN_CLASSES and "auto_map" not in config:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(name_or_path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name_or_path)


def require_quick_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise UserError if the chat template fails, or takes more time or memory than any should.

    Nested loops may never end, and `{{ 'x' * 10**9 }}` fills the memory. No signal interrupts a single operation such
    as `10 ** 10 ** 9`, so a forked child renders the template, with limits.
    """
    if not tokenizer.chat_template or not hasattr(os, "fork"):  # Windows has neither forks nor limits
        return
    read_end, write_end = os.pipe()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # the child starts no thread
        child = os.fork()
    if child == 0:
        os.close(read_end)
        _render_in_child(tokenizer, write_end)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        refusal = pipe.read()  # ends when the child does
    _, status = os.waitpid(child, 0)
    name = f"the chat template of {tokenizer.name_or_path}"
    if os.WIFSIGNALED(status):
        raise UserError(f"{name} takes over {TEMPLATE_SECONDS} s for a short chat; fix it")
    if refusal:
        raise UserError(f"{name} fails on a short chat: {refusal}; fix it")


def _render_in_child(tokenizer: "PreTrainedTokenizerBase", write_end: int) -> NoReturn:
    """Render two chats and exit. What a template must not do is written to the pipe; to refuse a chat is its right."""
    refusal = ""
    try:
        memory = psutil.Process().memory_info().vms + TEMPLATE_BYTES
        for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, TEMPLATE_SECONDS)):
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, hard))
        question = {"role": "user", "content": "question"}
        for chat in ([question], [question, {"role": "assistant", "content": "answer"}] * TEMPLATE_TURNS):
            try:
                tokenizer.apply_chat_template(chat, tokenize=False)
            except MemoryError:
                refusal = f"it needs over {TEMPLATE_BYTES // 2**20} MiB of memory"
            except (ArithmeticError, TypeError, RecursionError) as error:
                refusal = refusal or _first_line(error)
            except Exception:  # of the template: those who use it report it
                pass
        os.write(write_end, refusal.encode(errors="replace")[:1000])
    finally:
        os._exit(0)


def _warn_if_class_overrides_file(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Print one line if the tokenizer's class splits text in another way than tokenizer.json says."""
    name = tokenizer.name_or_path
    file = Path(name) / "tokenizer.json" if Path(name).is_dir() else try_to_load_from_cache(name, "tokenizer.json")
    if not tokenizer.is_fast or not isinstance(file, str | Path) or not Path(file).is_file():
        return
    loaded = tokenizer_rules(tokenizer.backend_tokenizer.to_str())
    saved = tokenizer_rules(Tokenizer.from_file(str(file)).to_str())
    parts = [part for part in ("normalizer", "pre_tokenizer", "vocab", "merges") if loaded[part] != saved[part]]
    if parts:
        print(
            f"warning: transformers reads {name} as {type(tokenizer).__name__}, with other {', '.join(parts)} than in "
            "tokenizer.json, so text gets other tokens. If the file is right, set tokenizer_class to "
            "PreTrainedTokenizerFast in tokenizer_config.json",
            file=sys.stderr,
        )


def tokenizer_rules(backend: str) -> dict[str, Any]:
    """Return the parts of a tokenizer's JSON that decide which ids a text gets."""
    state = json.loads(backend)
    splitting = json.dumps([state["normalizer"], state["pre_tokenizer"]])
    # Offsets do not change ids, and classes of transformers write them differently.
    normalizer, pre_tokenizer = json.loads(
        splitting, object_hook=lambda each: {key: value for key, value in each.items() if key != "trim_offsets"}
    )
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "vocab": state["model"]["vocab"],
        "merges": state["model"].get("merges"),
        "added": [[token["id"], token["content"]] for token in state["added_tokens"]],
    }


def end_of_answer_token(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the special token with which the chat template ends an answer, such as <|im_end|>.

    Raises:
        UserError: The template refuses a question with an answer, or ends the answer with plain text.
    """
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # of the template: it may refuse the roles, but also divide by zero
        raise UserError(f"the chat template of {tokenizer.name_or_path} refuses an answer: {error}") from error
    end = tokenizer(text.rpartition("answer")[2], add_special_tokens=False).input_ids
    tokens = tokenizer.added_tokens_decoder
    marks = [tokens[number].content for number in end if number in tokens and tokens[number].special]
    if not marks:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} ends answers without a special token, so the model could "
            f"not learn to stop: write {tokenizer.eos_token or 'one'} after each answer in chat_template.jinja"
        )
    return marks[0]


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save a tokenizer so that transformers 4 and 5 and other engines read the same tokens from it."""
    tokenizer.save_pretrained(folder)
    make_tokenizers_portable(folder)


def finish_checkpoint(folder: Path) -> None:
    """Make a saved checkpoint ready for use: a portable tokenizer, decoding with a cache, weights that all can read.

    Trainers turn `use_cache` off, and safetensors creates files that only their owner can read.
    """
    make_tokenizers_portable(folder)
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("use_cache") is False:
            file.write_text(json.dumps(config | {"use_cache": True}, indent=2) + "\n", encoding="utf-8")
    for weights in folder.rglob("*.safetensors"):
        for other in weights.parent.glob("*.json"):
            weights.chmod(other.stat().st_mode)


def make_tokenizers_portable(folder: Path) -> None:
    """Rewrite each tokenizer_config.json in a folder in terms that transformers 4 knows, too.

    transformers 5 writes its own name for the class, and a list of special tokens where version 4 expects their names.
    """
    for file in folder.rglob("tokenizer_config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["tokenizer_class"] == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokens = config.pop("extra_special_tokens", [])
        if tokens:
            config["additional_special_tokens"] = tokens
        else:
            config["extra_special_tokens"] = {}
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def require_causal_lm(name_or_path: str, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """Return the config of a causal language model, from a local folder or the Hub.

    Raises:
        UserError: The folder is missing, holds no model, only a LoRA adapter, or a model that is no causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import buddygpt.model  # noqa: F401  registers the model with the Auto classes
    from buddygpt.model.presets import require_possible_size

    # A folder without config.json may be a typo, or the wrong folder of a LoRA run.
    folder = Path(name_or_path)
    if _is_missing(name_or_path):
        raise UserError(f"no such checkpoint folder: {name_or_path}")
    if folder.is_dir() and not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            is_merged = (folder.absolute().parent / "config.json").exists()
            remedy = "use the merged model one folder up" if is_merged else "merge it as its README.md shows"
            raise UserError(f"{folder} holds a LoRA adapter, not a whole model; {remedy}")
        raise UserError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        require_possible_size(config)
    except Exception as error:  # transformers raises many kinds for odd configs
        raise UserError(f"cannot read a model config from {name_or_path}: {_first_line(error)}") from error

    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise UserError(
            f"{name_or_path} has {layers:,} layers in its config.json; correct it ({MAX_LAYERS:,} at most)"
        )

    # The class comes from the checkpoint's own code if that is trusted, else from those that transformers knows.
    has_own_class = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not has_own_class and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{name_or_path} is a `{config.model_type}` model, which is not a causal language model")
    return config


def checkpoint_sha256(name_or_path: str) -> str:
    """Return one sha256 over the weight files of a local checkpoint; a Hub name is returned unchanged."""
    weights = sorted(Path(name_or_path).glob("*.safetensors"))
    if not weights:
        return name_or_path
    hashes = "".join(file_sha256(file) for file in weights)
    return hashlib.sha256(hashes.encode()).hexdigest()


def _is_missing(name_or_path: str) -> bool:
    """Return True if the name is neither a folder nor a plausible Hub repository (likely a typo)."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return False
    is_hub_name = not folder.is_absolute() and len(folder.parts) == 2 and not folder.parent.is_dir()
    return not is_hub_name


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
