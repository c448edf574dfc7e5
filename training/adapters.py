"""LoRA: check its settings before data is read, say what it trains, merge it into the weights of the base model."""

import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
)
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig, get_peft_config
from trl.trainer.reward_trainer import suppress_seqcls_warning

from buddygpt.cli.errors import UserError, did_you_mean
from buddygpt.training.zero3 import zero3_off

ALL = "all-linear"  # peft's name for all linear layers except the output head

LOADING = ("dtype", "device_map", "attn_implementation", "quantization_config")  # choices for training only

Args = SFTConfig | DPOConfig


def prepare_lora(model_args: ModelConfig, config: PreTrainedConfig, training_args: Args) -> None:
    """Complete the settings of LoRA and try them on a model without weights.

    `lora_target_modules` becomes all linear layers if it is None. Names in one word become a list. A reward model gets
    the task type with which peft trains and saves its score, too.

    Raises:
        UserError: peft refuses the settings, a name matches nothing (peft ignores that if another name matches), or
            quantization is requested without LoRA or twice.
    """
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    if not model_args.use_peft:
        if quantized:
            raise UserError("quantized weights cannot be trained: load_in_4bit and load_in_8bit need use_peft: true")
        return
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{model_args.model_name_or_path} is quantized, so LoRA could not be merged into float weights. Start "
            "from the checkpoint that it was made from; load_in_4bit: true quantizes that while it trains"
        )
    model_class, task = AutoModelForCausalLM, "CAUSAL_LM"
    if isinstance(training_args, RewardConfig):
        model_class, task = AutoModelForSequenceClassification, "SEQ_CLS"
    if model_args.lora_task_type not in ("CAUSAL_LM", task):  # the first is TRL's default
        raise UserError(f"lora_task_type is {model_args.lora_task_type}; this recipe needs {task}, or leave it out")
    model_args.lora_task_type = task
    for key in ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"):
        setattr(model_args, key, _split_names(getattr(model_args, key)))
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = ALL  # peft has defaults for stock architectures only
    with zero3_off(training_args), torch.device("meta"):
        model = model_class.from_config(config, trust_remote_code=training_args.trust_remote_code)
    _try_lora(model_args, model)


def _split_names(value: str | list[str] | None) -> str | list[str] | None:
    """Return names that were given as one word, such as "q_proj,v_proj", as a list; a pattern stays as it is."""
    words = [value] if isinstance(value, str) else value or []
    if all(re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", word) for word in words):
        return [name for word in words for name in re.split(r"\s*,\s*", word)] or None
    return value


def _try_lora(model_args: ModelConfig, model: PreTrainedModel) -> None:
    modules, shapes = dict(model.named_modules()), {name: p.shape for name, p in model.named_parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    unfit = [head, embedding] if model.config.tie_word_embeddings else [head]
    settings = get_peft_config(model_args)
    refusal, targeted = None, []
    try:
        with warnings.catch_warnings(action="ignore"):  # the trainer's own call gives them again
            targeted = get_peft_model(model, settings).base_model.targeted_module_names
    except (ValueError, TypeError, re.error) as error:
        refusal = error

    # peft has adapted the names in `settings` to experts that transformers fuses, unless only some of them were named.
    if "Cannot convert" not in str(refusal):
        linear = [name for name, each in modules.items() if isinstance(each, nn.Linear) and each is not head]
        if not isinstance(settings.target_modules, str):
            _require_matches("lora_target_modules", settings.target_modules or (), modules, [*linear, ALL])
        experts = [name for name, shape in shapes.items() if len(shape) == 3]
        _require_matches("lora_target_parameters", settings.target_parameters or (), shapes, experts, parts=2)
        whole = [name for name in modules if not name.split(".")[-1].isdigit()]
        _require_matches("lora_modules_to_save", model_args.lora_modules_to_save or (), modules, whole)
        if settings.target_parameters and model_args.lora_dropout:
            raise UserError(
                f"LoRA on parameters ({', '.join(sorted(settings.target_parameters))}) works without dropout only, "
                f"and lora_dropout is {model_args.lora_dropout}. Add --lora_dropout 0"
            )
    for name in targeted:
        if any(modules[name] is module for module in unfit):
            raise UserError(
                f"LoRA cannot train {name}: the loss or a tied weight reads it without LoRA. Train it as a whole: "
                f"--lora_modules_to_save {name.split('.')[-1]}, and leave it out of lora_target_modules"
            )
    if refusal:
        raise UserError(f"peft refuses these LoRA settings: {refusal}") from refusal


def _require_matches(
    option: str, names: Iterable[str], there: Iterable[str], suggested: Iterable[str], parts: int = 1
) -> None:
    """Raise UserError if a name is not the end of any name that is there; peft minds only if none is.

    Args:
        option: The option that holds the names.
        names: Its value.
        there: Dotted names of the model's modules or parameters.
        suggested: Those to suggest.
        parts: How many parts of a suggested name to show.
    """
    for name in sorted(names):
        if not any(f".{each}".endswith(f".{name}") for each in there):
            known = [each for each in _endings(suggested, parts) if each != name]
            match = did_you_mean(name, known)
            hint = f"did you mean {match}?" if match else f"it has {', '.join(known) or 'none that this option takes'}"
            raise UserError(f"{option}: nothing in the model is named {name}; {hint}")


def _endings(names: Iterable[str], parts: int) -> list[str]:
    """Return the last parts of dotted names, each once."""
    return list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names if name))


