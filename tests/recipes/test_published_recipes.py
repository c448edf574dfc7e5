"""Every recipe parses, names what exists, keeps the published numbers, and runs three steps of each stage, small.

The stages read small files with the published columns from a server on this machine that answers as the Hub does,
under the names that the recipes give.
"""

import json
from pathlib import Path

import published_files
import pytest
import recipes_table
import yaml
from conftest import ROOT, run
from data_hubs import Hub, serving, use_endpoint

from buddygpt.cli.arguments import parse_arguments, read_config
from buddygpt.data.text.sources import load_readers
from buddygpt.eval.running.arguments import EvalArguments
from buddygpt.export.architectures import native_configs
from buddygpt.model.presets import PRESETS, load_config

RECIPES = ROOT / "recipes"
NAMES = sorted(path.parent.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("recipe.yaml"))
STAGES = ("data", "pretrain", "chat", "sft", "pairs", "dpo", "eval")
PUBLISHED = [  # of the issue: no recipe is missing
    *("buddygpt-0.1b", "buddygpt-0.3b", "buddygpt-0.3b-mla", "buddygpt-0.7b-mla-moe", "minimind-26m", "minimind-moe"),
    *("minimind-108m", "minimind-3-64m", "minimind-3-moe-198m", "bitbrain-0.6b", "steel-1.1b", "mini-qwen-1b"),
]
# Rows in a step of pretraining, SFT and DPO on the recipe's hardware, and learning rates. None: not published.
BATCHES = {
    "buddygpt-0.1b": ((1280, 512, 256), (None, 1e-4, 1e-6)),
    "buddygpt-0.3b": ((1280, 512, 256), (None, 1e-4, 1e-6)),
    "buddygpt-0.3b-mla": ((8192, 512, 256), (None, 1e-4, 1e-6)),
    "buddygpt-0.7b-mla-moe": ((2048, 512, 256), (None, 1e-4, 1e-6)),
    "minimind-26m": ((1024, 128, None), (1e-4, 1e-5, 1e-5)),
    "minimind-moe": ((640, 80, None), (1e-4, 1e-5, 1e-5)),
    "minimind-108m": ((256, 32, None), (1e-4, 1e-5, 1e-5)),
    "minimind-3-64m": ((256, 16, 4), (5e-4, 1e-5, 4e-8)),
    "minimind-3-moe-198m": ((256, 16, 4), (5e-4, 1e-5, 4e-8)),
    "bitbrain-0.6b": ((None, None, None), (None, None, None)),
    "steel-1.1b": ((512, 256, 128), (3e-4, 3e-5, 5e-6)),
    "mini-qwen-1b": ((1152, 1152, 384), (1e-4, 1e-5, 5e-7)),
    "mini-qwen-1b/12gb": ((1152, 1152, 384), (1e-4, None, None)),
}
LENGTHS = {  # tokens of a row: pretraining, SFT, DPO
    "buddygpt": (1024, 4096, 1024),
    "minimind-26m": (512, 512, 512),
    "minimind-moe": (512, 512, 512),
    "minimind-108m": (512, 512, 512),
    "minimind-3": (340, 768, 1024),
    "bitbrain": (2048, None, None),
    "steel": (2048, 768, 1536),
    "mini-qwen": (1024, 1024, 1024),
}


def config(name: str, stage: str) -> dict:
    return read_config(RECIPES / name / f"{stage}.yaml")


def settings(name: str) -> dict:
    return yaml.safe_load((RECIPES / name / "recipe.yaml").read_text("utf-8"))


def find_architecture(model) -> str | None:
    """Return the stock architecture that a model can be exported to, or None."""
    try:
        return next(iter(native_configs(model))).model_type
    except ValueError:
        return None


