"""The model equals stock transformers architectures, and itself on every path, with tiny random weights."""

import subprocess
import sys
import textwrap

import pytest
import torch
from tiny_models import GQA, MLA, MOE, SIGMOID, SIZES, VARIANTS, make_model, random_ids
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from buddygpt.model import BuddyGPTConfig, BuddyGPTForCausalLM

every_variant = pytest.mark.parametrize("variant", VARIANTS)
TIED = dict(tie_word_embeddings=True)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
STRETCHED = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
PLAIN = SIZES["rope_parameters"]
# name -> stock class, stock config, BuddyGPT fields that make it equal
CASES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES | GQA), VARIANTS["gqa-bias"]),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES | GQA, head_dim=16), VARIANTS["gqa-norm"] | dict(head_dim=16)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES | GQA), GQA),
    "llama-yarn": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES | GQA | {"rope_parameters": YARN}),
        GQA | dict(rope_parameters=YARN),
    ),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SIZES | GQA, tie_word_embeddings=True), GQA | TIED),
    "deepseek-dense": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **SIZES | MLA | {"q_lora_rank": None}, first_k_dense_replace=3, num_key_value_heads=4, num_mtp_layers=0
        ),
        MLA | dict(q_lora_rank=None),
    ),
    "deepseek-moe": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(**SIZES | MLA | MOE | SIGMOID, num_key_value_heads=4, num_mtp_layers=0),
        VARIANTS["mla-moe"],
    ),
    "deepseek-yarn": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **SIZES | MLA | MOE | SIGMOID | {"rope_parameters": STRETCHED}, num_key_value_heads=4, num_mtp_layers=0
        ),
        VARIANTS["mla-moe"] | dict(rope_parameters=STRETCHED),
    ),
    "glm4-moe": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig(
            **SIZES | GQA | MOE | SIGMOID | {"rope_parameters": PLAIN | {"partial_rotary_factor": 1.0}},
            rms_norm_eps=1e-6,
            attention_bias=True,
            num_mtp_layers=0,
        ),
        GQA | MOE | SIGMOID | dict(attention_bias=True, scoring_func="sigmoid"),
    ),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SIZES | GQA,
            head_dim=12,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            mlp_only_layers=[0],
            norm_topk_prob=True,
        ),
        VARIANTS["gqa-moe"],
    ),
}


def make_equal_models(case: str, backend: str = "sdpa"):
    stock_class, stock_config, fields = CASES[case]
    ours = make_model(**dict(tie_word_embeddings=False) | fields, attn_implementation=backend)
    stock_config._attn_implementation = backend
    stock = stock_class(stock_config).eval()
    missing, unexpected = stock.load_state_dict(ours.state_dict(), strict=False)
    assert not missing and all(case == "qwen3-moe" and "e_score_correction_bias" in name for name in unexpected)
    return ours, stock


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_equals_stock_architecture(case, backend):
    ours, stock = make_equal_models(case, backend)
    ids = random_ids(2, 40)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    outputs = [model(ids, labels=labels, num_items_in_batch=50) for model in (ours, stock)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=0)
    for output in outputs:
        output.loss.backward()
    stock_gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, stock_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    kwargs = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(ids[:, :8], **kwargs), stock.generate(ids[:, :8], **kwargs))


@every_variant
def test_no_token_reads_the_future(variant):
    model, ids = make_model(**VARIANTS[variant]), random_ids(1, 32)
    before = model(ids).logits
    for position in (1, 15, 31):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % SIZES["vocab_size"]
        after = model(changed).logits
        # Experts run on groups of tokens, and a matrix product of another height may round the last bit differently.
        torch.testing.assert_close(before[:, :position], after[:, :position], rtol=0, atol=1e-5 * ("moe" in variant))
        assert (before[:, position] - after[:, position]).abs().max() > 0.01


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_equals_uncached(variant, cache):
    model, ids = make_model(**VARIANTS[variant]), random_ids(2, 8)
    generated = model.generate(ids, max_new_tokens=16, do_sample=False, cache_implementation=cache)
    uncached = model.generate(ids, max_new_tokens=16, do_sample=False, use_cache=False)
    assert torch.equal(generated, uncached)


