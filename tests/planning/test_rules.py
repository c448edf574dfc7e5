"""The rules against the runs and settings that they cite, and against the real model."""

import math

import pytest

from buddygpt.model import BuddyGPTConfig
from buddygpt.model.parameters import count_parameters
from buddygpt.planning import rules
from buddygpt.planning.budget import model_config
from buddygpt.training.flops import flops_per_token


@pytest.mark.parametrize(("parameters", "tokens", "bits"), rules.MEASURED + rules.PUBLISHED)
def test_the_law_agrees_with_the_runs_that_it_was_fitted_to(parameters, tokens, bits):
    assert rules.expected_bits_per_byte(parameters, tokens) == pytest.approx(bits, rel=0.04)


def test_more_of_anything_is_better():
    bits = rules.expected_bits_per_byte
    assert bits(8e6, 1e8) < bits(4e6, 1e8) and bits(8e6, 2e8) < bits(8e6, 1e8) < bits(8e6, 1e8, "adamw")


@pytest.mark.parametrize(("width", "vocab_size"), [(128, 2048), (512, 8192)])
def test_sizes_are_those_of_the_real_model(width, vocab_size):
    shape = rules.shape_of_width(width, vocab_size)
    config = BuddyGPTConfig(**model_config(shape, 256))
    assert shape.parameters == count_parameters(config).total
    assert shape.flops_per_token(256) == pytest.approx(flops_per_token(config, 256), rel=1e-6)


@pytest.mark.parametrize("parameters", [4e6, 26e6, 64e6, 350e6, 1.1e9])
def test_a_wished_size_is_met_within_a_tenth(parameters):
    shape = rules.shape_of_size(parameters, 6400)
    assert shape.parameters == pytest.approx(parameters, rel=0.1)
    assert shape.hidden_size == shape.num_attention_heads * shape.head_dim
    assert shape.num_attention_heads == 2 * shape.num_key_value_heads


def test_a_larger_budget_gives_a_larger_model_more_tokens_and_a_lower_rate():
    runs = [rules.plan_budget(flops, 72e9, math.inf, vocab_size=8192) for flops in (1e13, 1e15, 1e17)]
    sizes = [run.shape.parameters for run in runs]
    ratios = [run.tokens / run.shape.parameters for run in runs]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[2] and ratios[0] < ratios[1]
    assert ratios[2] > 0.7 * rules.tokens_per_parameter(1e17)  # widths are coarse
    assert runs[0].batch < runs[-1].batch and runs[0].learning_rate > runs[-1].learning_rate
    for run in runs:
        work = run.shape.flops_per_token(run.block_size) + run.shape.muon_flops() / run.batch
        assert run.tokens * work == pytest.approx(run.seconds * 72e9, rel=0.05)
        assert 0 < run.warmup_steps < run.decay_steps < run.steps


def test_the_measured_run_is_what_the_rules_would_choose():
    assert rules.batch_tokens(6.55e6, 256) == 4096
    assert rules.learning_rate("muon", 4.0e6, 4096) == pytest.approx(3e-3, rel=0.2)
    assert rules.vocabulary(53.7e6) == 8192
    assert rules.bytes_per_token(8192) == pytest.approx(53.7e6 / 16.2e6, rel=0.01)


def test_repeated_text_is_worth_less_than_new_text():
    assert rules.effective_tokens(50, 100) == 50
    assert 390 > rules.effective_tokens(400, 100) > 360  # 2305.16264: four epochs are nearly as good
    assert rules.effective_tokens(1e6, 100) < 1700
