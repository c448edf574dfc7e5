"""Write `README.md`, the model card with which a finished folder can be published, from its run card.

The card is written again whenever its facts change, but never over text that a person wrote or edited.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from buddygpt.cli.files import write_atomically

TEMPLATE = "model_card.md.jinja"
MARK = re.compile(r"<!-- written from run\.json, (\w+) -->\n$")
NAMES = {"dpo": "DPO", "kto": "KTO", "orpo": "ORPO", "simpo": "SimPO", "grpo": "GRPO", "rloo": "RLOO", "sft": "SFT"}
STAGES = {
    "pretrain": ("pretraining", "预训练"),
    "distill": ("distillation", "蒸馏"),
    "reward": ("reward model", "奖励模型"),
}
STAGES |= {recipe: (name, name) for recipe, name in NAMES.items()}
KINDS = {
    "pretrain": ("base model", "基座模型"),
    "reward": ("reward model", "奖励模型"),
    "sft": ("chat model", "对话模型"),
}
GENERIC_NAMES = ("adapter", "native", "rlhf", *STAGES)  # of folders; the one above says more
RESTRICTED = re.compile(r"\bNC\b|non-?commercial|research|GPL|see card|none on", re.IGNORECASE)
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def write_model_card(folder: str | Path, run_card: dict[str, Any]) -> None:
    """Write `folder/README.md` unless there is one that this function has not written.

    Args:
        folder: A finished checkpoint, native export or adapter.
        run_card: Content of `run.json`.
    """
    folder = Path(folder)
    file = folder / "README.md"
    if file.exists() and not _is_ours(file.read_text(encoding="utf-8")):
        print(f"{file} was written or edited by hand: it stays as it is")
        return
    text = render(folder, run_card)
    with write_atomically(file) as partial:
        partial.write_text(f"{text}<!-- written from run.json, {_digest(text)} -->\n", encoding="utf-8")


def add_evaluation(folder: str | Path, evaluation: dict[str, Any]) -> None:
    """Add scores to the run card and the model card of a checkpoint; nothing happens to one without a run card.

    Args:
        folder: Folder or Hub name of the checkpoint.
        evaluation: `prompts` and `tasks`: {task: {metric: {value, n, ci95, chance}}}.
    """
    file = Path(folder) / "run.json"
    if not file.is_file():
        return
    card = json.loads(file.read_text(encoding="utf-8")) | {"evaluation": evaluation}
    with write_atomically(file) as partial:
        partial.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_model_card(folder, card)


def summarize_stage(card: dict[str, Any]) -> dict[str, Any]:
    """Return what a model card tells about a stage of training, from its run card."""
    arguments, settings = card.get("arguments", {}), card.get("training_arguments", {})
    tokens, speed = card.get("tokens_seen"), card.get("throughput", {}).get("median_tokens_per_second")
    data = card.get("data") or [{"name": Path(str(file)).name} for file in arguments.get("train_files", [])]
    return {
        "recipe": card["recipe"],
        "data": [{"license": None, "tokens": None, "language": None, "hub": None} | source for source in data],
        "tokens": tokens,
        "steps": card.get("steps"),
        "hours": tokens / speed / 3600 if tokens and speed else None,
        "learning_rate": settings.get("learning_rate"),
        "global_batch": card.get("origin", {}).get("global_batch"),
        "length": arguments.get("block_size") or settings.get("max_length"),
        "device": card.get("device"),
    }


def describe_base(name_or_path: str | None) -> dict[str, Any]:
    """Return entries for the run card of a model that starts from another.

    `earlier_stages` describes the training up to here, and `base_model` names the model that it began with: a
    repository of the Hub, a folder of an unknown model by its last part, or None if it began from scratch.
    """
    if name_or_path is None:
        return {}
    folder = Path(name_or_path)
    if not (folder / "run.json").is_file():
        return {"base_model": folder.name if folder.is_dir() else name_or_path, "earlier_stages": []}
    base = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    stages = [*base.get("earlier_stages", []), summarize_stage(base)] if "recipe" in base else []
    return {"base_model": base.get("base_model"), "earlier_stages": stages}


def render(folder: Path, card: dict[str, Any]) -> str:
    """Return the text of a model card."""
    adapter = (folder / "adapter_config.json").is_file()
    config = card["model_config"]
    if not adapter and (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stages = [*card.get("earlier_stages", []), summarize_stage(card)]
    sources = [source for stage in stages for source in stage["data"]]
    base = loaded = card.get("base_model")
    if adapter:
        loaded = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    facts = {
        "name": _name(folder),
        "card": card,
        "config": config,
        "stages": stages,
        "stage_names": STAGES,
        "sources": sources,
        "scores": _scores(card.get("evaluation", {})),
        "base": base,
        "local_base": f"`{Path(loaded).name}`" if adapter and loaded else None,
        "hub_base": loaded if loaded and HUB_NAME.fullmatch(loaded) and not Path(loaded).exists() else None,
        "kind": KINDS.get(card["recipe"], KINDS["sft"]),
        "chat": card["recipe"] != "pretrain",
        "reward": card["recipe"] == "reward",
        "adapter": adapter,
        "native": config["model_type"] != "buddygpt",
    }
    metadata = _metadata(facts)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(TEMPLATE).render(metadata=metadata.to_yaml().strip(), **facts) + "\n"


def _metadata(facts: dict[str, Any]) -> ModelCardData:
    licenses = [source["license"] or "" for source in facts["sources"]]
    restricted = facts["base"] or any(map(RESTRICTED.search, licenses))
    languages = {source["language"] for source in facts["sources"]} - {None}
    return ModelCardData(
        license="other" if restricted else "apache-2.0",
        license_name="see-data-and-base-model" if restricted else None,
        language=sorted(languages) or ["zh", "en"],
        library_name="peft" if facts["adapter"] else "transformers",
        pipeline_tag="text-classification" if facts["reward"] else "text-generation",
        tags=["buddygpt", *[stage["recipe"] for stage in facts["stages"]], *(["lora"] if facts["adapter"] else [])],
        base_model=facts["hub_base"],
        datasets=sorted({source["hub"] for source in facts["sources"] if source["hub"]}) or None,
        model_name=facts["name"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=score["task"],
                dataset_name=score["task"],
                metric_type=score["metric"],
                metric_value=score["value"],
                metric_args={key: score[key] for key in ("n", "ci95", "chance")},
            )
            for score in facts["scores"]
        ]
        or None,
    )


def _scores(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    tasks = evaluation.get("tasks", {})
    return [
        {"task": task, "metric": metric, **score} for task, scores in tasks.items() for metric, score in scores.items()
    ]


def _name(folder: Path) -> str:
    folder = folder.resolve()
    names = [folder.name]
    while names[0] in GENERIC_NAMES and folder.parent.name:
        folder = folder.parent
        names.insert(0, folder.name)
    return "-".join(names)


def _is_ours(text: str) -> bool:
    mark = MARK.search(text)
    return bool(mark) and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
