"""The shapes that come with the package: `model/configs/*.json`, by name."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}


def load_config(name_or_path: str, **overrides) -> PreTrainedConfig:
    """Return the config of a preset (by name), a config JSON, a checkpoint folder or a Hub repository ("owner/name").

    Args:
        name_or_path: A name in `PRESETS`, else what `AutoConfig.from_pretrained` takes.
        overrides: Fields to replace, such as `vocab_size`.

    Raises:
        OSError: There is no such preset, file or repository.
        StrictDataclassError: The numbers do not fit together.
    """
    if name_or_path not in PRESETS and "/" not in name_or_path and not Path(name_or_path).exists():
        raise OSError(f"no preset or file {name_or_path}; the presets are {', '.join(PRESETS)}")
    config = AutoConfig.from_pretrained(PRESETS.get(name_or_path, name_or_path), **overrides)
    config.validate()  # the overrides were set after the file's own fields had been checked
    return config
