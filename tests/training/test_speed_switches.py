"""Isolated documents do not attend to each other; every speed switch runs, and none changes the losses."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import history, pretrain_arguments, run
from tiny_models import VARIANTS, make_model, random_ids
from torch.nn import functional as F
from transformers import TrainingArguments, modeling_flash_attention_utils
from transformers.utils import import_utils

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.blocks import collate_blocks, document_bounds
from buddygpt.model.liger_kernels import SWITCHES, apply_liger_kernel_to_buddygpt
from buddygpt.model.modeling_buddygpt import BuddyGPTForCausalLM
from buddygpt.training import liger as liger_module
from buddygpt.training.liger import register_liger

# --- isolated documents ---


def first_call(monkeypatch, workspace, folder, *options):
    """Return the model that the recipe trains, and the keyword arguments of its first call."""
    calls, forward = [], BuddyGPTForCausalLM.forward

    @functools.wraps(forward)  # `Trainer` inspects the signature
    def spy(self, *args, **kwargs):
        calls.append((self, kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BuddyGPTForCausalLM, "forward", spy)
    steps = ["--max_steps", 1, "--eval_strategy", "no", "--eval_data", "null", "--output_dir", folder]
    run("pretrain/pretrain.py", *pretrain_arguments(workspace), *steps, *options)
    monkeypatch.setattr(BuddyGPTForCausalLM, "forward", forward)
    return calls[0]


@torch.no_grad()
def leak_and_effect(model, kwargs, eos_id):
    """Change the first document of a row; return how far the logits move after its end, and inside it."""
    ids = kwargs["input_ids"]
    row = next(row for row in range(len(ids)) if 8 < (ids[row] == eos_id).int().argmax() < 50)
    end = int((ids[row] == eos_id).int().argmax()) + 1
    changed = ids.clone()
    changed[row, : end - 1] = (ids[row, : end - 1] + 1) % 200 + 2
    kwargs = {key: value for key, value in kwargs.items() if key not in ("labels", "input_ids", "num_items_in_batch")}
    moved = (model.eval()(ids, **kwargs).logits - model(changed, **kwargs).logits).abs().amax(-1)[row]
    return moved[end:].max().item(), moved[:end].max().item()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_crosses_documents_only_if_they_are_not_isolated(backend, workspace, tmp_path, monkeypatch):
    for isolate in ("true", "false"):
        options = ["--isolate_documents", isolate, "--attn_implementation", backend]
        model, kwargs = first_call(monkeypatch, workspace, tmp_path / isolate, *options)
        leak, effect = leak_and_effect(model, kwargs, model.generation_config.eos_token_id[0])
        assert effect > 1e-3
        assert leak == 0 if isolate == "true" else leak > 1e-3


def test_flash_attention_gets_the_documents_of_a_batch_of_several_rows(monkeypatch):
    """transformers' path to flash attention, with a plain implementation of the variable-length kernel."""
    lengths = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs):
        lengths.append((cu_seqlens_q.diff().tolist(), max_seqlen_q))
        parts = zip(*(each.split(cu_seqlens_q.diff().tolist()) for each in (q, k, v)), strict=True)
        outputs = []
        for part in parts:
            heads = [each.transpose(0, 1)[None] for each in part]
            outputs.append(F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outputs)

    def process(max_seqlen_q=None, max_seqlen_k=None, **kwargs):
        return dict(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)

    functions = ((None, varlen, None, None, None), (process, None))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *args: functions)
    positions = torch.tensor([[*range(9), *range(7)], [*range(4), *range(12)]])
    blocks = [{"input_ids": ids, "position_ids": p} for ids, p in zip(random_ids(2, 16), positions, strict=True)]
    model = make_model()
    with torch.no_grad():
        expected = model(**collate_blocks(blocks), use_cache=False).logits
        model.config._attn_implementation = "flash_attention_2"
        found = model(**collate_blocks(blocks, with_bounds=True), use_cache=False).logits
    assert set(map(str, lengths)) == {"([9, 7, 4, 12], 12)"} and len(lengths) == 3  # once per layer
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_recipe_passes_the_bounds_to_flash_attention_only(workspace, tmp_path, monkeypatch):
    isolate = ["--isolate_documents", "true"]
    _, kwargs = first_call(monkeypatch, workspace, tmp_path / "sdpa", *isolate)
    assert {"attention_mask", "cu_seq_lens_q"}.isdisjoint(kwargs) and "position_ids" in kwargs
    bounds = document_bounds(kwargs["position_ids"])
    assert bounds["cu_seq_lens_q"][-1] == kwargs["input_ids"].numel() and bounds["cu_seq_lens_q"].dtype == torch.int32
    starts = bounds["cu_seq_lens_q"][:-1].tolist()
    assert set(range(0, kwargs["input_ids"].numel(), 64)) < set(starts)


