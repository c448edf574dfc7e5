"""Publishing: the right files reach both hubs through their own clients, and what fails is one line and repeatable."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from huggingface_hub import ModelCard
from loopback_hubs import TOKEN, HuggingFace, ModelScope, running
from test_export import make_checkpoint

from buddygpt.export import publish
from buddygpt.training.finished_folder import set_training_state_aside
from buddygpt.training.model_card import write_model_card

CARD = "---\nlicense: other\ntags: [buddygpt]\n---\n# tiny\n\n`AutoModel.from_pretrained('USER/NAME')`\n"
FILES = {
    "README.md": CARD.encode(),
    "config.json": b'{"model_type": "buddygpt"}',
    "model.safetensors": bytes(range(256)) * 400,
    "modeling_buddygpt.py": b"# code\n",
    "run.json": b"{}",
}
RUN_CARD = {
    "recipe": "sft",
    "base_model": "base",
    "parameters": 1000,
    "non_embedding_parameters": 500,
    "active_parameters": 1000,
    "steps": 12,
    "throughput": {},
    "device": "cpu",
    "arguments": {"train_files": ["data/chat.jsonl"]},
    "training_arguments": {"learning_rate": 0.004, "max_length": 64},
    "origin": {"global_batch": 4},
    "model_config": dict.fromkeys(("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"), 8)
    | {"model_type": "buddygpt", "architectures": ["BuddyGPTForCausalLM"]},
    "metrics": {},
}
CLIENTS = {"hf": HuggingFace, "modelscope": ModelScope}


def make_run(folder: Path) -> Path:
    """Write the folder of a finished run, with its training state aside."""
    state = {"checkpoint-2/optimizer.pt": b"state", "runs/x/events.out.tfevents.1": b"log"}
    for name, content in (FILES | state).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    set_training_state_aside(folder)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture(params=CLIENTS)
def hub(request, monkeypatch, tmp_path):
    """A hub that the clients in this process use, and do not wait for when it fails; its name is `hub.kind`."""
    with running(CLIENTS[request.param]) as hub:
        hub.kind = request.param
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        if request.param == "hf":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # hubs without it use Git LFS
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
            monkeypatch.setenv("HF_TOKEN", TOKEN)
        else:
            monkeypatch.setattr("modelscope_hub.config._default_config", None)  # reads the environment once
            monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.address)
            monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
            monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
        yield hub


def call(monkeypatch, *arguments: object) -> int:
    """Run the command and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["publish", *map(str, arguments)])
    try:
        publish.run_script(publish.main)
    except SystemExit as end:
        return end.code
    return 0


def error_of(capfd) -> str:
    """Return the one line of an error."""
    output = capfd.readouterr()
    (line,) = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output.err and TOKEN not in output.out + output.err
    return line


def test_the_files_of_a_finished_run_arrive_and_a_repeat_sends_no_large_file(run, hub, monkeypatch, capfd):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert call(monkeypatch, run, "--to", f"{hub.kind}:me/tiny", "--private", "--yes") == 0
    output = capfd.readouterr().out
    assert "5 files, 102." in output and "checkpoint-2 (training state)" in output and "runs (logs)" in output
    assert "published http://127.0.0.1" in output and output.rstrip().endswith("me/tiny")
    card = CARD.replace("USER/NAME", "me/tiny").encode()
    assert hub.files("me/tiny") == FILES | {"README.md": card} and hub.repositories["me/tiny"]["private"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before  # the clients left nothing

    hub.requests.clear()
    assert call(monkeypatch, run, "--to", f"{hub.kind}:me/tiny", "--private", "--yes") == 0
    assert "PUT a large file" not in hub.requests and hub.files("me/tiny")["README.md"] == card


def test_a_lost_connection_is_one_line_and_the_same_command_goes_on(run, hub, monkeypatch, capfd):
    hub.breaks = 10**6
    assert call(monkeypatch, run, "--to", f"{hub.kind}:me/tiny", "--yes") == 2
    assert error_of(capfd).endswith("Run the same command again; what has arrived is not sent twice")
    hub.breaks = 1  # the client tries again by itself
    assert call(monkeypatch, run, "--to", f"{hub.kind}:me/tiny", "--yes") == 0
    assert hub.files("me/tiny").keys() == FILES.keys()


def test_refusals_are_one_line(run, hub, monkeypatch, capfd):
    hub.quota = "Storage quota exceeded for me"
    assert call(monkeypatch, run, "--to", f"{hub.kind}:me/tiny", "--yes") == 2
    error = error_of(capfd)
    assert f"error: {hub.kind}:me/tiny: " in error
    assert error.endswith("Storage quota exceeded for me. Free some space there, then run the same command again")
    hub.quota = None

    assert call(monkeypatch, run, "--to", f"{hub.kind}:me/tiny", "--private", "--yes") == 2
    assert "exists and is public: make it private on its page, or leave out --private" in error_of(capfd)

    monkeypatch.setenv("HF_TOKEN", "wrong")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "wrong")
    monkeypatch.setattr("modelscope_hub.config._default_config", None)
    assert call(monkeypatch, run, "--to", f"{hub.kind}:me/other", "--yes") == 2
    assert error_of(capfd).endswith(("hf auth login", "modelscope login --token TOKEN"))
    assert "me/other" not in hub.repositories


