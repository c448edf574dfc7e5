"""A run gets the hardware that its config requests, or stops with one line.

What needs a GPU is shown with torch's answers replaced; what runs on two processes runs on two processes.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, history, pretrain_arguments, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.integrations.deepspeed import set_hf_deepspeed_config

from buddygpt.cli.errors import UserError
from buddygpt.model import BuddyGPTForCausalLM
from buddygpt.model.presets import load_config
from buddygpt.training.callbacks.throughput import find_flops
from buddygpt.training.flops import flops_per_token
from buddygpt.training.hardware import require_hardware, require_strategy

BIN = Path(sys.executable).parent
CONFIGS = ROOT / "accelerate_configs"
CLAIM = (  # without the package, whose imports take ten seconds
    f"import importlib.util as u; s = u.spec_from_file_location('e', {str(ROOT / 'training/extensions.py')!r}); "
    "e = u.module_from_spec(s); s.loader.exec_module(e); e.claim_extensions(); "
)


def launch(command: list[object], timeout: int = 600, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
    command = [*map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout)


def config_with(tmp_path: Path, name: str, **changes: object) -> Path:
    config = yaml.safe_load((CONFIGS / name).read_text()) | changes
    (tmp_path / name).write_text(yaml.safe_dump(config))
    return tmp_path / name


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in history(folder) if "loss" in row]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_hardware_config(config):
    loaded = load_config_from_file(str(config))  # raises on unknown keys
    several = {"zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"} | dict.fromkeys(
        ("cpu", "mps", "single_gpu"), "NO"
    )
    assert loaded.distributed_type == several.get(config.stem, "MULTI_GPU")
    assert (loaded.num_processes > 1) == (loaded.distributed_type != "NO")
    assert all("#" in line for line in config.read_text().splitlines())


@pytest.mark.slow
def test_two_machines_under_slurm_train_as_one_process(workspace, tmp_path):
    """DDP over gloo through runs/slurm.sh; shell scripts replace Slurm's commands, and this machine acts as two."""
    fakes = {
        "scontrol": "echo localhost",
        "srun": 'for node in 1 0; do SLURM_NODEID=$node "${@:2}" & tasks+=($!); done; wait ${tasks[0]} && wait $!',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("", 0))
        job = free.getsockname()[1] - 20000
    arguments = [*pretrain_arguments(workspace), "--max_steps", 4, "--logging_steps", 1, "--save_steps", 4]
    arguments += ["--model_config", "debug-mla-moe", "--eval_strategy", "no", "--eval_data", "null"]
    ddp = [*arguments, "--per_device_train_batch_size", 2, "--output_dir", workspace / "ddp"]
    slurm = {"JOB_ID": job, "JOB_NODELIST": "localhost", "JOB_NUM_NODES": 2, "GPUS_ON_NODE": 1, "SUBMIT_DIR": ROOT}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"}
    environment |= {"ACCELERATE_CONFIG": str(CONFIGS / "cpu_ddp.yaml")}
    result = launch(["bash", "runs/slurm.sh", "pretrain/pretrain.py", *ddp], **environment)
    assert result.returncode == 0, result.stderr
    run("pretrain/pretrain.py", *arguments, "--output_dir", workspace / "single")

    hardware = json.loads((workspace / "ddp" / "run.json").read_text())["hardware"]
    assert (hardware["processes"], hardware["machines"], hardware["global_batch_tokens"]) == (2, 2, 4 * 64)
    assert hardware["distributed_type"] == "MULTI_CPU (DistributedDataParallel)"
    assert losses(workspace / "ddp") == pytest.approx(losses(workspace / "single"), abs=2e-3)
    loads = [
        [row["router/load_max"] for row in history(workspace / name) if "loss" in row] for name in ("ddp", "single")
    ]
    assert loads[0] == pytest.approx(loads[1], abs=0.1)
    weights = [load_file(workspace / name / "model.safetensors") for name in ("ddp", "single")]
    (bias,) = (name for name in weights[0] if name.endswith("e_score_correction_bias"))
    assert (weights[0][bias] == weights[1][bias]).float().mean() > 0.7  # a rounded score may move one token


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed builds its CPU communication with g++")
def test_zero2_on_two_processes_trains_as_one(workspace, tmp_path):
    """The config of real runs, on two CPU processes."""
    config = config_with(tmp_path, "zero2.yaml", num_processes=2, use_cpu=True)
    command = ["accelerate", "launch", "--config_file", config, "pretrain/pretrain.py"]
    arguments = [*pretrain_arguments(workspace), "--max_steps", 3, "--logging_steps", 1, "--save_steps", 3]
    arguments += ["--eval_strategy", "no", "--eval_data", "null"]
    arguments += ["--max_grad_norm", 0.5]  # DeepSpeed must take it from the recipe
    zero2 = ["--per_device_train_batch_size", 2, "--bf16", "true", "--output_dir", workspace / "zero2"]
    result = launch([*command, *arguments, *zero2], timeout=900)
    assert result.returncode == 0, result.stderr
    run("pretrain/pretrain.py", *arguments, "--output_dir", workspace / "one")
    hardware = json.loads((workspace / "zero2" / "run.json").read_text())["hardware"]
    assert hardware["distributed_type"] == "DEEPSPEED ZeRO-2 (DeepSpeedEngine)" and hardware["processes"] == 2
    assert (hardware["mixed_precision"], hardware["parameters"]) == ("bf16", "bfloat16")
    assert list((workspace / "zero2/checkpoint-3").glob("global_step3/*optim_states.pt"))
    assert losses(workspace / "zero2") == pytest.approx(losses(workspace / "one"), abs=0.03)  # bf16 against float32
    assert type(AutoModelForCausalLM.from_pretrained(workspace / "zero2")) is BuddyGPTForCausalLM


