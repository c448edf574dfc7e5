"""The planner's memory against hand counts and measured steps, its answers, and quick runs of the benchmarks."""

import contextlib
import gc
import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3Config

from buddygpt.cli.errors import UserError
from buddygpt.model import BuddyGPTConfig
from buddygpt.planning import hardware
from buddygpt.planning.hardware import Machine, expected_speed, measured_mfu
from buddygpt.planning.step_memory import FakeModel, MemoryCounter, Setup, StepMemory
from buddygpt.training.optimizers import muon_adamw

ab = importlib.import_module("ab")

# 100 x 8 embedding; q and o 8 x 8, k and v 8 x 4; three 8 x 16 of SwiGLU; three norms of 8
TINY = BuddyGPTConfig(
    vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
EMBEDDING, MATRICES, NORMS = 800, 64 + 32 + 32 + 64 + 3 * 128, 24
ALL = EMBEDDING + MATRICES + NORMS

COMMON = dict(vocab_size=2000, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4)
LATENT = dict(kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32)
EXPERTS = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, n_shared_experts=1)
SHAPES = {
    "dense": BuddyGPTConfig(**COMMON, num_key_value_heads=2, use_qk_norm=True),
    "untied": BuddyGPTConfig(**COMMON, num_key_value_heads=2, tie_word_embeddings=False),
    "latent": BuddyGPTConfig(**COMMON, **LATENT),
    "mixture": BuddyGPTConfig(**COMMON, **EXPERTS, num_key_value_heads=2, first_k_dense_replace=1),
    "soft": BuddyGPTConfig(**COMMON, n_soft_experts=4, moe_intermediate_size=64),
    "qwen3": Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
}
FP32 = Setup("fp32", block_size=128, device="cpu")


def predict(config, setup: Setup) -> StepMemory:
    return StepMemory(FakeModel(config, setup), setup)


def states(**setup) -> dict[str, int]:
    """Parts that are there during the optimizer step."""
    return predict(TINY, Setup(block_size=16, **setup)).phases(1)["optimizer step"]