def test_a_hub_that_is_away_is_one_line(run, hub, monkeypatch, capfd):
    hub.server_close()
    assert call(monkeypatch, run, "--to", f"{hub.kind}:me/tiny", "--yes") == 2
    assert error_of(capfd).endswith("Run the same command again; what has arrived is not sent twice")


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLIENTS)
def test_the_plain_client_sends_the_same_files(kind, run, tmp_path):
    with running(CLIENTS[kind]) as hub:
        environment = os.environ | {
            **{"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")},
            **{
                "MODELSCOPE_DOMAIN": hub.address,
                "MODELSCOPE_API_TOKEN": TOKEN,
                "MODELSCOPE_HOME": str(tmp_path / "ms"),
            },
        }
        publishing = [sys.executable, "export/publish.py", str(run), "--to", f"{kind}:me/ours", "--yes"]
        plain = [str(Path(sys.executable).with_name(kind)), "upload", "me/plain", str(run)]
        for command in (publishing, plain):
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
        ours, plain = hub.files("me/ours"), hub.files("me/plain")
    assert ours.pop("README.md") == CARD.replace("USER/NAME", "me/ours").encode()
    assert plain.pop("README.md") == CARD.encode() and ours == plain
    weights = FILES["model.safetensors"]
    assert plain.pop("model.safetensors") in (weights, hashlib.sha256(weights).hexdigest().encode())
    assert plain.items() <= FILES.items() and len(plain) == len(FILES) - 2


def test_nothing_is_sent_without_consent(run, monkeypatch, capsys):
    monkeypatch.setattr(publish, "send", lambda *arguments: pytest.fail("sent"))
    assert call(monkeypatch, run, "--to", "hf:me/tiny", "--to", "modelscope:you/tiny", "--dry_run") == 0
    output = capsys.readouterr().out
    assert "hf:me/tiny and modelscope:you/tiny, public if new: 5 files" in output and "nothing was sent" in output
    for answer, status in (("n", 0), ("", 0), (None, 2)):
        monkeypatch.setattr("builtins.input", lambda prompt, answer=answer: answer if answer is not None else end())
        assert call(monkeypatch, run, "--to", "hf:me/tiny") == status
    assert "nobody is there to confirm; add --yes" in capsys.readouterr().err


def end() -> None:
    raise EOFError


def test_adapters_name_a_base_that_others_find(run, tmp_path, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(publish, "send", lambda target, folder, private: sent.append(read(folder)) or "")
    adapter = run / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    write_model_card(adapter, RUN_CARD)

    assert call(monkeypatch, adapter, "--to", "hf:me/lora", "--yes") == 2
    assert f"is an adapter of {tmp_path / 'base'}, a folder that others do not have" in capsys.readouterr().err
    assert call(monkeypatch, run, "--to", "hf:me/tiny", "--yes") == 0  # the merged model needs no base
    assert sent.pop().keys() == FILES.keys() and "adapter (its base model is a folder here" in capsys.readouterr().out
    assert call(monkeypatch, adapter, "--to", "hf:me/lora", "--base", "me/base", "--yes") == 0
    files = sent.pop()
    card = ModelCard(files["README.md"].decode())
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == card.data.base_model == "me/base"
    assert 'base = AutoModelForCausalLM.from_pretrained("me/base", trust_remote_code=True)' in card.text
    assert "`me/base` is the model that this adapter was trained on. " in card.text
    assert "`me/base` 是训练此适配器所用的基座。" in card.text and "adapter_config" not in card.text
    assert json.loads((adapter / "adapter_config.json").read_text()) == settings


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--to", "me/tiny"], "--to me/tiny: write hf:USER/NAME or modelscope:USER/NAME"),
        (["{run}", "--to", "hf:tiny"], "--to hf:tiny: write hf:USER/NAME or modelscope:USER/NAME"),
        (["{run}"], "required: --to"),
        (["{run}/none", "--to", "hf:me/tiny"], "no such checkpoint folder: "),
        (["{run}/checkpoint-2", "--to", "hf:me/tiny"], "checkpoint-2 is not a checkpoint: it has no config.json"),
        (["{run}", "--to", "hf:me/tiny", "--base", "base"], "--base base: give the name under which others find"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message, monkeypatch, capfd):
    assert call(monkeypatch, *(each.format(run=run) for each in arguments)) == 2
    assert message in error_of(capfd)


LOAD = """
import json, sys
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
chat = [{"role": "user", "content": "the capital of France?"}]

def answer(model):
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)

tokenizer = AutoTokenizer.from_pretrained("me/tiny", trust_remote_code=True)  # else it asks whether to run the code
model = AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True, device_map="cpu")
answers = [type(model).__name__, answer(model)]
stock = pipeline("text-generation", "me/tiny-native", device_map="cpu")
answers += [type(stock.model).__name__, answer(stock.model)]
answers += [stock(chat, do_sample=False, max_new_tokens=8)[0]["generated_text"][-1]["content"]]
import modelscope
folder = snapshot_download("me/tiny")
answers += [answer(modelscope.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))]
assert not any(name.startswith("buddygpt") for name in sys.modules), "the package was imported"
print("answers", json.dumps(answers))
"""


@pytest.mark.slow
def test_a_clean_process_loads_what_was_published(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", False, True)
    (checkpoint / "README.md").write_text(CARD)
    with running(HuggingFace) as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert call(monkeypatch, checkpoint, "--to", "hf:me/tiny", "--native", "--gguf", "--yes") == 0
        card = ModelCard(hub.files("me/tiny-GGUF")["README.md"].decode()).data
        assert (card.base_model, card.license) == ("me/tiny", "other") and "model-f16.gguf" in hub.files(
            "me/tiny-GGUF"
        )

        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
        environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", LOAD], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
        )
    assert done.returncode == 0 and "Do you wish" not in done.stdout, done.stderr[-3000:]
    own, *answers = json.loads(done.stdout.split("answers ")[1])
    assert own == "BuddyGPTForCausalLM" and answers.pop(1) == "Qwen3ForCausalLM" and len(set(answers)) == 1