@every_variant
def test_chunked_prefill_equals_one_pass(variant):
    model, ids = make_model(**VARIANTS[variant]), random_ids(1, 24)
    past, chunks = None, []
    for chunk in ids.split([7, 1, 16], dim=1):
        output = model(chunk, past_key_values=past, use_cache=True)
        past, chunks = output.past_key_values, [*chunks, output.logits]
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_left_padding_changes_nothing(variant, backend):
    model, ids = make_model(**VARIANTS[variant], attn_implementation=backend), random_ids(1, 12)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(17) >= 5).long().unsqueeze(0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-5)
    new = [model.generate(x, attention_mask=m, max_new_tokens=6, do_sample=False)[:, -6:]
           for x, m in ((padded, mask), (ids, torch.ones_like(ids)))]  # fmt: skip
    assert torch.equal(*new)


# flex_attention takes long to compile: once for each kind of attention.
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("variant", "backend"),
    [(variant, backend) for variant in VARIANTS for backend in ("eager", "sdpa")]
    + [pytest.param(variant, "flex_attention", marks=pytest.mark.slow) for variant in ("gqa", "mla")],
)
@torch.no_grad()  # flex_attention has no backward pass on the CPU
def test_packed_documents_do_not_see_each_other(variant, backend):
    model, lengths = make_model(**VARIANTS[variant], attn_implementation=backend), [5, 14, 9]
    documents = [random_ids(1, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    packed = model(torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
    separate = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)


@pytest.mark.slow
@every_variant
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_backends_agree(variant):
    ids = random_ids(2, 33)
    eager = make_model(**VARIANTS[variant], attn_implementation="eager")(ids).logits
    for backend in ("sdpa", "flex_attention") if variant in ("gqa-norm", "mla-moe") else ("sdpa",):
        logits = make_model(**VARIANTS[variant], attn_implementation=backend)(ids).logits
        torch.testing.assert_close(logits, eager, rtol=0, atol=1e-5, msg=backend)


@pytest.mark.parametrize("variant", ["gqa", "mla-moe"])
def test_logits_to_keep_and_recorded_outputs(variant):
    model, ids = make_model(**VARIANTS[variant], attn_implementation="eager"), random_ids(1, 10)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    # A BLAS library may round a product of 3 rows and one of 10 differently: equal up to the last bits of float32.
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, output.logits[:, -3:], rtol=0, atol=1e-5)
    positions = torch.tensor([2, 7])
    torch.testing.assert_close(
        model(ids, logits_to_keep=positions).logits, output.logits[:, positions], rtol=0, atol=1e-5
    )
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(1, 4, 10))


