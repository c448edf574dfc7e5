"""A tiny tokenizer for the tests of this folder."""

import pytest
from tiny_tokenizer import train_tiny_tokenizer
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
