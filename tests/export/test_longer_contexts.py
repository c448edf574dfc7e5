"""A model with stretched angles is exported with equal logits beyond the length of its first training."""

import pytest
import torch
from tiny_models import GQA, MLA, MOE, SIGMOID, make_model, random_ids

from buddygpt.export.architectures import from_native, to_native
from buddygpt.training.positions import extend_positions

MODELS = {
    "qwen3": GQA | dict(use_qk_norm=True),
    "llama": GQA,
    "qwen3_moe": GQA | MOE | dict(use_qk_norm=True),
    "deepseek_v3": MLA | MOE | SIGMOID | dict(scoring_func="sigmoid"),
}
LONGER = {"max_position_embeddings": 256}  # from 64
STRETCHED = {
    "yarn": LONGER | {"rope_parameters": {"rope_type": "yarn"}},
    "linear": LONGER | {"rope_parameters": {"rope_type": "linear"}},
    "theta": LONGER | {"rope_parameters": {"rope_theta": 400000.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
}


@torch.no_grad()
@pytest.mark.parametrize("stretch", STRETCHED)
@pytest.mark.parametrize("kind", MODELS)
def test_logits_beyond_the_old_length_are_equal(kind, stretch):
    plain = make_model(**MODELS[kind])
    model = make_model(**MODELS[kind] | extend_positions(plain.config, STRETCHED[stretch]))
    native = to_native(model).eval()
    assert native.config.model_type == kind
    assert native.config.max_position_embeddings == model.config.max_position_embeddings
    assert native.config.rope_parameters == model.config.rope_parameters
    ids = random_ids(2, 250)
    logits = model(ids).logits[:, 64:]
    assert torch.equal(logits, native(ids).logits[:, 64:])
    assert torch.equal(logits, from_native(native).eval()(ids).logits[:, 64:])
    assert not torch.allclose(logits, plain(ids).logits[:, 64:], rtol=0.1)  # the angles have an effect there
