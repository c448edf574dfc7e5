"""Bits per byte by position and the needle test: right numbers, also for models of other kinds."""

import json
import math

import pytest
import torch
from conftest import run
from tiny_models import GQA, MLA, MOE, SIGMOID, SIZES, make_model, random_ids
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import ModelOutput

from buddygpt.cli.errors import UserError
from buddygpt.eval.benchmarks.needles import ANSWER_TOKENS, DEPTHS, count_found, make_texts, number_in
from buddygpt.eval.long_context import bits_per_byte_by_position, list_variants, require_plain_head, token_losses

MODELS = {
    "dense": lambda: make_model(**GQA, use_qk_norm=True),
    "mla-moe": lambda: make_model(**MLA | MOE | SIGMOID, scoring_func="sigmoid"),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=12)).eval(),
}


@pytest.fixture(scope="module")
def tokenizer(workspace) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(workspace / "tokenizer")


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_logits(name):
    model, ids = MODELS[name](), random_ids(2, 24)
    with torch.no_grad():
        logits = model(ids).logits.transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits[..., :-1], ids[:, 1:], reduction="none")
    assert torch.allclose(token_losses(model, ids), expected, atol=1e-5)
    require_plain_head(model, ids)


def test_a_model_that_scales_its_logits_is_refused():
    model = make_model(**GQA)
    head = model.forward
    model.forward = lambda *args, **kwargs: ModelOutput(logits=head(*args, **kwargs).logits * 3)
    with pytest.raises(UserError, match="type buddygpt scales or caps its logits"):
        require_plain_head(model, random_ids(1, 8))


@pytest.mark.slow
def test_every_range_of_an_ignorant_model_has_the_bits_of_the_vocabulary(tokenizer):
    model = make_model(**GQA, vocab_size=512)
    torch.nn.init.zeros_(model.model.norm.weight)  # all logits are 0
    documents = ["广东省的省会是广州。The capital of France is Paris."] * 40
    tokens = sum(len(tokenizer(text).input_ids) + 1 for text in documents)
    expected = math.log2(512) * tokens / sum(len(text.encode()) for text in documents)
    found = bits_per_byte_by_position(model, tokenizer, documents, 64, 10**6)
    assert len(found) == 8 and all(math.isclose(value, expected, rel_tol=1e-5) for value in found)
    with pytest.raises(UserError, match="fewer than the length 64; give more text"):
        bits_per_byte_by_position(model, tokenizer, documents[:1], 64, 10**6)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_number_lies_at_its_depth_and_the_text_fills_the_length(tokenizer, language):
    for depth in DEPTHS:
        ids, answers = make_texts(tokenizer, language, 900, depth, 3)
        assert ids.shape == (3, 900 - ANSWER_TOKENS)
        for row, answer in zip(ids.tolist(), answers, strict=True):
            text = tokenizer.decode(row)
            body, _, question = text.rpartition("\n")
            assert text.count(answer) == 1 and text.count("号码" if language == "zh" else "number") == 5
            assert f"{question}{answer}" in text.replace(" is ", " is") and question.endswith(("是", " is"))
            place = len(tokenizer(body[: body.index(answer)]).input_ids) / len(row)
            assert abs(place - depth) < 0.08
        again, same = make_texts(tokenizer, language, 900, depth, 3)
        assert torch.equal(ids, again) and answers == same
        assert not torch.equal(ids, make_texts(tokenizer, language, 900, depth, 3, seed=1)[0])
    with pytest.raises(UserError, match="64 tokens are too few"):
        make_texts(tokenizer, language, 64, 0.5, 1)


@pytest.mark.parametrize(
    ("text", "number"),
    [("4821。\n", "4821"), (" 4821.", "4821"), (" 48215.", "48215"), ("约4821", None), ("", None), ("482", "482")],
)
def test_an_answer_is_the_number_that_comes_first(text, number):
    assert number_in(text) == number


@pytest.mark.slow
def test_only_right_numbers_are_counted(tokenizer):
    ids, answers = make_texts(tokenizer, "en", 400, 0.5, 5)

    class Copier:
        """Answers right in all rows but the second, where a digit follows."""

        device, row = "cpu", 0

        def generate(self, rows, **_):
            new = []
            for _ in rows:
                answer = f" {answers[self.row]}{'7' if self.row == 1 else '.'} The and so on"
                new.append(tokenizer(answer, add_special_tokens=False).input_ids[:ANSWER_TOKENS])
                self.row += 1
            return torch.cat((rows, torch.tensor(new)), dim=1)

    assert count_found(Copier(), tokenizer, ids, answers, batch=2) == 4


def test_a_model_that_is_long_enough_is_measured_as_it_is(tmp_path):
    config = make_model(**GQA).config
    assert [each.changes for each in list_variants("a", "folder", config, 64, ["yarn"])] == [{}]
    as_it_is, yarn, dynamic = list_variants("a", "folder", config, 256, ["yarn", "dynamic"])
    assert as_it_is.changes == {"max_position_embeddings": 256} and not as_it_is.stretched
    assert yarn.name == "a, yarn" and yarn.stretched
    assert yarn.changes["rope_parameters"]["factor"] == dynamic.changes["rope_parameters"]["factor"] == 4
    assert dynamic.changes["max_position_embeddings"] == 64  # from which its angles are computed
    with pytest.raises(UserError, match="a=folder has no rotary positions"):
        list_variants("a", "folder", config.__class__.__mro__[1](), 64, [])


@pytest.mark.slow
def test_the_report_compares_checkpoints_by_position(workspace, base, tmp_path, capsys):
    text = workspace / "shards" / "eval.jsonl"
    output = ["--output", tmp_path / "out", "--text", text, "--checkpoints", f"base={base}"]
    run("eval/long_context.py", *output, "--length", 256, "--needles", 1, "--needle_lengths", 200, 256)
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    names = ["base", "base, linear", "base, theta", "base, yarn", "base, dynamic"]
    results = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["results"]
    assert list(results) == names and (tmp_path / "out" / "report.png").stat().st_size > 10_000
    assert all(f"| {name}{' (untrained)' if ',' in name else ''} | 128 |" in report for name in names)
    assert "| 0–31 | 32–63 | 64–127 | 128–255 |" in report and "| base | Chinese | 5 | " in report
    assert all(len(found["needles"]) == 2 * 2 * len(DEPTHS) for found in results.values())
    # Stretching by linear interpolation changes a model at all positions, larger ones without stretching at new ones.
    bits = {name: found["bits_per_byte"] for name, found in results.items()}
    assert bits["base, yarn"] != bits["base"] != bits["base, linear"]