def measure_peak(config, setup: Setup, rows: int, fake: bool = True) -> int:
    """Bytes at the fullest moment of the second training step of a plain loop, when the optimizer has its states."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        dtype = torch.bfloat16 if setup.precision == "bf16_params" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if setup.checkpointing:
            model.activation_checkpointing_enable()
        if setup.optimizer == "muon":
            optimizer = muon_adamw(model, weight_decay=0.1, lr=1e-3, fused=True)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        tokens = torch.zeros(rows, setup.block_size, dtype=torch.long)
        with MemoryCounter() as counter:
            counter.track("model", *model.parameters(), *model.buffers())
            for _ in range(2):
                counter.start_moment()
                for _ in range(setup.accumulation):
                    with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "fp32_master"):
                        loss = model(
                            input_ids=tokens, labels=tokens, use_cache=False, num_items_in_batch=tokens.numel()
                        ).loss
                    loss.backward()
                    del loss
                optimizer.step()
                optimizer.zero_grad()
        return sum(counter.peak.values())


@pytest.mark.slow
def test_states_are_what_a_hand_counts():
    expected = {"weights": 4 * ALL, "optimizer states": 8 * ALL, "gradients": 4 * ALL}
    assert states().items() >= expected.items()
    expected = {"weights": 2 * ALL, "optimizer states": 4 * ALL, "gradients": 2 * ALL}
    assert states(precision="bf16_params").items() >= expected.items()
    assert states(optimizer="muon")["optimizer states"] == 4 * MATRICES + 8 * (EMBEDDING + NORMS)


def test_8_bit_states_are_for_large_tensors_only():
    config = BuddyGPTConfig(**COMMON, num_key_value_heads=2)
    found = predict(config, Setup(optimizer="adamw_8bit", block_size=16))
    matrices = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352)  # all of more than 4,096 elements
    rest = 2000 * 128 + 5 * 128
    assert found.states["optimizer states"] == 2 * matrices + 8 * matrices // 256 + 8 * rest


@pytest.mark.slow
def test_zero_divides_states_among_gpus():
    zero2, zero3 = (states(gpus=4, zero_stage=stage) for stage in (2, 3))
    assert (zero2["weights"], zero2["gradients"]) == (2 * ALL, 2 * ALL // 4)
    assert (zero2["fp32 weights"], zero2["optimizer states"]) == (4 * ALL // 4, 8 * ALL // 4)
    assert zero3["weights"] == 2 * ALL // 4


@pytest.mark.slow
def test_checkpointing_keeps_the_layers_inputs():
    config = BuddyGPTConfig(**COMMON | {"num_hidden_layers": 4}, num_key_value_heads=2)
    plain, checkpointed = (predict(config, replace(FP32, checkpointing=each)).phases(8) for each in (False, True))
    inputs = 4 * 8 * 128 * 128 * 4  # layers x rows x tokens x width x bytes
    kept = checkpointed["forward and loss"]["activations"]
    assert inputs <= kept < 2 * inputs
    assert plain["forward and loss"]["activations"] > 5 * inputs


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_peak_is_within_10_percent_of_real_tensors(shape):
    for rows, checkpointing, accumulation in ((1, False, 1), (8, False, 2), (8, True, 1)):
        setup = replace(FP32, checkpointing=checkpointing, accumulation=accumulation)
        measured = measure_peak(SHAPES[shape], setup, rows, fake=False)
        # The rules for fake tensors return some tensors that the kernels do not allocate.
        assert predict(SHAPES[shape], setup).peak(rows) == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["dense", "latent", "mixture"])
@pytest.mark.parametrize(("precision", "optimizer"), [("fp32_master", "adamw"), ("bf16_params", "muon")])
def test_peak_is_that_of_a_whole_step_in_bf16(shape, precision, optimizer):
    for checkpointing in (False, True):
        setup = replace(FP32, precision=precision, optimizer=optimizer, checkpointing=checkpointing)
        measured = measure_peak(SHAPES[shape], setup, rows=8)
        assert predict(SHAPES[shape], setup).peak(8) == pytest.approx(measured, rel=0.02)


@pytest.mark.slow
def test_nothing_real_is_allocated():
    config = BuddyGPTConfig(**COMMON | {"vocab_size": 10_000_000, "hidden_size": 4096, "intermediate_size": 65_536})
    assert predict(config, Setup()).peak(64) > 100e9


@pytest.mark.slow
def test_the_loss_head_of_stock_code_makes_all_logits():
    sizes = COMMON | {"vocab_size": 20_000, "num_key_value_heads": 2}
    ours = predict(BuddyGPTConfig(**sizes), FP32).phases(4)["forward and loss"]["loss head"]
    stock = predict(Qwen3Config(**sizes, head_dim=32), FP32).phases(4)["forward and loss"]["loss head"]
    assert stock >= 2 * 4 * 4 * 128 * 20_000  # logits and their log-softmax in float32
    assert stock > 1.5 * ours


@pytest.fixture
def one_thread():
    """Some kernels take memory of their own for each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_measure_agrees_with_the_profiler(one_thread):
    model = AutoModelForCausalLM.from_config(SHAPES["dense"]).train()
    ids = torch.zeros(4, 128, dtype=torch.long)

    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    step()
    model.zero_grad()
    with MemoryCounter() as counter:
        counter.track("model", *model.parameters(), *model.buffers())
        before = sum(counter.live.values())
        step()
    model.zero_grad()
    gc.collect()  # what others left behind would be counted as freed here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert sum(counter.peak.values()) - before == pytest.approx(peak, rel=0.05)  # kernels have memory of their own


@pytest.mark.slow
def test_more_takes_more_and_the_largest_batch_is_the_largest():
    found = predict(SHAPES["dense"], FP32)
    peaks = [found.peak(rows) for rows in (1, 2, 4, 8, 16, 64)]
    assert peaks == sorted(peaks)
    assert predict(SHAPES["dense"], replace(FP32, block_size=512)).peak(4) > found.peak(4)
    assert predict(SHAPES["dense"], replace(FP32, checkpointing=True)).peak(64) < found.peak(64)
    for rows in (1, 16, 64):
        largest = predict(SHAPES["dense"], FP32).largest_micro_batch(200 * 2**20, rows)
        assert found.peak(largest) <= 200 * 2**20 < found.peak(largest + 1)
        assert found.largest_micro_batch(2**20, rows) == 0


RECIPE = ["--config", "pretrain/configs/buddygpt-0.1b.yaml"]


