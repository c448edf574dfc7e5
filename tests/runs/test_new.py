"""runs/new.py: a recipe that the dry run accepts, and one line for every request that cannot be met."""

import contextlib
import io
import json
import random
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run

from buddygpt.cli.errors import UserError
from buddygpt.planning import budget, hardware, probe, rules


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Half a megabyte of Chinese and English text of no sense, and two bytes that are too little."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(1)
    rows = ["".join(chr(draw.randint(0x4E00, 0x4FFF)) for _ in range(200)) for _ in range(500)]
    (folder / "zh.jsonl").write_text("".join(json.dumps({"content": row}) + "\n" for row in rows))
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[:5]))  # another column
    (folder / "en.txt").write_text("a word and another\n" * 20_000)
    (folder.parent / "little.txt").write_text("little\n" * 1500)
    return folder


def new(*words) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run("runs/new.py", *words)
    return output.getvalue()


@pytest.fixture(scope="module")
def made(text, tmp_path_factory, workspace) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "mine"
    rows = workspace / "sample" / "sft_eval.jsonl"
    new(
        folder,
        "--cores",
        2,
        "--hours",
        0.1,
        "--gflops",
        70,
        "--text",
        text,
        "--chat",
        rows,
        "--languages",
        "zh=3,en=1",
    )
    return folder


def read(folder: Path, name: str) -> dict:
    return yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_recipe_is_what_was_asked_for(made, text, capsys):
    data, pretrain, settings = (read(made, name) for name in ("data", "pretrain", "recipe"))
    assert {Path(name).name for name in read(made, "tokenizer")["files"]} == {"zh.jsonl", "en.txt", "more.jsonl"}
    assert data["languages"] == {"zh": 3.0, "en": 1.0}
    assert {"text", "content"} <= set(data["text_key"]) and data["text_key"] == read(made, "tokenizer")["text_column"]
    assert {source["language"]: [Path(name).name for name in source["path"]] for source in data["sources"]} == {
        "zh": ["more.jsonl", "zh.jsonl"],
        "en": ["en.txt"],
    }
    assert data["eval_fraction"] == 0.05  # of little text
    assert settings["threads"] == 2 and pretrain["use_cpu"] and pretrain["optimizer"] == "muon"
    assert isinstance(pretrain["learning_rate"], float)
    assert (made / "sample.yaml").exists() and not (made / "anneal.yaml").exists()  # no pairs were given
    readme = (made / "README.md").read_text(encoding="utf-8")
    assert "bits per byte" in readme and "## 中文" in readme and "tokens per parameter" in readme
    assert "2 核 CPU，约 " in readme and f"rate {pretrain['optim_args'].removeprefix('adamw_lr=')}" in readme

    run("runs/dry_run.py", made)
    assert "Every stage can run" in capsys.readouterr().out


@pytest.mark.slow
def test_public_sets_are_used_by_name_and_a_second_stage_anneals(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(budget, "choose_micro_batch", lambda run, machine: (32, 4, False, 10**10))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**12})())
    new(tmp_path / "gpu", "--gpu", "3090", "--gpus", 2, "--hours", 24, "--params", "64M", "--price_per_hour", 1.3)
    pretrain, anneal, hardware_file = (read(tmp_path / "gpu", name) for name in ("pretrain", "anneal", "accelerate"))
    assert read(tmp_path / "gpu", "data")["sources"][0]["reader"] == "ultra-fineweb"
    assert hardware_file["num_processes"] == 2 and pretrain["bf16"]
    assert anneal["model_name_or_path"].endswith(f"/pretrain/checkpoint-{pretrain['max_steps']}")
    assert anneal["lr_scheduler_type"] == "warmup_stable_decay" and "model_config" not in anneal
    assert (anneal["warmup_steps"], anneal["lr_scheduler_kwargs"]["num_decay_steps"]) == (0, anneal["max_steps"])
    assert "62.40 (2 x 24 h x 1.3)" in (tmp_path / "gpu" / "README.md").read_text(encoding="utf-8")
    model = json.loads((tmp_path / "gpu" / "model.json").read_text())
    assert model["hidden_size"] % model["num_attention_heads"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine", "--hours", "0"], "--hours 0: must be more than 0"),
        (["mine", "--hours", "nan"], "--hours nan: must be more than 0"),
        (["mine", "--hours", "0.01", "--gflops", "70"], r"too short: .* Give --hours"),
        (["mine"], "required: --hours"),
        (["mine", "--hours", "1", "--gpu", "3091"], "not known; did you mean RTX 3090"),
        (["mine", "--hours", "1", "--gpu", "voodoo"], "not known; give one of cpu"),
        (["mine", "--hours", "1", "--text", "{text}/../little.txt"], r"has 10 kB: .* at least 200 kB"),
        (["mine", "--hours", "1", "--text", "nowhere"], "no file matches `nowhere`"),
        (["mine", "--hours", "1", "--text", "{text}", "--vocab_size", "32768"], "is more than .* of text support"),
        (["mine", "--hours", "1", "--text", "{text}", "--text_column", "body"], "has no column body, but text"),
        (["mine", "--hours", "1", "--params", "huge"], "--params huge: give a size"),
        (["mine", "--hours", "1", "--languages", "zh:3"], "write it as zh=3,en=1"),
        (["{text}", "--hours", "1"], "exists: give another name"),
        (["a b", "--hours", "1"], "use letters, digits"),
        (["mine", "--hours", "1", "--gflops", "0"], "--gflops 0: must be more than 0"),
        (["mine", "--hours", "1", "--gpu", "cpu", "--memory", "12"], "give a size such as 12GB"),
    ],
)
def test_mistakes_are_one_line(words, message, text):
    with pytest.raises(UserError, match=message) as error:
        new(*[word.format(text=text) for word in words])
    assert "\n" not in str(error.value)
    assert not (ROOT / "outputs" / "mine").exists()


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_would(tmp_path, text, monkeypatch):
    words = ["--gpu", "cpu", "--gflops", 70, "--memory", "2.1GiB", "--hours", 3, "--params", "20M", "--text", text]
    with pytest.raises(UserError, match=r"a model of .*M parameters needs .* GiB.* --params [\d.]+M would fit"):
        new(tmp_path / "large", *words)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6})())
    monkeypatch.setattr(budget, "choose_micro_batch", lambda run, machine: (4, 1, False, 10**8))
    with pytest.raises(UserError, match=r"the run writes about .* GB, .* free"):
        new(tmp_path / "disk", "--gflops", 70, "--hours", 1, "--text", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_speed_of_this_machine_is_measured(monkeypatch):
    monkeypatch.setattr(probe, "LEAST_SECONDS", 0)
    shape = rules.Shape(512, 64, 4)
    speed = probe.measure_speed(rules.plan_shape(shape, 1e12, 1e10), cores=1)
    assert 1e8 < speed.flops < 1e13 and "measured on this machine" in speed.source


def test_too_little_text_is_a_warning():
    machine = hardware.find_machine("cpu", "16GB", 1, cores=8)
    request = budget.Budget(machine, hours=10, text_bytes=1e6)
    run_ = budget.choose_run(request, hardware.expected_speed(machine), 30_000)
    (warning,) = budget._warnings(request, run_, epochs=20, prepare=1)
    assert "read 20 times" in warning and "add text up to" in warning
