"""Load a model config by preset name (`model/configs/*.json`), file, checkpoint folder or Hub name."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}


def load_config(name_or_path: str, **overrides) -> PreTrainedConfig:
    """Return the config of a preset (by name), a config JSON, a checkpoint folder or a Hub repository ("owner/name").

    Args:
        name_or_path: A key of `PRESETS`, or what `AutoConfig.from_pretrained` accepts.
        overrides: Fields to replace, such as `vocab_size`.

    Raises:
        OSError: There is no such preset, file or repository.
        StrictDataclassError: Two values of the config do not fit together.
    """
    if name_or_path not in PRESETS and "/" not in name_or_path and not Path(name_or_path).exists():
        raise OSError(f"no preset or file {name_or_path}; the presets are {', '.join(PRESETS)}")
    config = AutoConfig.from_pretrained(PRESETS.get(name_or_path, name_or_path), **overrides)
    config.validate()  # `from_pretrained` sets overrides after it has validated the file's own values
    return config