# --- switches of `TrainingArguments` ---


@pytest.mark.slow
def test_switches_run_and_learn_the_same(workspace, tmp_path):
    def losses(name, *options):
        steps = ["--max_steps", 3, "--logging_steps", 1, "--eval_strategy", "no", "--eval_data", "null"]
        steps += ["--output_dir", tmp_path / name]
        run("pretrain/pretrain.py", *pretrain_arguments(workspace), *steps, *options)
        return [row["loss"] for row in history(tmp_path / name) if "loss" in row]

    plain = losses("plain")
    assert losses("workers", "--dataloader_num_workers", 1, "--dataloader_prefetch_factor", 3) == plain
    assert losses("persistent", "--dataloader_num_workers", 1, "--dataloader_persistent_workers", "true") == plain
    assert losses("unpinned", "--dataloader_pin_memory", "false") == plain
    assert losses("checkpointing", "--activation_checkpointing", "true") == plain
    assert losses("bf16", "--bf16", "true") == pytest.approx(plain, rel=1e-2)
    compiled = losses("compiled", "--torch_compile", "true", "--torch_compile_backend", "aot_eager")
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_evaluation_computes_no_logits(workspace, tmp_path, monkeypatch):
    shapes, forward = [], BuddyGPTForCausalLM.forward

    @functools.wraps(forward)  # `Trainer` inspects the signature
    def spy(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if kwargs.get("labels") is not None and not self.training:
            shapes.append(output.logits)
        return output

    monkeypatch.setattr(BuddyGPTForCausalLM, "forward", spy)
    steps = ["--max_steps", 1, "--eval_steps", 1, "--output_dir", tmp_path]
    run("pretrain/pretrain.py", *pretrain_arguments(workspace), *steps)
    assert shapes and all(shape is None for shape in shapes)


# --- Liger's kernels ---


def rms_norm(self, x):
    assert (self.offset, self.casting_mode) == (0.0, "llama")
    return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def rotary(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    first, second = (each.chunk(2, dim=-1) for each in (q, k))
    halves = (torch.cat((-b, a), dim=-1) for a, b in (first, second))
    return tuple(each * cos[:, None] + half * sin[:, None] for each, half in zip((q, k), halves, strict=True))


def fused_cross_entropy(hidden, weight, target, reduction, chunk_mem_const):
    assert reduction == "sum" and chunk_mem_const >= 1
    return F.cross_entropy(hidden @ weight.T, target, reduction="sum")


@pytest.fixture
def fake_liger(monkeypatch):
    """The names and signatures of liger-kernel over plain torch, to test which module gets which kernel."""
    norm, mlp, calls = SimpleNamespace(), SimpleNamespace(), []

    def counted(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    norm.forward = counted("rms_norm", rms_norm)
    mlp.forward = counted("swiglu", lambda self, x: self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))
    table, package = {}, "liger_kernel.transformers"
    modules = {
        "monkey_patch": dict(MODEL_TYPE_TO_APPLY_LIGER_FN=table),
        "rms_norm": dict(LigerRMSNorm=norm),
        "rope": dict(liger_rotary_pos_emb=counted("rope", rotary)),
        "swiglu": dict(LigerSwiGLUMLP=mlp),
        "functional": dict(liger_fused_linear_cross_entropy=counted("loss", fused_cross_entropy)),
    }
    for name in ("liger_kernel", package):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, f"{package}.{name}", SimpleNamespace(**content))
    return table, calls


@pytest.mark.parametrize("variant", ["gqa", "qk-norm", "mla-moe"])
def test_liger_replaces_the_modules_of_one_model(variant, fake_liger):
    fields = VARIANTS.get(variant, dict(use_qk_norm=True) if variant == "qk-norm" else {})
    _, calls = fake_liger
    plain, model, ids = make_model(**fields).train(), make_model(**fields).train(), random_ids(2, 20)
    apply_liger_kernel_to_buddygpt(model)
    losses = [each(ids, labels=ids, use_cache=False).loss for each in (plain, model)]
    layers, dense = 3, 1 if "moe" in variant else 3
    norms = {"gqa": 2, "qk-norm": 4, "mla-moe": 3 + (fields.get("q_lora_rank") is not None)}[variant] * layers + 1
    assert calls.count("rms_norm") == norms and calls.count("loss") == 1
    assert calls.count("rope") == (0 if variant == "mla-moe" else layers)
    assert calls.count("swiglu") >= dense
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
    for (name, p), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)
    calls.clear()
    make_model(**fields).train()(ids, labels=ids, use_cache=False)
    assert not calls  # other models are not patched


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_liger_kernel_can_be_left_out(switch, fake_liger):
    _, calls = fake_liger
    model, ids = make_model().train(), random_ids(2, 12)
    apply_liger_kernel_to_buddygpt(model, **{switch: False})
    model(ids, labels=ids, use_cache=False)
    missing = "loss" if switch == "fused_linear_cross_entropy" else switch
    assert set(calls) == {"rms_norm", "rope", "swiglu", "loss"} - {missing}