def start_lora(trainer: Trainer) -> None:
    """Say what LoRA trains, and note where the base model is, whatever the working directory.

    Saved adapters name it in another way, see [`make_adapter_movable`].
    """
    model = trainer.model
    settings, base = model.peft_config["default"], model.base_model.model.name_or_path
    if Path(base).is_dir():
        settings.base_model_name_or_path = str(Path(base).resolve())
    else:
        settings.revision = trainer.args.model_init_kwargs["revision"]
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes: fails if a size is no multiple of 32
            module.support_avx512bf16_for_cpu = False
    trainer.accelerator.print(describe_lora(model))


def describe_lora(model: PeftModel) -> str:
    """Return one line that says what LoRA trains, and which experts it does not reach."""
    targeted = model.base_model.targeted_parameter_names
    names = _endings(model.base_model.targeted_module_names, 1) + _endings(targeted, 2)
    whole = model.peft_config["default"].modules_to_save or []
    names += [name for name in _endings(dict(model.get_base_model().named_modules()), 1) if name in whole]
    trained, total = model.get_nb_trainable_parameters()
    line = f"LoRA trains {trained:,} parameters ({trained / total:.1%}), in {', '.join(names)}."

    experts = {}
    for name, parameter in model.get_base_model().named_parameters():
        name = name.replace(".base_layer", "")
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) == 3 and not parameter.requires_grad and name not in targeted:
            experts[name] = shape.numel()
    if experts:
        line += (
            f" Routed experts are not trained ({sum(experts.values()):,} parameters); to train them, add "
            f"--lora_target_parameters {' '.join(_endings(experts, 2))} --lora_dropout 0"
        )
    return line


def save_merged(trainer: Trainer, adapter: Path, folder: Path) -> None:
    """Merge a saved adapter into its base model as that was saved, and save the result in `folder`.

    The base model in memory may have lost precision: QLoRA quantizes it, DeepSpeed rounds it to bfloat16.
    """
    trained: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
    base, args = trained.get_base_model(), trainer.args
    changes = {key: value for key, value in args.model_init_kwargs.items() if key not in LOADING}
    with zero3_off(args), suppress_seqcls_warning():  # a new score comes from the adapter
        merged = type(base).from_pretrained(
            trained.peft_config["default"].base_model_name_or_path,
            dtype="auto",
            trust_remote_code=args.trust_remote_code,
            **changes,
        )
        merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(merged.config, key, getattr(base.config, key, None))
    if base.can_generate():
        merged.generation_config = base.generation_config
    merged.save_pretrained(folder)


def make_adapter_movable(adapter: Path, place: Path) -> None:
    """Name the base model of a saved adapter by its path from the adapter's own folder, if it is a folder.

    Both can then be moved or published together, and nobody reads where they were. peft opens such a path from the
    working directory: `PeftModel.from_pretrained(BASE, ADAPTER)` always works, `AutoPeftModelForCausalLM` in `place`.

    Args:
        adapter: Folder of the adapter; nothing happens if it holds none.
        place: Where that folder will be.
    """
    file = adapter / "adapter_config.json"
    if not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    base = settings["base_model_name_or_path"]
    if base and Path(base).is_absolute():
        path = os.path.relpath(base, os.path.realpath(place))
        text = json.dumps(settings | {"base_model_name_or_path": Path(path).as_posix()}, indent=2)
        file.write_text(f"{text}\n", encoding="utf-8")