@every_variant
def test_gradient_checkpointing_changes_nothing(variant):
    ids, gradients = random_ids(2, 16), []
    for checkpointing in (False, True):
        model = make_model(**VARIANTS[variant]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_accumulated_loss_weighs_every_token_alike():
    model, ids = make_model(), random_ids(4, 20)
    labels = ids.clone()
    labels[0, :15] = -100  # rows with different numbers of counted tokens
    items = int((labels[:, 1:] != -100).sum())
    whole = model(ids, labels=labels, num_items_in_batch=items).loss
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in range(4)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


@every_variant
def test_starts_as_a_uniform_guess(variant):
    torch.manual_seed(0)
    model, ids = BuddyGPTForCausalLM(BuddyGPTConfig(**SIZES | VARIANTS[variant])), random_ids(8, 64)
    assert abs(model(ids, labels=ids).loss.item() - torch.tensor(97.0).log().item()) < 0.1
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert abs(parameter.std().item() - 0.02) < 0.004, name
    assert all(not buffer.any() for name, buffer in model.named_buffers() if "correction_bias" in name)


@every_variant
def test_every_parameter_learns(variant):
    model, ids = make_model(**VARIANTS[variant]), random_ids(4, 64)
    model(ids, labels=ids).loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert min(norms.values()) > 1e-5, min(norms, key=norms.get)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_attention_heads=4, num_key_value_heads=3), r"\(4\).*\(3\)"),
        (dict(head_dim=15), r"head_dim \(15\)"),
        (dict(num_hidden_layers=0), r"num_hidden_layers \(0\)"),
        (dict(rope_parameters=YARN | {"rope_type": "yarm"}), r"rope_type \('yarm'\) must be one of default, .*yarn"),
        (dict(hidden_size="wide"), "hidden_size"),
        (MLA | dict(kv_lora_rank=0), r"kv_lora_rank \(0\)"),
        (MLA | dict(q_lora_rank=0), r"q_lora_rank \(0\)"),
        (MLA | dict(qk_rope_head_dim=7), r"qk_rope_head_dim \(7\)"),
        (MLA | dict(v_head_dim=None), r"v_head_dim \(None\)"),
        (MLA | dict(kv_lora_rank=None), r"q_lora_rank \(20\).*kv_lora_rank"),
        (MLA | dict(num_key_value_heads=2), r"num_key_value_heads \(2\).*\(4\)"),
        (MLA | dict(head_dim=12), r"head_dim \(12\).*\(8\)"),
        (MLA | dict(use_qk_norm=True), "use_qk_norm"),
        (MOE | dict(num_experts_per_tok=9), r"num_experts_per_tok \(9\).*8 experts"),
        (MOE | dict(n_group=2, num_experts_per_tok=5), r"num_experts_per_tok \(5\).*4 experts"),
        (MOE | dict(n_group=3), r"n_routed_experts \(8\).*n_group \(3\)"),
        (MOE | dict(n_group=8), r"n_routed_experts \(8\).*n_group \(8\)"),
        (MOE | dict(n_group=2, topk_group=3), r"topk_group \(3\).*n_group \(2\)"),
        (MOE | dict(num_experts_per_tok=0), r"num_experts_per_tok \(0\)"),
        (MOE | dict(num_experts_per_tok=1), r"norm_topk_prob \(True\).*no gradient"),
        (MOE | dict(scoring_func="tanh"), "scoring_func"),
        (MOE | dict(moe_intermediate_size=None), r"moe_intermediate_size \(None\)"),
        (MOE | dict(n_routed_experts=None), r"num_experts_per_tok \(3\).*n_routed_experts"),
        (MOE | dict(n_soft_experts=2), r"n_soft_experts \(2\).*n_routed_experts \(8\)"),
        (dict(moe_intermediate_size=8), r"moe_intermediate_size \(8\)"),
        (dict(n_soft_experts=0, moe_intermediate_size=8), r"n_soft_experts \(0\)"),
    ],
)
def test_refuses_numbers_that_do_not_fit(fields, message):
    with pytest.raises(Exception, match=message):
        BuddyGPTConfig(**SIZES | fields)


@pytest.mark.slow
def test_checkpoint_loads_where_the_package_was_never_imported(tmp_path):
    model, ids = make_model(**VARIANTS["mla-moe"], tie_word_embeddings=True), random_ids(1, 9)
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {
        "configuration_buddygpt.py",
        "losses_buddygpt.py",
        "modeling_buddygpt.py",
    }
    torch.save((ids, model(ids).logits, model.model(ids).last_hidden_state), tmp_path / "expected.pt")
    program = f"""
        import sys, torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        folder, (ids, logits, hidden) = {str(tmp_path / "saved")!r}, torch.load({str(tmp_path / "expected.pt")!r})
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).kv_lora_rank == 12
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(model(ids).logits, logits)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state, hidden)
        model.save_pretrained({str(tmp_path / "again")!r})
        again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
        assert torch.equal(again(ids).logits, logits)
        assert "buddygpt" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # registered: no remote code needed
    assert type(reloaded) is BuddyGPTForCausalLM and torch.equal(reloaded(ids).logits, model(ids).logits)