def test_models_without_weights_are_made_under_zero3():
    """The run card and the throughput need them; transformers would divide them among the processes, and fail."""
    expected = flops_per_token(load_config("debug"), 64)
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    plugin = SimpleNamespace(set_deepspeed_weakref=lambda: set_hf_deepspeed_config(config))
    try:
        trainer = SimpleNamespace(model=torch.nn.Module(), args=SimpleNamespace(deepspeed_plugin=plugin))
        trainer.model.config = load_config("debug")
        assert find_flops(trainer)(64) == expected
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()


def silent_fallbacks(tmp_path: Path) -> dict[str, tuple[list[object], dict[str, str], str]]:
    """Return launches that accelerate silently changes: command, environment, part of our error."""
    multi_cpu = config_with(tmp_path, "cpu_ddp.yaml", distributed_type="MULTI_CPU")
    fsdp = config_with(tmp_path, "fsdp2.yaml", num_processes=2, mixed_precision="no")
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    script, torchrun = "pretrain/pretrain.py", ["torchrun", "--nproc_per_node", 2]
    accelerate = ["accelerate", "launch", "--config_file"]
    no_gpu, cpu = {"CUDA_VISIBLE_DEVICES": ""}, ["--use_cpu", "true"]
    zero2 = ["--use_cpu", "false", "--deepspeed", tmp_path / "zero2.json"]
    return {
        "one of two": ([*accelerate, multi_cpu, script, *cpu], {}, "several processes were requested"),
        "two alone": ([*accelerate, fsdp, script, "--use_cpu", "false"], no_gpu, "2 processes were requested"),
        "fsdp": ([*accelerate, fsdp, script, *cpu], no_gpu, "FSDP was requested, but this is MULTI_CPU"),
        "zero2": (
            [*torchrun, script, *zero2],
            {**no_gpu, "ACCELERATE_USE_CPU": "true"},
            "DEEPSPEED was requested, but this is MULTI_CPU",
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one of two", "two alone", "fsdp", "zero2"])
def test_silent_fallbacks_of_accelerate_stop_the_run(case, workspace, tmp_path):
    command, environment, message = silent_fallbacks(tmp_path)[case]
    result = launch([*command, *pretrain_arguments(workspace), "--output_dir", tmp_path / "run"], **environment)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))  # only one process prints it
    assert message in line and result.returncode != 0
    assert not list((tmp_path / "run").glob("*"))


