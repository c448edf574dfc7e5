"""A classifier scores the last token that is no padding, starts from a chat model, and loads with its own code."""

import pytest
import torch
from tiny_models import VARIANTS, make_model, random_ids
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForSequenceClassification

LOADING = [{}, {"trust_remote_code": True}]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gqa", "mla-moe"])
def test_a_classifier_made_from_a_language_model(variant, tmp_path):
    model, ids = make_model(**VARIANTS[variant]), random_ids(2, 9)
    model.save_pretrained(tmp_path / "chat")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "chat", num_labels=1).eval()
    with torch.no_grad():
        scores = classifier(ids).logits
        expected = model.model(ids).last_hidden_state[:, -1] @ classifier.score.weight.T
        padded = pad(ids, (0, 3))
        padded_scores = classifier(padded, attention_mask=(padded != 0).long()).logits
    assert scores.shape == (2, 1)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(padded_scores, scores)

    classifier.save_pretrained(tmp_path / "reward")
    config = AutoConfig.from_pretrained(tmp_path / "reward")
    assert config.auto_map["AutoModelForSequenceClassification"].endswith("BuddyGPTForSequenceClassification")
    for options in LOADING:
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", **options).eval()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, scores)
