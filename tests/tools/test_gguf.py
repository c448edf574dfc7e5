"""A GGUF file is the same model with the same tokenizer; what does not fit into one is refused."""

import itertools
import json
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import gguf
import gguf_tensors
import gguf_tokenizer
import jinja2
import pytest
import to_gguf
import torch
from conftest import ROOT, run
from gguf_tokenizer import PROBE, choose_pre_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from buddygpt.cli.errors import UserError
from buddygpt.export.generation_marks import hide_generation_marks
from buddygpt.model import BuddyGPTConfig, BuddyGPTForCausalLM

TOKENIZERS = ROOT.parent / "shared" / "data" / "tokenizers"
CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "法国的首都是哪里？What is 1+1?"},
]
WIDE = dict(head_dim=32)  # 4 heads of 32 channels are more than `hidden_size`
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# name -> fields of the config, expected architecture
VARIANTS = {
    "bias": (dict(attention_bias=True), "qwen2"),
    "bias-wide": (dict(attention_bias=True, tie_word_embeddings=True) | WIDE, "llama"),
    "norm-wide-tied": (dict(use_qk_norm=True, tie_word_embeddings=True) | WIDE, "qwen3"),
    "bias-norm-yarn": (dict(attention_bias=True, use_qk_norm=True, rope_parameters=YARN), "qwen3"),
    "plain-wide": (WIDE, "llama"),
    "plain-linear": (dict(rope_parameters=LINEAR), "llama"),
}
LATENT = dict(num_key_value_heads=None, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=24, v_head_dim=20)
EXPERTS = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32)
SIGMOID = EXPERTS | dict(
    scoring_func="sigmoid", first_k_dense_replace=1, n_shared_experts=2, routed_scaling_factor=1.5
)
MIXTURES = {
    "latent": (LATENT, "deepseek2"),
    "latent-bias-experts": (
        LATENT | SIGMOID | dict(q_lora_rank=20, n_group=2, topk_group=1, tie_word_embeddings=True),
        "deepseek2",
    ),
    "bias-experts": (SIGMOID | dict(attention_bias=True), "glm4moe"),
    "norm-wide-experts": (
        SIGMOID | WIDE | dict(use_qk_norm=True, n_shared_experts=0, norm_topk_prob=False),
        "glm4moe",
    ),
    "softmax-experts": (EXPERTS | dict(use_qk_norm=True, tie_word_embeddings=True), "qwen3moe"),
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "天气", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "北京"}}}
TOOL_CHAT = [
    *CHAT,
    {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [CALL]},
    {"role": "tool", "content": "1"},
]


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """The bundled sample and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("gguf")
    run("data/sample/make_sample.py", "--output", folder / "sample")
    text = folder / "sample" / "pretrain.jsonl"
    run("tokenizer/train_tokenizer.py", "--files", text, "--vocab_size", 1000, "--output", folder / "tokenizer")
    return folder


@pytest.fixture
def checkpoint(tmp_path, sample):
    """Save a random model whose every weight matters: large matrices, biases off 0, norms off 1."""

    def make(name: str = "checkpoint", **fields) -> Path:
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(sample / "tokenizer")
        defaults = dict(
            vocab_size=1024,  # 24 more than the tokenizer has
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = BuddyGPTForCausalLM(BuddyGPTConfig(**(defaults | fields)))
        for parameter, weight in model.named_parameters():
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in parameter else 0.0, std=0.15)
        for buffer, bias in model.named_buffers():
            if buffer.endswith("e_score_correction_bias") and model.config.scoring_func == "sigmoid":
                torch.nn.init.normal_(bias, std=0.3)
        model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, 0])
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def export(monkeypatch, capsys):
    def call(checkpoint: Path, output: Path, file_type: str = "f16") -> str:
        arguments = ["--checkpoint", checkpoint, "--output", output, "--file_type", file_type]
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
        to_gguf.main()
        return capsys.readouterr().out

    return call


def fields_of(reader: gguf.GGUFReader) -> dict:
    return {key: value.contents() for key, value in reader.fields.items()}


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["f16", "q8_0"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_holds_the_model_and_its_tokenizer(tmp_path, checkpoint, export, variant, file_type):
    fields, architecture = VARIANTS[variant]
    source = checkpoint(**fields)
    text = export(source, tmp_path / "out", file_type)
    limit = to_gguf.FILE_TYPES[file_type][2]
    assert 0 < float(text.split("the logits differ by ")[1].split()[0]) < limit
    assert "pre-tokenizer qwen2: 0.00%" in text and "warning" not in text and "stay in f16" not in text

    config, tokenizer = BuddyGPTConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    reader = gguf.GGUFReader(tmp_path / "out" / f"model-{file_type}.gguf")
    read = fields_of(reader)
    assert read["general.architecture"] == architecture
    for key, value in {
        "context_length": 256,
        "embedding_length": 64,
        "block_count": 2,
        "attention.head_count_kv": 2,
        "attention.key_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.scaling.factor": config.rope_parameters.get("factor"),
        "rope.scaling.type": fields.get("rope_parameters", {}).get("rope_type"),
        "rope.scaling.original_context_length": config.rope_parameters.get("original_max_position_embeddings"),
    }.items():
        assert read.get(f"{architecture}.{key}") == value, key
    types = {each.name: each.tensor_type.name for each in reader.tensors}
    assert ("output.weight" in types) != config.tie_word_embeddings
    assert ("blk.1.attn_q.bias" in types) == config.attention_bias
    assert {kind for name, kind in types.items() if "norm" in name or "bias" in name} == {"F32"}
    assert types["token_embd.weight"] == types["blk.0.ffn_down.weight"] == file_type.upper()

    ids = {name: read.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    assert ids == {"bos": None, "eos": 2, "eot": 2, "padding": 3} and not read["tokenizer.ggml.add_bos_token"]
    tokens, kinds = read["tokenizer.ggml.tokens"], read["tokenizer.ggml.token_type"]
    assert tokens[:5] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<tool_call>"]
    assert tokens[-1] == "[PAD1023]" and kinds[:5] == [3, 3, 3, 3, 4] and kinds[999:1001] == [1, 5]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=f"model-{file_type}.gguf")
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == chat
    for text in (PROBE, chat, "<tool_call>\n{}\n</tool_call>"):
        assert theirs(text).input_ids == tokenizer(text).input_ids


@pytest.mark.slow
def test_a_native_export_and_its_checkpoint_give_the_same_tensors(tmp_path, checkpoint, export):
    source = checkpoint(use_qk_norm=True)
    run("export/to_native.py", "--checkpoint", source, "--output", tmp_path / "native")
    tensors = []
    for folder in (source, tmp_path / "native"):
        export(folder, tmp_path / f"{folder.name}-gguf", "bf16")
        reader = gguf.GGUFReader(tmp_path / f"{folder.name}-gguf" / "model-bf16.gguf")
        tensors.append({each.name: each.data.tobytes() for each in reader.tensors})
    assert tensors[0] == tensors[1]


def test_rows_that_do_not_fill_blocks_stay_in_f16_with_a_message(tmp_path, checkpoint, export):
    text = export(checkpoint(intermediate_size=80), tmp_path / "out", "q8_0")
    assert "2 matrices stay in f16" in text
    types = {
        each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf").tensors
    }
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


@pytest.mark.parametrize("fault", ["permutation", "rotary base", "tensor"])
def test_a_file_that_is_not_the_model_is_refused_and_removed(tmp_path, checkpoint, export, monkeypatch, fault):
    if fault == "permutation":
        monkeypatch.setattr(gguf_tensors, "permute", lambda weight, heads: weight)
    elif fault == "rotary base":
        right = gguf.GGUFWriter.add_rope_freq_base
        monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda writer, base: right(writer, base / 10))
    else:
        tensors = to_gguf.tensors
        swapped = {
            "blk.1.attn_norm.weight": "blk.1.ffn_norm.weight",
            "blk.1.ffn_norm.weight": "blk.1.attn_norm.weight",
        }
        monkeypatch.setattr(
            to_gguf, "tensors", lambda model: ((swapped.get(key, key), weight) for key, weight in tensors(model))
        )
    source = checkpoint()
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match="its logits differ by .* above 1e-02"):
        export(source, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("variant", MIXTURES)
def test_experts_and_latent_attention_are_written_and_read_back(tmp_path, checkpoint, export, variant):
    fields, architecture = MIXTURES[variant]
    source = checkpoint(**fields)
    assert "the logits differ by 0.0e+00" in export(source, tmp_path / "out", "f32")
    export(source, tmp_path / "out", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf")
    assert fields_of(reader)["general.architecture"] == architecture
    types = {each.name: each.tensor_type.name for each in reader.tensors}
    has_experts = "n_routed_experts" in fields
    assert (types.get("blk.1.ffn_gate_inp.weight") == "F32") == has_experts  # the router
    assert (types.get("blk.1.ffn_gate_exps.weight") == "Q8_0") == has_experts
    assert ("output.weight" in types) == (architecture != "qwen3moe")  # the other two are untied by the export


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (EXPERTS | dict(use_qk_norm=True, first_k_dense_replace=1), "Qwen3-MoE has experts in every layer"),
        (EXPERTS | dict(use_qk_norm=True, norm_topk_prob=False), "always normalizes the scores"),
        (LATENT | dict(rms_norm_eps=1e-5), "uses `rms_norm_eps` 1e-05 for the norms of the latents"),
        (LATENT | dict(rope_parameters=YARN), "latent attention is written with plain"),
        (LATENT | dict(attention_bias=True), "has no such bias"),
        (dict(rope_parameters=YARN | {"beta_fast": 16.0}), "its `rope_parameters` .*beta_fast.* not written here"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, checkpoint, export, fields, message):
    with pytest.raises(UserError, match=message):
        export(checkpoint(**fields), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_a_stock_model_with_a_bias_that_llama_cpp_has_keeps_it(tmp_path, sample, export):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=1000)
    model = LlamaForCausalLM(LlamaConfig(attention_bias=True, **sizes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.1, std=0.2)
    model.save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(sample / "tokenizer").save_pretrained(tmp_path / "llama")
    assert "llama in f32: the logits differ by 0.0e+00" in export(tmp_path / "llama", tmp_path / "out", "f32")
    names = {each.name for each in gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf").tensors}
    assert "blk.0.attn_output.bias" in names


@pytest.mark.slow
def test_files_of_several_types_share_a_folder_and_nothing_is_overwritten(tmp_path, checkpoint, export):
    source, out = checkpoint(), tmp_path / "out"
    export(source, out)
    with pytest.raises(UserError, match="model-f16.gguf exists"):
        export(source, out)
    export(source, out, "q8_0")
    assert {path.name for path in out.iterdir()} == {"model-f16.gguf", "model-q8_0.gguf", "Modelfile"}
    template = (ROOT / "tools" / "ollama_chatml.gotmpl").read_text()
    assert (out / "Modelfile").read_text().splitlines() == [
        "FROM ./model-q8_0.gguf",
        *f'TEMPLATE """{template}"""'.splitlines(),
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER num_ctx 256",
    ]
    with pytest.raises(UserError, match=r"holds more than GGUF files \(chat_template.jinja\)"):
        export(source, source)


def test_a_chat_stops_at_the_end_of_a_turn_even_if_that_is_not_the_eos_token(sample):
    tokenizer = AutoTokenizer.from_pretrained(sample / "tokenizer")
    tokenizer.eos_token = "<|endoftext|>"
    config = SimpleNamespace(max_position_embeddings=64)
    model = SimpleNamespace(config=config, generation_config=GenerationConfig(eos_token_id=tokenizer.eos_token_id))
    text = to_gguf.modelfile_text("model.gguf", model, tokenizer)
    assert text.count("PARAMETER stop") == 2 and 'stop "<|im_end|>"' in text and 'stop "<|endoftext|>"' in text


def test_a_template_without_tools_stays_plain(sample):
    tokenizer = AutoTokenizer.from_pretrained(sample / "tokenizer")
    assert to_gguf.has_tools(tokenizer) and to_gguf.is_chatml(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    assert to_gguf.is_chatml(tokenizer) and not to_gguf.has_tools(tokenizer)


def test_a_template_that_is_not_chatml_is_left_to_the_user(tmp_path, checkpoint, export):
    source = checkpoint()
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "warning: the chat template is not plain ChatML" in export(source, tmp_path / "out")
    assert "TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text()


def test_the_template_in_the_file_needs_no_transformers():
    template = (ROOT / "tokenizer" / "chat_template.jinja").read_text()
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(hide_generation_marks(template))
    answer = [*CHAT, {"role": "assistant", "content": "巴黎。"}]
    assert plain.render(messages=answer, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n法国的首都是哪里？What is 1+1?<|im_end|>\n"
        "<|im_start|>assistant\n巴黎。<|im_end|>\n<|im_start|>assistant\n"
    )


def train(pattern: str | None, text: str) -> Tokenizer:
    """A byte-level BPE tokenizer that splits by `pattern`, or not at all."""
    tokenizer = Tokenizer(models.BPE())
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text] * 2, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet))
    return tokenizer


def test_the_pre_tokenizer_is_found_by_its_tokens(sample):
    with open(sample / "sample" / "pretrain.jsonl", encoding="utf-8") as file:
        text = "\n".join(json.loads(line)["text"] for line in itertools.islice(file, 400))
    own = Tokenizer.from_file(str(sample / "tokenizer" / "tokenizer.json"))
    assert choose_pre_tokenizer(own) == choose_pre_tokenizer(own, text) == ("qwen2", 0)
    for name in ("qwen35", "llama-bpe", "gpt-2"):
        assert choose_pre_tokenizer(train(gguf_tokenizer.PRE_TOKENIZERS[name][0], PROBE)) == (name, 0)
    _, share = choose_pre_tokenizer(train(None, PROBE))
    assert share > 0.1


@pytest.mark.slow
def test_an_unknown_pre_tokenizer_gives_a_warning(tmp_path, checkpoint, export):
    source = checkpoint(vocab_size=1600)
    PreTrainedTokenizerFast(tokenizer_object=train(None, PROBE), eos_token="<|im_end|>").save_pretrained(source)
    text = export(source, tmp_path / "out")
    assert "warning: llama.cpp has no split like this tokenizer's" in text


@pytest.mark.skipif(not TOKENIZERS.exists(), reason="needs shared/data")
@pytest.mark.parametrize(("name", "expected"), [("qwen2.5", "qwen2"), ("minimind_6400", "gpt-2")])
def test_published_tokenizers_are_known(name, expected):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    assert choose_pre_tokenizer(tokenizer.backend_tokenizer) == (expected, 0)


def ask(server, path: str, **body) -> dict:
    """Post to llama.cpp's server in this process and return its answer."""
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def start_llama_cpp(path: Path):
    """Start llama.cpp's server with a cache in float32, as transformers has it."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.hostnames, settings.port = ["127.0.0.1"], 0
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 256, 1, 1
    settings.warmup, settings.verbosity = False, -1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(settings)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS | MIXTURES)
def test_llama_cpp_answers_like_generate(tmp_path, checkpoint, export, variant):
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    source = checkpoint(**(VARIANTS | MIXTURES)[variant][0])
    export(source, tmp_path / "out", "f32")
    server = start_llama_cpp(tmp_path / "out" / "model-f32.gguf")
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)

    # The same tokens, and the same chat template, tools included
    assert ask(server, "/tokenize", content=PROBE)["tokens"] == tokenizer(PROBE).input_ids
    for messages, tools in ((CHAT, None), (TOOL_CHAT, TOOLS)):
        rendered = ask(server, "/apply-template", messages=as_openai(messages), **({"tools": tools} if tools else {}))
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert rendered["prompt"] == text
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt").input_ids
    assert ask(server, "/tokenize", content=text, parse_special=True)["tokens"] == prompt[0].tolist()

    # The same greedy answer, and the same probabilities of a token; the server leaves some out if text is incomplete.
    answer = ask(
        server,
        "/completion",
        prompt=prompt[0].tolist(),
        n_predict=16,
        temperature=0,
        n_probs=model.config.vocab_size,
        return_tokens=True,
    )
    greedy = model.generate(prompt, do_sample=False, max_new_tokens=16)
    assert answer["tokens"] == greedy[0, prompt.shape[1] :].tolist()[: len(answer["tokens"])]
    first = answer["completion_probabilities"][0]
    position = prompt.shape[1] - 1 + answer["tokens"].index(first["id"])
    with torch.no_grad():
        expected = model(greedy).logits[0, position].log_softmax(-1)
    actual = torch.full_like(expected, -torch.inf)
    for each in first["top_logprobs"]:
        actual[each["id"]] = each["logprob"]
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def as_openai(messages: list[dict]) -> list[dict]:
    """Return messages in the form of the OpenAI API: arguments of calls are JSON text, calls have ids."""
    converted = json.loads(json.dumps(messages))
    for message in converted:
        for number, call in enumerate(message.get("tool_calls", [])):
            call["id"] = str(number)
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        if message["role"] == "tool":
            message["tool_call_id"] = "0"
    return converted


def test_a_file_left_by_a_killed_run_does_not_matter(tmp_path, checkpoint, export):
    left = tmp_path / "out" / ".model-f16.gguf.x1y2.partial" / "model-f16.gguf"
    left.parent.mkdir(parents=True)
    left.write_text("half a file")
    export(checkpoint(), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model-f16.gguf", "Modelfile", left.parent.name}
