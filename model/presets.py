"""The shapes that come with the package: `model/configs/*.json`, by name."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}


def load_config(name_or_path: str, **overrides) -> PreTrainedConfig:
    """Return the config of a preset (by name), a config JSON, a checkpoint folder or a Hub repository.

    Args:
        name_or_path: A name in `PRESETS`, else what `AutoConfig.from_pretrained` takes.
        overrides: Fields to replace, such as `vocab_size`.
    """
    return AutoConfig.from_pretrained(PRESETS.get(name_or_path, name_or_path), **overrides)