@pytest.mark.slow
def test_a_recipe_that_fits(capsys):
    run("tools/plan.py", *RECIPE, "--gpu", "3090", "--hours", 24, "--price_per_hour", 0.5, "--mfu", 0.4)
    output = capsys.readouterr().out
    assert "**Yes**" in output and "159.0M" in output and "as given (--mfu)" in output
    assert "| cost | 12.00" in output
    tokens_per_second = 0.4 * 71.2e12 / (6 * (42.5e6 + 116.5e6) + 6 * 8 * 16 * 2 * 48 * 1024)
    found = next(line for line in output.splitlines() if line.startswith("| tokens/s"))
    assert float(found.split("|")[2].split()[0].replace(",", "")) == pytest.approx(tokens_per_second, rel=0.01)


def test_an_assumed_speed_is_called_so(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "RESULTS", tmp_path)
    h200, rtx = Machine("H200", "gpu", 1, 1.0), Machine("RTX 3090", "gpu", 1, 1.0)
    assert expected_speed(h200, "debug").source.startswith("assumed")
    row = {"name": "debug", "mfu": 0.42, "goal": "40%"}
    result = {"machine": {"device": "NVIDIA H200"}, "rows": [row, {"name": "other", "mfu": 0.3, "goal": "40%"}]}
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    assert measured_mfu(h200, "debug") == (0.42, "measured on NVIDIA H200 for debug (gpu.json)")
    assert measured_mfu(h200, "unknown")[0] == 0.3
    assert measured_mfu(rtx, "debug") is None
    assert expected_speed(h200, "debug").flops == pytest.approx(0.42 * 989e12)


