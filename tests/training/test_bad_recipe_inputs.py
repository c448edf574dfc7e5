"""Bad input to the training recipes ends in one line and exit status 2, and changes no file.

All cases run in forks of one process, which has imported transformers and TRL.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import yaml
from bad_inputs import assert_refused, import_modules_of, run_command
from safetensors.torch import load_file, save_file
from tiny_shards import Shard, write_shards
from tiny_tokenizer import train_tiny_tokenizer
from transformers import AutoTokenizer

from buddygpt.data.shards.format import tokenizer_fingerprint
from buddygpt.training.saving import write_checksums

pytestmark = pytest.mark.slow

SCRIPTS = {"pretrain": "pretrain/pretrain.py", "sft": "sft/sft.py", "dpo": "rlhf/dpo.py"}
QUESTIONS = {"春天到了，孩子们在做什么？": "在树下读书、唱歌。", "What has come?": "The spring.", "add(1, 22)?": "23"}
CONTINUE = ["--model_config", "null", "--model_name_or_path", "IN/model"]
LONG = "n" * 300


def chat(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A tokenizer, a model, rows, shards and a config of each recipe; with them, it would train two steps."""
    folder = tmp_path_factory.mktemp("good")
    import_modules_of(SCRIPTS.values())
    train_tiny_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "made")
    marks = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_models.make_model(num_key_value_heads=2, vocab_size=len(tokenizer), **marks).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = {"chats.jsonl": [], "pairs.jsonl": []}
    for question, answer in QUESTIONS.items():
        rows["chats.jsonl"].append({"messages": chat("user", question) + chat("assistant", answer)})
        answers = {"chosen": chat("assistant", answer), "rejected": chat("assistant", answer[::-1])}
        rows["pairs.jsonl"].append({"prompt": chat("user", question), **answers})
    for name, content in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    write_shards(folder / "shards", [Shard("a.ds", "a", [64] * 20)], tokenizer_fingerprint(tokenizer))
    common = {"max_steps": 2, "learning_rate": 1.0e-3, "save_steps": 1, "use_cpu": True, "bf16": False}
    tuning = {"model_name_or_path": "IN/model", "max_length": 64, "activation_checkpointing": False}
    shards = {"train_data": "IN/shards", "eval_data": "IN/shards", "tokenizer": "IN/made"}
    for recipe, keys in {
        "pretrain": {**shards, "model_config": "debug", "block_size": 32},
        "sft": {**tuning, "train_files": ["IN/chats.jsonl"], "eval_files": ["IN/chats.jsonl"]},
        "dpo": {**tuning, "train_files": ["IN/pairs.jsonl"], "eval_files": ["IN/pairs.jsonl"]},
    }.items():
        text = yaml.safe_dump(common | keys)
        (folder / f"{recipe}.yaml").write_text(text)
    return folder


@pytest.fixture
def refuse(good, tmp_path) -> Callable:
    """Runs a recipe on a copy of the good input, and asserts that it refuses it with a message."""

    def run_and_assert(recipe: str, words: list[object], message: str, change: Callable | None = None) -> None:
        folder = tmp_path / "in"
        shutil.copytree(good, folder)
        for config in folder.glob("*.yaml"):
            config.write_text(config.read_text().replace("IN/", f"{folder}/"))
        if change:
            change(folder)
        words = [str(word).replace("IN/", f"{folder}/") for word in words]
        if "--config" not in words:
            words = ["--config", str(folder / f"{recipe}.yaml"), *words]
        if "--output_dir" not in words:
            words += ["--output_dir", str(tmp_path / "out")]
        assert_refused(run_command(SCRIPTS[recipe], *words, watch=[folder]), message)
        assert not (tmp_path / "out" / "run.lock").exists()

    return run_and_assert


# --- numbers ---

NUMBERS = {
    "pretrain": {
        "learning_rate": ["inf", "nan", -1, 5],
        "max_steps": [0, -2, 10**19],
        "num_train_epochs": [0, -1, 1e300],
        "per_device_train_batch_size": [0, -1, 10**9],
        "per_device_eval_batch_size": [0, 10**9],
        "gradient_accumulation_steps": [0, -1, 10**9],
        "seed": [-1, 2**64],
        "warmup_steps": [-1],
        "weight_decay": [-1],
        "max_grad_norm": [-1, "nan"],
        "adam_beta1": [1.5],
        "adam_beta2": [1, -1],
        "adam_epsilon": [-1],
        "label_smoothing_factor": [2, -1, "nan"],
        "save_steps": [0, -1],
        "logging_steps": [0, -1],
        "save_total_limit": [0, 1],
        "dataloader_num_workers": [-1, 10**6],
        "block_size": [0, -1, 1],
        "replay_step": [0],
    },
    "dpo": {
        "beta": [0, -1, "nan"],
        "label_smoothing": [0.6, -1, "nan"],
        "ld_alpha": [2],
        "loss_weights": [-1, "nan"],
        "max_length": [0, 1],
        "dataset_num_proc": [0],
        "precompute_ref_batch_size": [0],
        "ref_model_mixup_alpha": [5],
        "lora_r": [0],
        "lora_dropout": [2],
    },
}


