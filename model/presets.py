"""Load a model config by preset name (`model/configs/*.json`), file, checkpoint folder or Hub name."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}


# Far above any model. Beyond them building a model, even without memory for its weights, takes hours or overflows.
LARGEST = {
    "num_hidden_layers": 10_000,
    "n_routed_experts": 100_000,
    "num_experts": 100_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 1_000_000_000,
}


def load_config(name_or_path: str, **overrides) -> PreTrainedConfig:
    """Return the config of a preset (by name), a config JSON, a checkpoint folder or a Hub repository ("owner/name").

    Args:
        name_or_path: A key of `PRESETS`, or what `AutoConfig.from_pretrained` accepts.
        overrides: Fields to replace, such as `vocab_size`.

    Raises:
        OSError: There is no such preset, file or repository.
        StrictDataclassError: Two values of the config do not fit together.
        ValueError: A size is out of range.
    """
    if name_or_path not in PRESETS and "/" not in name_or_path and not Path(name_or_path).exists():
        raise OSError(f"no preset or file {name_or_path}; the presets are {', '.join(PRESETS)}")
    config = AutoConfig.from_pretrained(PRESETS.get(name_or_path, name_or_path), **overrides)
    require_possible_size(config)
    config.validate()  # `from_pretrained` sets overrides after it has validated the file's own values
    return config


def require_possible_size(config: PreTrainedConfig) -> None:
    """Raise ValueError if a size of a config is above `LARGEST`."""
    for name, largest in LARGEST.items():
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value > largest:
            raise ValueError(f"{name} is {value:,}; the largest possible is {largest:,}")
