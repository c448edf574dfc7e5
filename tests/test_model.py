"""Is the model right? Compared with stock transformers architectures, and with itself, on tiny random weights."""

import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from buddygpt import BuddyGPTConfig, BuddyGPTForCausalLM

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    eos_token_id=1,
    pad_token_id=0,
)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES), dict(attention_bias=True, tie_word_embeddings=False)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16), dict(use_qk_norm=True, tie_word_embeddings=False)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES), dict(tie_word_embeddings=False)),
    "llama-yarn": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES | {"rope_parameters": YARN}),
        dict(tie_word_embeddings=False, rope_parameters=YARN),
    ),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True), dict(tie_word_embeddings=True)),
}


def make_model(seed: int = 0, **fields) -> BuddyGPTForCausalLM:
    torch.manual_seed(seed)
    model = BuddyGPTForCausalLM(BuddyGPTConfig(**SIZES | {"initializer_range": 0.2} | fields))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a bias or norm in the wrong place
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model.eval()


def make_twins(case: str, backend: str = "sdpa"):
    stock_class, stock_config, fields = CASES[case]
    ours = make_model(**{"head_dim": 16 if case == "qwen3" else None} | fields, attn_implementation=backend)
    stock_config._attn_implementation = backend
    stock = stock_class(stock_config).eval()
    stock.load_state_dict(ours.state_dict(), strict=True)
    return ours, stock


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_equals_stock_architecture(case, backend):
    ours, stock = make_twins(case, backend)
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


@pytest.mark.parametrize("fields", [{}, {"use_qk_norm": True}, {"attention_bias": True}], ids=str)
def test_no_token_reads_the_future(fields):
    model, ids = make_model(**fields), random_ids(1, 32)
    before = model(ids).logits
    for position in (1, 15, 31):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % SIZES["vocab_size"]
        after = model(changed).logits
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_equals_uncached(cache):
    model, ids = make_model(use_qk_norm=True), random_ids(2, 8)
    generated = model.generate(ids, max_new_tokens=16, do_sample=False, cache_implementation=cache)
    uncached = model.generate(ids, max_new_tokens=16, do_sample=False, use_cache=False)
    assert torch.equal(generated, uncached)


def test_chunked_prefill_equals_one_pass():
    model, ids = make_model(), random_ids(1, 24)
    past, chunks = None, []
    for chunk in ids.split([7, 1, 16], dim=1):
        output = model(chunk, past_key_values=past, use_cache=True)
        past, chunks = output.past_key_values, [*chunks, output.logits]
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_left_padding_changes_nothing(backend):
    model, ids = make_model(attn_implementation=backend), random_ids(1, 12)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(17) >= 5).long().unsqueeze(0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-5)
    new = [model.generate(x, attention_mask=m, max_new_tokens=6, do_sample=False)[:, -6:]
           for x, m in ((padded, mask), (ids, torch.ones_like(ids)))]  # fmt: skip
    assert torch.equal(*new)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()  # flex_attention has no backward pass on the CPU
def test_packed_documents_do_not_see_each_other(backend):
    model, lengths = make_model(attn_implementation=backend), [5, 14, 9]
    documents = [random_ids(1, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    packed = model(torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
    separate = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)


@torch.no_grad()
def test_backends_agree():
    ids = random_ids(2, 33)
    eager = make_model(attn_implementation="eager")(ids).logits
    for backend in ("sdpa", "flex_attention"):
        logits = make_model(attn_implementation=backend)(ids).logits
        torch.testing.assert_close(logits, eager, rtol=0, atol=1e-5, msg=backend)


def test_logits_to_keep_and_recorded_outputs():
    model, ids = make_model(attn_implementation="eager"), random_ids(1, 10)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert torch.equal(model(ids, logits_to_keep=3).logits, output.logits[:, -3:])
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(1, 4, 10))


def test_gradient_checkpointing_changes_nothing():
    ids, gradients = random_ids(2, 16), []
    for checkpointing in (False, True):
        model = make_model().train()
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


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model, ids = BuddyGPTForCausalLM(BuddyGPTConfig(**SIZES)), random_ids(8, 64)
    assert abs(model(ids, labels=ids).loss.item() - torch.tensor(97.0).log().item()) < 0.1
    assert abs(model.model.embed_tokens.weight[1:].std().item() - 0.02) < 0.002
    assert abs(model.model.layers[0].mlp.down_proj.weight.std().item() - 0.02) < 0.002


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_attention_heads=4, num_key_value_heads=3), r"\(4\).*\(3\)"),
        (dict(head_dim=15), r"head_dim \(15\)"),
        (dict(num_hidden_layers=0), r"num_hidden_layers \(0\)"),
        (dict(hidden_size="wide"), "hidden_size"),
    ],
)
def test_refuses_numbers_that_do_not_fit(fields, message):
    with pytest.raises(Exception, match=message):
        BuddyGPTConfig(**SIZES | fields)


def test_checkpoint_loads_where_the_package_was_never_imported(tmp_path):
    model, ids = make_model(use_qk_norm=True, tie_word_embeddings=True), random_ids(1, 9)
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {
        "configuration_buddygpt.py",
        "modeling_buddygpt.py",
    }
    torch.save((ids, model(ids).logits, model.model(ids).last_hidden_state), tmp_path / "expected.pt")
    program = f"""
        import sys, torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        folder, (ids, logits, hidden) = {str(tmp_path / "saved")!r}, torch.load({str(tmp_path / "expected.pt")!r})
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).use_qk_norm
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