@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [(recipe, key, value) for recipe, keys in NUMBERS.items() for key, values in keys.items() for value in values],
)
def test_numbers_out_of_range(recipe, key, value, refuse):
    refuse(recipe, [f"--{key}", value], key)


# --- options that libraries refuse, and packages that are not installed ---

OPTIONS = {
    "loss of SFT": ("sft", ["--loss_type", "nosuch"], "invalid choice: 'nosuch'"),
    "loss of DPO": ("dpo", ["--loss_type", "sigmoid", "nosuch"], "`loss_type` is nosuch, must be one of sigmoid,"),
    "divergence": ("dpo", ["--f_divergence_type", "nosuch"], "must be one of reverse_kl"),
    "loss of another": ("dpo", ["--loss_type", "exo_pair"], "Label smoothing must be greater than 0.0"),
    "eos token": ("sft", ["--eos_token", "nosuch"], "The specified `eos_token` ('nosuch') is not found"),
    "padding": ("sft", ["--padding_free", "true"], "`max_length` is not enforced"),
    "wandb": ("sft", ["--report_to", "wandb"], "report_to: wandb is not installed: pip install wandb"),
    "mlflow": ("sft", ["--report_to", "mlflow"], "report_to: mlflow is not installed"),
    "tracker": ("pretrain", ["--report_to", "nosuch"], "nosuch is not supported, only"),
    "optimizer": ("sft", ["--optim", "galore_adamw"], "You need to install `galore_torch`"),
    "optimizer options": ("sft", ["--optim_args", "x"], "cannot build the optimizer"),
    "schedule": ("pretrain", ["--lr_scheduler_kwargs", '{"x": 1}'], "unexpected keyword argument 'x'"),
    "mapping": ("sft", ["--model_init_kwargs", "x"], "`model_init_kwargs` is x; write a mapping"),
    "unknown keyword": ("sft", ["--model_init_kwargs", '{"nosuch": 1}'], "unexpected keyword argument 'nosuch'"),
    "attention": ("pretrain", ["--attn_implementation", "nosuch"], "cannot build the model: Specified `attn_impl"),
    "FSDP": ("sft", ["--fsdp", "full_shard"], "only works in distributed training"),
    "DeepSpeed": ("pretrain", ["--deepspeed", "none.json"], "existing deepspeed config"),
    "compiler": ("sft", ["--torch_compile_backend", "nosuch"], "'NOSUCH' is not a valid DynamoBackend"),
    "best metric": (
        "sft",
        ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", 1]
        + ["--metric_for_best_model", "nosuch"],
        "is set to 'eval_nosuch'",
    ),
    "vocabulary": ("pretrain", ["--vocab_size", 10**9], "vocab_size"),
    "memory": ("pretrain", ["--vocab_size", 10**8, "--model_config", "buddygpt-0.1b"], "of memory, this machine has"),
    "template": ("sft", ["--chat_template_path", "IN/none.jinja"], "none.jinja is not a .jinja file"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_libraries_refuse(name, refuse):
    refuse(*OPTIONS[name])


def test_templates_are_judged_before_they_are_applied(refuse):
    def write_template(folder: Path) -> None:
        (folder / "bad.jinja").write_text("{% for message in")

    refuse("sft", ["--chat_template_path", "IN/bad.jinja"], "template", write_template)


def test_swanlab_that_raises_for_no_run(refuse, good, tmp_path):
    """As swanlab 0.10, whose `get_run` raises before `init`, where transformers expects None."""
    package = tmp_path / "packages" / "swanlab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "config, run = {}, None\n"
        "def has_run(): return run is not None\n"
        "def get_run():\n    if run is None: raise RuntimeError('No active Run')\n    return run\n"
        "def init(**options):\n    global run\n    run = options\n    print('swanlab began')\n"
        "def log(*_, **__): pass\n"
        "def finish(*_, **__): pass\n"
    )
    shutil.copytree(good, tmp_path / "in")
    config = tmp_path / "in" / "sft.yaml"
    config.write_text(config.read_text().replace("IN/", f"{tmp_path}/in/"))
    start = f"import sys; sys.path.insert(0, {str(package.parent)!r})\n"
    script = tmp_path / "sft.py"
    module = Path(__file__).parents[2] / "sft" / "sft.py"
    script.write_text(f"{start}import runpy\nrunpy.run_path({str(module)!r}, run_name='__main__')\n")
    words = ["--config", config, "--report_to", "swanlab", "--output_dir", tmp_path / "out"]
    outcome = run_command(str(script), *words)
    assert outcome.status == 0, outcome.stderr[-3000:]
    assert "swanlab began" in outcome.stdout


# --- checkpoints ---


def change_weights(key: str, value: float | None) -> Callable:
    def change(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        if value is None:
            del tensors[key]
        else:
            tensors[key].view(-1)[5] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def change_json(name: str, **changes: object) -> Callable:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return change


def write(name: str, content: str) -> Callable:
    return lambda folder: (folder / name).write_text(content)


UP = "model.layers.1.mlp.up_proj.weight"
CHECKPOINTS = {
    "missing tensor": (change_weights(UP, None), f"lacks {UP}"),
    "NaN": (change_weights(UP, float("nan")), f"NaN or infinite weights in {UP}"),
    "infinity": (change_weights(UP, float("inf")), f"NaN or infinite weights in {UP}"),
    "layer too many": (change_json("model/config.json", num_hidden_layers=2), "has a layer too many"),
    "layers missing": (change_json("model/config.json", num_hidden_layers=5), "lacks model.layers.3."),
    "a billion layers": (change_json("model/config.json", num_hidden_layers=10**9), "1,000,000,000"),
    "huge vocabulary": (change_json("model/config.json", vocab_size=10**10), "vocab_size is 10,000,000,000"),
    "truncated": (lambda folder: os.truncate(folder / "model/model.safetensors", 5000), "cannot read the weights"),
    "empty": (lambda folder: os.truncate(folder / "model/model.safetensors", 0), "cannot read the weights"),
    "no weights": (lambda folder: (folder / "model/model.safetensors").unlink(), "cannot read the weights"),
    "no number": (change_json("model/config.json", num_attention_heads="four"), "num_attention_heads"),
    "negative size": (change_json("model/config.json", hidden_size=-1), "IN/model"),
    "list": (write("model/config.json", "[1]"), "IN/model"),
    "not JSON": (write("model/config.json", "{"), "IN/model"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("recipe", SCRIPTS)
def test_damaged_checkpoints(recipe, name, refuse, tmp_path):
    change, message = CHECKPOINTS[name]
    words = CONTINUE if recipe == "pretrain" else []
    refuse(recipe, words, message.replace("IN/", f"{tmp_path}/in/"), change)


# --- files and folders ---

CONFIGS = {
    "folder": (lambda folder: (folder / "bad.yaml").mkdir(), "is a folder"),
    "large": (write("bad.yaml", "train_files:\n" + "- abcdefghijklmnopqrstuvwxyz\n" * 400_000), "bytes; a config has"),
    "list": (write("bad.yaml", "- a"), "must contain a YAML mapping"),
    "empty": (write("bad.yaml", ""), "must contain a YAML mapping"),
    "no YAML": (write("bad.yaml", "a: ["), "is not valid YAML"),
    "code": (write("bad.yaml", "!!python/object/apply:os.system ['touch x']"), "is not valid YAML"),
    "number of files": (write("bad.yaml", "train_files: 5"), "`train_files` in the config file is 5, must be a list"),
    "list of a folder": (write("bad.yaml", "output_dir: [a, b]"), "must be text"),
    "mapping of a rate": (write("bad.yaml", "learning_rate: {a: 1}"), "must be a number"),
    "no files": (write("bad.yaml", "train_files: []"), "`train_files` in the config file is an empty list"),
    "empty rate": (write("bad.yaml", "learning_rate:"), "`learning_rate` in the config file is empty"),
    "word for a flag": (write("bad.yaml", "packing: often"), "packing"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_cannot_be_used(name, refuse):
    change, message = CONFIGS[name]
    refuse("sft", ["--config", "IN/bad.yaml"], message, change)


OUTPUTS = {
    "a file": ("IN/chats.jsonl", "is a file; name a folder"),
    "below a file": ("IN/chats.jsonl/a/b", "chats.jsonl is a file; name a folder"),
    "empty": ("", "`output_dir` is empty"),
    "space": (" ", "`output_dir` is empty"),
    "long": (f"IN/{LONG}", "`output_dir` has a name of 300 characters"),
    "dangling link": ("IN/link", "link is a link to /nowhere/else, which does not exist; make that"),
    "below a dangling link": ("IN/link/a", "link is a link to /nowhere/else"),
    "link to a file": ("IN/link_to_file", "is a file; name a folder"),
    "link to a model": ("IN/link_to_model", "holds a finished model or tokenizer (config.json)"),
    "a device": ("/dev/null", "/dev/null is a file"),
    "a file system without folders": ("/proc/none/out", "/proc"),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("recipe", ["pretrain", "sft"])
def test_output_folders_that_cannot_be_written(recipe, name, refuse):
    path, message = OUTPUTS[name]

    def make_links(folder: Path) -> None:
        for link, target in {"link": "/nowhere/else", "link_to_file": "chats.jsonl", "link_to_model": "model"}.items():
            os.symlink(target, folder / link)

    refuse(recipe, ["--output_dir", path], message, make_links)


@pytest.mark.parametrize("key", ["train_data", "eval_data", "tokenizer", "model_config"])
@pytest.mark.parametrize("value", [f"IN/{LONG}", "IN/chats.jsonl", "..", "/dev/null"])
def test_inputs_that_are_no_such_thing(key, value, refuse):
    refuse("pretrain", [f"--{key}", value], "error")


# --- what a run resumes from ---


def make_run(folder: Path) -> Path:
    """Write the parts of a stopped run that are read before its model is loaded."""
    checkpoint = folder / "run" / "checkpoint-1"
    shutil.copytree(folder / "model", checkpoint)
    state = {"global_step": 1, "log_history": [{"step": 1, "loss": 2.0}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (folder / "run" / "run.json").write_text(json.dumps({"recipe": "pretrain", "data_history": [], "origin": {}}))
    return checkpoint


RUNS = {
    "state is a list": ("checkpoint-1/trainer_state.json", "[1]", "trainer_state.json"),
    "state is no JSON": ("checkpoint-1/trainer_state.json", "{", "trainer_state.json"),
    "state is of another": ("checkpoint-1/trainer_state.json", '{"nosuch": 1}', "trainer_state.json"),
    "step is text": ("checkpoint-1/trainer_state.json", '{"global_step": "x"}', "trainer_state.json"),
    "log is a number": ("checkpoint-1/trainer_state.json", '{"log_history": 5}', "trainer_state.json"),
    "row has no step": ("checkpoint-1/trainer_state.json", '{"log_history": [{"loss": 1}]}', "trainer_state.json"),
    "config is a list": ("checkpoint-1/config.json", "[1]", "config.json"),
    "card is a list": ("run.json", "[1]", "run.json"),
    "card is no JSON": ("run.json", "{", "run.json"),
    "card is null": ("run.json", "null", "run.json"),
    "history is text": ("run.json", '{"data_history": "x"}', "run.json"),
    "history lacks keys": ("run.json", '{"data_history": [{"a": 1}]}', "run.json"),
    "history is of numbers": ("run.json", '{"data_history": [1]}', "run.json"),
    "origin is text": ("run.json", '{"origin": "x"}', "run.json"),
}


@pytest.mark.parametrize("name", RUNS)
def test_broken_runs_are_not_resumed(name, refuse):
    file, content, message = RUNS[name]

    def change(folder: Path) -> None:
        checkpoint = make_run(folder)
        (folder / "run" / file).write_text(content)
        write_checksums(checkpoint)

    refuse("pretrain", [*CONTINUE, "--output_dir", "IN/run"], message, change)


def test_tokenizers_without_an_end(refuse):
    change = change_json("made/tokenizer_config.json", eos_token=None)
    refuse("pretrain", [], "has no eos_token: add it to its tokenizer_config.json", change)


@pytest.mark.parametrize("content", ["", "[1]", "5", '{"config.json": 1}', '{"config.json": {"bytes": 1}}'])
def test_broken_checksums_are_told(content, refuse):
    def change(folder: Path) -> None:
        (make_run(folder) / "checksums.json").write_text(content)

    words = [*CONTINUE, "--resume_from_checkpoint", "IN/run/checkpoint-1"]
    refuse("pretrain", words, "checksums.json is missing or incomplete", change)