def test_the_switch_is_entered_into_ligers_table_or_refused(fake_liger, tmp_path, monkeypatch):
    table, _ = fake_liger
    args = TrainingArguments(str(tmp_path), use_cpu=True, use_liger_kernel=True)
    register_liger(TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(UserError, match="needs liger-kernel and triton"):
        monkeypatch.setattr(liger_module, "is_liger_kernel_available", lambda: False)
        register_liger(args)
    monkeypatch.setattr(liger_module, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(liger_module, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="needs a GPU, this run is on cpu"):
        register_liger(args)
    assert not table
    gpu = SimpleNamespace(use_liger_kernel=True, device=torch.device("cuda"), liger_kernel_config={"layer_norm": True})
    with pytest.raises(UserError, match="has no layer_norm; it has rms_norm, rope"):
        register_liger(gpu)
    gpu.liger_kernel_config = {"rope": False}
    register_liger(gpu)
    assert table == {"buddygpt": apply_liger_kernel_to_buddygpt}


@pytest.mark.skipif(import_utils.is_liger_kernel_available(), reason="liger-kernel is installed")
def test_the_recipe_refuses_liger_if_it_is_not_installed(workspace, tmp_path):
    with pytest.raises(UserError, match="use_liger_kernel: true needs"):
        run("pretrain/pretrain.py", *pretrain_arguments(workspace), "--use_liger_kernel", "true")


@pytest.mark.skipif(
    not (torch.cuda.is_available() and import_utils.is_liger_kernel_available()), reason="needs a GPU and liger-kernel"
)
@pytest.mark.parametrize("preset", ["debug", "debug-mla-moe"])
def test_liger_computes_the_same(preset):
    from conftest import ROOT

    sys.path.insert(0, str(ROOT / "tools/benchmarks"))
    from gpu import compare_liger as compare

    assert compare(preset)["liger_gradient"] < 1e-3
    bfloat16 = compare(preset, torch.bfloat16)
    assert bfloat16["liger_gradient"] < max(0.05, 1.5 * bfloat16["plain_gradient"])