def arguments_on(monkeypatch, device: str, **changes: object) -> SimpleNamespace:
    """Return what `require_hardware` reads from the arguments, as on a machine with GPUs: the tests have none."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    arguments = {"world_size": 1, "n_gpu": int(device == "cuda"), "use_cpu": False, "device": torch.device(device)}
    arguments |= {"bf16": False, "fp16": False, "mixed_precision": "no"}
    return SimpleNamespace(**arguments | changes)


def test_bf16_on_a_gpu_that_only_emulates_it(monkeypatch):
    bf16 = arguments_on(monkeypatch, "cuda", bf16=True, mixed_precision="bf16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    for major, supported in ((7, False), (8, True)):  # T4 and V100; A100. torch decides
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, major=major: SimpleNamespace(major=major))
        if supported:
            require_hardware(bf16)
        else:
            with pytest.raises(UserError, match="Tesla T4 has no bf16 hardware. Set `fp16: true`"):
                require_hardware(bf16)
    require_hardware(arguments_on(monkeypatch, "cuda", fp16=True, mixed_precision="fp16"))


def test_fewer_gpus_than_processes(monkeypatch):
    arguments = arguments_on(monkeypatch, "cuda", world_size=8)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match="8 processes were requested on 4 GPUs: .*--num_processes 4"):
        require_hardware(arguments)


def test_one_process_that_sees_several_gpus(monkeypatch, capsys):
    arguments = arguments_on(monkeypatch, "cuda", n_gpu=4)
    require_hardware(arguments)
    assert "warning: plain python uses all 4 GPUs" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(UserError, match="one GPU was requested, but 4 are visible. To use one: --gpu_ids 0"):
        require_hardware(arguments)


def test_a_gpu_requested_but_not_found(monkeypatch):
    arguments = arguments_on(monkeypatch, "cpu")
    require_hardware(arguments)  # plain python requests no device
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    with pytest.raises(UserError, match="a GPU was requested .* but torch finds none"):
        require_hardware(arguments)
    arguments.use_cpu = True
    require_hardware(arguments)


def test_accelerate_and_the_recipe_request_different_precision(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="requests mixed_precision: bf16, the recipe no: make them agree"):
        require_hardware(TrainingArguments(str(tmp_path), use_cpu=True, bf16=False))
    require_hardware(TrainingArguments(str(tmp_path), use_cpu=True, bf16=True))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_that_is_not_installed(implementation, workspace, monkeypatch):
    monkeypatch.setattr("buddygpt.training.hardware.is_kernels_available", lambda: False)
    arguments = [*pretrain_arguments(workspace), "--attn_implementation", implementation]
    with pytest.raises(UserError, match=f"{implementation} needs an NVIDIA GPU and its package .* or use sdpa"):
        run("pretrain/pretrain.py", *arguments, "--output_dir", workspace / "flash")


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel was requested, but has no effect on a `buddygpt`"),
        ({"mixed_precision": "fp8"}, "mixed precision fp8 was requested, but this is fp16"),
        ({"fsdp": True}, "FSDP was requested, but this is NO"),
    ],
)
def test_requests_that_the_trainer_does_not_fulfil(requested, message):
    """A fake trainer, because these need GPUs or packages for them."""
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"), mixed_precision="fp16")
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type="buddygpt")
    args = {"deepspeed": None, "fsdp": None, "mixed_precision": "fp16", "use_liger_kernel": False} | requested
    trainer = SimpleNamespace(args=SimpleNamespace(**args), accelerator=accelerator, model=model)
    with pytest.raises(UserError, match=message):
        require_strategy(trainer)
    if args["use_liger_kernel"]:
        model.rotate = type(
            "Rope", (), {"__module__": "liger_kernel.ops", "__call__": lambda self: None}
        )()  # as Liger does
        require_strategy(trainer)


@pytest.mark.slow
def test_slurm_requeues_the_job_at_the_time_limit(tmp_path):
    fakes = {
        "scontrol": '[ "$1" != requeue ] && echo host0 || echo "$@" > requeued',
        "srun": "kill -USR1 $PPID; sleep 1",
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "a", "JOB_NUM_NODES": "1", "GPUS_ON_NODE": "8", "SUBMIT_DIR": tmp_path}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    launch(["bash", "runs/slurm.sh", "a.py"], PATH=f"{tmp_path}:{os.environ['PATH']}", **environment)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert launch(["bash", "runs/slurm.sh", "a.py"], SLURM_JOB_NODELIST="").returncode == 2


def test_the_lock_of_a_running_build_is_kept(tmp_path):
    """Lock files are stale only if no other run is starting."""
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    compiles = "import os, pathlib; f = pathlib.Path(os.environ['TORCH_EXTENSIONS_DIR'], 'op'); f.mkdir(); "
    compiles += (
        "(f / 'lock').touch(); print('compiling', flush=True); input(); e.release_extensions(); print(); input()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", CLAIM + compiles],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    first.stdout.readline()
    lock = next(tmp_path.glob("buddygpt/torch_extensions/*/op/lock"))
    launch([sys.executable, "-c", CLAIM], **environment).check_returncode()
    assert lock.exists()
    first.stdin.write("\n")  # it has compiled everything and trains now
    first.stdin.flush()
    first.stdout.readline()
    result = launch([sys.executable, "-c", CLAIM], **environment)
    assert not lock.exists() and "op/lock, left by a killed build" in result.stderr
    first.kill()
    first.wait()