def test_no_recipe_is_missing():
    assert set(PUBLISHED) | {"mini-qwen-1b/12gb"} == set(NAMES) == set(BATCHES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_whole_folder_that_names_what_exists(name):
    folder = RECIPES / name
    assert {f"{stage}.yaml" for stage in STAGES} | {"run.sh", "recipe.yaml"} <= {
        each.name for each in folder.iterdir()
    }
    assert (folder / "run.sh").stat().st_mode & 0o100 and f"recipes/{name} " in (folder / "run.sh").read_text("utf-8")
    assert (folder if name != "mini-qwen-1b/12gb" else folder.parent).joinpath("README.md").is_file()
    found = settings(name)
    accelerate = yaml.safe_load((ROOT / found["accelerate_config"]).read_text("utf-8"))
    assert accelerate["num_processes"] == found["gpus"]
    assert found["output"] == f"outputs/{found['name']}"
    assert Path(config(name, "pretrain")["model_config"]).stem in PRESETS
    model = load_config(str(ROOT / config(name, "pretrain")["model_config"]))
    assert (found.get("export") == "none") == (find_architecture(model) is None)
    readers = load_readers()
    for source in config(name, "data")["sources"]:
        source = {"reader": source} if isinstance(source, str) else source
        assert source["reader"] in readers and (source.get("path") or readers[source["reader"]].hub)


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_reads_what_an_earlier_one_writes(name):
    data, pretrain, sft, dpo = (config(name, stage) for stage in ("data", "pretrain", "sft", "dpo"))
    chat, pairs, evaluation = (config(name, stage) for stage in ("chat", "pairs", "eval"))
    assert (pretrain["train_data"], pretrain["eval_data"]) == (f"{data['output']}/train", f"{data['output']}/eval")
    assert pretrain["tokenizer"] == data["tokenizer"]
    if (RECIPES / name / "tokenizer.yaml").exists():
        assert config(name, "tokenizer")["output"] == data["tokenizer"]
    assert (sft["train_files"], sft["eval_files"]) == ([chat["output"]], [chat["eval_output"]])
    assert (dpo["train_files"], dpo["eval_files"]) == ([pairs["output"]], [pairs["eval_output"]])
    assert sft["model_name_or_path"] == pretrain["output_dir"] and dpo["model_name_or_path"] == sft["output_dir"]
    folders = [pretrain["output_dir"], sft["output_dir"], dpo["output_dir"]]
    assert [each.partition("=")[2] for each in evaluation["checkpoints"]] == folders
    assert evaluation["heldout_text"] == f"{data['output']}/eval.jsonl"
    out = settings(name)["output"]
    assert folders == [f"{out}/{stage}" for stage in ("pretrain", "sft", "dpo")]
    assert evaluation["output"] == f"{out}/eval"


def test_every_evaluation_parses(monkeypatch):
    """The other stages are parsed by their scripts below."""
    for name in NAMES:
        monkeypatch.setattr("sys.argv", ["run_eval.py", "--config", str(RECIPES / name / "eval.yaml")])
        (args,) = parse_arguments(EvalArguments)
        assert args.suite and args.skip_missing and len(args.checkpoints) == 3


@pytest.mark.parametrize("name", NAMES)
def test_batches_learning_rates_and_lengths_are_those_published(name):
    rows, rates = BATCHES[name]
    lengths = next(numbers for prefix, numbers in LENGTHS.items() if name.startswith(prefix))
    for stage, batch, rate, length in zip(("pretrain", "sft", "dpo"), rows, rates, lengths, strict=True):
        found = config(name, stage)
        step = found["per_device_train_batch_size"] * found.get("gradient_accumulation_steps", 1)
        assert batch is None or step * settings(name)["gpus"] == batch, stage
        assert rate is None or float(found["learning_rate"]) == rate, stage
        assert length is None or found.get("block_size", found.get("max_length")) == length, stage


def test_other_numbers_are_those_published():
    assert all(config(name, "pretrain")["max_grad_norm"] == 1.0 for name in NAMES)
    for name in ("buddygpt-0.1b", "buddygpt-0.7b-mla-moe"):
        pretrain, sft, dpo = (config(name, stage) for stage in ("pretrain", "sft", "dpo"))
        assert (pretrain["weight_decay"], pretrain["adam_beta2"], sft["neftune_noise_alpha"]) == (0.1, 0.99, 5)
        assert (sft["warmup_steps"], dpo["beta"], dpo["num_train_epochs"]) == (0.01, 0.1, 1)
        assert {source["min_score"] for source in config(name, "data")["sources"][:2]} == {0.85}
    assert json.loads(PRESETS["buddygpt-0.7b-mla-moe"].read_text())["n_routed_experts"] == 16
    for name in ("minimind-26m", "minimind-3-64m"):
        assert config(name, "pretrain")["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    lora = config("minimind-26m", "dpo")
    assert (lora["lora_r"], lora["lora_alpha"], lora["lora_dropout"], lora["beta"]) == (8, 16, 0.1, 0.1)
    assert (
        config("minimind-26m", "sft")["num_train_epochs"],
        config("minimind-3-64m", "sft")["num_train_epochs"],
    ) == (6, 2)
    assert config("minimind-3-64m", "dpo")["beta"] == 0.15
    bitbrain, steel, qwen = (config(name, "pretrain") for name in ("bitbrain-0.6b", "steel-1.1b", "mini-qwen-1b"))
    assert (bitbrain["optimizer"], bitbrain["use_liger_kernel"], bitbrain["torch_compile"]) == ("muon", True, True)
    assert config("bitbrain-0.6b", "data")["languages"] == {"zh": 3, "en": 1}
    assert config("steel-1.1b", "data")["languages"] == {"zh": 4, "code": 1}
    assert (steel["weight_decay"], steel["adam_beta2"], steel["warmup_steps"]) == (0.05, 0.95, 1000)
    assert steel["max_steps"] == 1_080_000 and config("steel-1.1b", "dpo")["num_train_epochs"] == 3
    assert (qwen["warmup_steps"], qwen["lr_scheduler_type"]) == (0.1, "cosine")
    assert config("mini-qwen-1b", "chat")["turns"] == "first"
    assert settings("mini-qwen-1b")["accelerate_config"].endswith("zero2.yaml")


@pytest.mark.slow
def test_the_readmes_hold_the_tables_of_the_recipes():
    assert set(recipes_table.RECIPES) == set(PUBLISHED)
    for path, text in recipes_table.update_all().items():
        assert path.read_text("utf-8") == text, f"{path}: run python tools/recipes_table.py"


# --- three steps of each stage ---

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "n_soft_experts": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
HERE = {  # what does not exist on a CPU, or would take long, or writes more than the test reads
    "bf16": "false", "use_cpu": "true", "max_steps": 3, "logging_steps": 100, "warmup_steps": 0, "eval_strategy": "no",
    "save_strategy": "no", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "sample_prompts": "null", "attn_implementation": "sdpa", "report_to": "none", "dataloader_num_workers": 0,
}  # fmt: skip


def words(options: dict) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


class Runner:
    """Runs the stages of recipes in a folder. Files that recipes share are made once, and read from a hub."""

    def __init__(self, folder: Path, tokenizer: Path, address: str) -> None:
        self.folder, self.tokenizer, self.address = folder, tokenizer, address
        self.made: dict[Path, Path] = {}

    def shared(self, name: str, stage: str, script: str, **options: object) -> Path:
        """Return the output of a stage whose config several recipes may link to."""
        path = (RECIPES / name / f"{stage}.yaml").resolve()
        if path not in self.made:
            output = self.folder / f"{len(self.made)}-{stage}{'.jsonl' if stage in ('chat', 'pairs') else ''}"
            with pytest.MonkeyPatch.context() as patch:
                use_endpoint(patch, self.address)
                run(script, "--config", path, *words({"output": output, **options}))
            self.made[path] = output
        return self.made[path]

    def train(self, name: str, stage: str, script: str, **options: object) -> Path:
        output = self.folder / name / stage
        run(script, "--config", RECIPES / name / f"{stage}.yaml", *words(HERE | options | {"output_dir": output}))
        return output


@pytest.fixture(scope="module")
def runner(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    hub = folder / "hub"
    published_files.write_pretraining_sets(hub)
    published_files.write_chat_sets(hub)
    published_files.write_preference_sets(hub)
    with serving(Hub, hub) as address:
        yield Runner(folder, workspace / "tokenizer", address)


def small_model(name: str, folder: Path) -> Path:
    """Write a model of the same kind as the recipe's, but small."""
    preset = json.loads((ROOT / config(name, "pretrain")["model_config"]).read_text("utf-8"))
    fields = {key: SMALL.get(key, value) for key, value in preset.items() if key != "vocab_size"}
    fields["vocab_size"] = 512
    path = folder / f"{name.replace('/', '-')}.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_three_steps_of_each_stage(name, runner):
    tokenizer = runner.tokenizer
    if (RECIPES / name / "tokenizer.yaml").exists():
        size = {"vocab_size": 300, "max_bytes": 20_000}
        tokenizer = runner.shared(name, "tokenizer", "tokenizer/train_tokenizer.py", **size)
    light = {"tokenizer": tokenizer, "deduplicate": "none", "eval_fraction": 0, "workers": 1, "tasks": "null"}
    shards = runner.shared(name, "data", "data/prepare_pretrain.py", **light)
    sources = {source["name"] for source in json.loads((shards / "train/manifest.json").read_text())["sources"]}
    assert len(sources) == len(config(name, "data")["sources"])
    given = config(name, "chat")["input"]
    local = {"input": runner.folder / "deepctrl/sft_data_zh.jsonl"} if given[0].startswith("ms://") else {}
    held_out = {"eval_output": runner.folder / "held_out.jsonl"}
    chat = runner.shared(name, "chat", "data/convert_chat.py", **{"kind": "sft", **local, **held_out})
    pairs = runner.shared(name, "pairs", "data/convert_chat.py", **{"kind": "preference", **held_out})

    shape = {"model_config": small_model(name, runner.folder), "vocab_size": "null", "block_size": 32}
    data = {"train_data": shards / "train", "eval_data": "null", "tokenizer": tokenizer}
    one = {"torch_compile": "false", "use_liger_kernel": "false"}
    base = runner.train(name, "pretrain", "pretrain/pretrain.py", **shape, **data, **one)
    rows = {"max_length": 64, "eval_files": "null", "train_on_unfit_data": "true"}
    sft = runner.train(name, "sft", "sft/sft.py", **{"train_files": chat, "model_name_or_path": base, **rows})
    dpo = runner.train(name, "dpo", "rlhf/dpo.py", **{"train_files": pairs, "model_name_or_path": sft, **rows})

    # The run cards record the resolved values, those of `defaults` included.
    for stage, folder in (("pretrain", base), ("sft", sft), ("dpo", dpo)):
        card = json.loads((folder / "run.json").read_text())
        resolved = card["training_arguments"]
        expected = config(name, stage)
        assert card["steps"] == 3 and resolved["weight_decay"] == expected.get("weight_decay", 0.0), stage
        assert resolved["learning_rate"] == float(expected["learning_rate"]), stage