def test_cpus_and_apple_chips_are_machines():
    cpu = hardware.find_machine("cpu", "8GB", 1, cores=3)
    assert (cpu.kind, cpu.count, cpu.usable) == ("cpu", 3, 8e9 - 2 * 2**30)
    assert expected_speed(cpu).flops == 3 * hardware.CORE_FLOPS and "measured" in expected_speed(cpu).source
    known, unknown = (hardware.find_machine(name, None, 1) for name in ("M2 Pro", "m4-pro"))
    assert known.kind == "apple" and not known.has_bf16
    assert expected_speed(known).flops == expected_speed(unknown).flops == pytest.approx(0.3 * 6.8e12)
    assert "that of the M2 Pro is assumed" in expected_speed(unknown).source


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Configs of few wide layers and a small vocabulary: the planner runs one operator after another."""
    folder = tmp_path_factory.mktemp("wide")
    for name, sizes in {
        "small": dict(hidden_size=768, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=12),
        "1b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=4, num_attention_heads=40),
    }.items():
        config = {"model_type": "buddygpt", "vocab_size": 6000, "num_key_value_heads": 4, **sizes}
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_one_that_does_not_fit_is_told_what_would(wide, capsys):
    model = ["--model_config", wide / "1b.json", "--memory", "12GB", "--per_device_train_batch_size", 1]
    with pytest.raises(SystemExit) as stop:
        run("tools/plan.py", *model, "--bf16", "true")
    output = capsys.readouterr().out
    assert stop.value.code == 1
    assert "**No**" in output and "checkpointing, Muon, bf16 weights" in output.split("What would:")[1]
    options = ["--dtype", "bfloat16", "--optimizer", "muon", "--activation_checkpointing", "true"]
    run("tools/plan.py", *model, *options)
    assert "**Yes**" in capsys.readouterr().out


@pytest.mark.slow
def test_a_smaller_micro_batch_is_a_remedy(wide, capsys):
    model = ["--model_config", wide / "small.json", "--memory", "4GB", "--bf16", "true"]
    with pytest.raises(SystemExit):
        run("tools/plan.py", *model, "--per_device_train_batch_size", 64)
    remedies = capsys.readouterr().out.split("What would:")[1]
    assert 1 < int(re.search(r"a micro-batch of (\d+) with more gradient accumulation", remedies)[1]) < 64


@pytest.mark.slow
def test_no_bfloat16_on_a_t4(wide, capsys):
    model = ["--model_config", wide / "small.json", "--gpu", "t4", "--per_device_train_batch_size", 4]
    with pytest.raises(SystemExit):
        run("tools/plan.py", *model, "--bf16", "true")
    assert "a T4 has no bfloat16" in capsys.readouterr().out
    run("tools/plan.py", *model, "--fp16", "true")
    assert "65.0 TFLOP/s" in capsys.readouterr().out


@pytest.mark.slow
def test_muon_is_refused_under_zero(wide, capsys):
    with pytest.raises(SystemExit):
        run(
            "tools/plan.py", "--model_config", wide / "small.json", "--gpu", "3090", "--gpus", 8, "--bf16", "true",
            "--optimizer", "muon", "--accelerate_config", "accelerate_configs/zero2.yaml",
        )  # fmt: skip
    assert "Muon needs whole matrices" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_config", "debug"], "give --gpu"),
        (["--model_config", "debug", "--gpu", "voodoo"], "not known; give one of cpu"),
        (["--model_config", "debug", "--gpu", "309"], "did you mean RTX 3090"),
        (["--model_config", "debug", "--gpu", "a100"], "which of A100 40GB, A100 80GB"),
        (["--model_config", "debug", "--memory", "12parsecs"], "give a size such as 12GB"),
        (["--model_config", "nothing", "--gpu", "3090"], "no preset or file nothing"),
        (["--memory", "12GB"], "give model_config"),
        (["--stage", "sft", "--gpu", "3090"], "give model_config"),
        (["--stage", "kto"], "use one of pretrain, sft, dpo"),
        (["--gpu", "cpu", "--cores", "0"], "must be more than 0"),
        (["--model_config", "debug", "--gpu", "3090", "--mfu", "40", "--bf16", "true"], "a share of the peak"),
        (["--model_config", "debug", "--gpu", "3090", "--hours", "0"], "must be more than 0"),
        (["--model_config", "debug", "--gpu", "3090", "--hours", "nan"], "`hours` is nan"),
        (["--model_config", "debug", "--gpu", "3090", "--per_device_train_batch_size", "0"], "must be more than 0"),
        (["--model_config", "debug", "--gpu", "3090", "--per_device_train_batch_size", "-4"], "must be more than 0"),
        (["--model_config", "debug", "--gpu", "3090", "--price_per_hour", "-1"], "must be more than 0"),
        (["--model_config", "debug", "--gpu", "3090", "--accelerate_config", "none.yaml"], "none.yaml is not a file"),
        (["--model_config", "debug", "--gpu", "3090", "--blok_size", "64"], "did you mean `block_size`"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        run("tools/plan.py", *arguments)


def test_variants_take_turns_in_both_directions():
    calls = []
    variants = {name: lambda name=name: calls.append(name) or len(calls) for name in "AB"}
    samples = ab.alternate(variants, rounds=2)
    assert calls[2:4] == calls[5:3:-1] and sorted(calls[:2]) == ["A", "B"]
    assert all(len(values) == 2 for values in samples.values())
    assert ab.ratios([2.0, 6.0], [1.0, 2.0]) == [2.0, 3.0]


def test_a_table_goes_between_its_markers():
    document = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert ab.insert_table(document, "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match="lacks the markers"):
        ab.insert_table(document, "y", "new")


def test_every_benchmark_has_its_place_in_the_document():
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    found = []
    for path in (ROOT / "tools/benchmarks").glob("*.py"):
        found += re.findall(r'Report\(\s*"(\w+)"', path.read_text(encoding="utf-8"))  # others have other pages
    for name in found:
        assert document.count(f"<!-- {name} -->") == 1 and document.count(f"<!-- /{name} -->") == 1
    results = {path.stem for path in (ROOT / "tools/benchmarks/results").glob("*.json")}
    assert results <= set(found) and len(set(found)) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generation", "loader", "training_step", "deduplication", "loss_head"])
def test_benchmarks_run(name, capsys):
    run(f"tools/benchmarks/{name}.py", "--quick")
    assert "not written" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmarks_of_text_run(workspace, tmp_path, capsys):
    texts = workspace / "sample" / "pretrain.jsonl"
    run("tools/benchmarks/cleaning.py", "--files", texts, "--quick")
    options = ["--files", texts, "--tokenizers", workspace / "tokenizer", "--quick"]
    run("tools/benchmarks/data_cost.py", *options)
    for language in ("zh", "en"):
        (tmp_path / f"{language}_text.jsonl").write_bytes(texts.read_bytes())
    run("tools/benchmarks/tokenizer_training.py", "--folder", tmp_path, "--quick")
    assert capsys.readouterr().out.count("not written") == 3


@pytest.mark.slow
def test_the_gpu_benchmark_runs_with_torch_and_transformers_alone():
    absent = ["peft", "trl", "accelerate", "datasets", "datatrove", "lm_eval", "bitsandbytes", "liger_kernel"]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); sys.path.insert(0, 'tools/benchmarks');"
        "sys.argv = ['gpu.py', '--device', 'cpu', '--quick'];"
        "runpy.run_path('tools/benchmarks/gpu.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no claim about a GPU" in done.stdout and "FAIL" not in done.stdout
