"""Checkpoints load with the lowest transformers release that pyproject.toml allows.

    pip install --target FOLDER transformers==5.17.0
    LOWEST_TRANSFORMERS=FOLDER pytest tests/model/test_lowest_transformers.py

Without that folder, only the names are checked that the checkpoint's code imports.
"""

import ast
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tiny_models import VARIANTS, make_model, random_ids

LOWEST = "5.17"
CHECKPOINT_FILES = ["configuration_buddygpt.py", "losses_buddygpt.py", "modeling_buddygpt.py"]
# What the code in a checkpoint may import: names that exist in the lowest release. `test_every_layer_runs` proves it.
NAMES = {
    "huggingface_hub.dataclasses": {"strict"},
    "transformers": {"PreTrainedConfig", "PreTrainedModel", "initialization"},
    "transformers.activations": {"ACT2FN"},
    "transformers.cache_utils": {"Cache", "DynamicCache"},
    "transformers.generation": {"GenerationMixin"},
    "transformers.integrations": {"use_experts_implementation"},
    "transformers.masking_utils": {"create_causal_mask"},
    "transformers.modeling_layers": {"GenericForSequenceClassification", "GradientCheckpointingLayer"},
    "transformers.modeling_outputs": {"MoeCausalLMOutputWithPast", "MoeModelOutputWithPast"},
    "transformers.modeling_rope_utils": {"ROPE_INIT_FUNCTIONS", "RopeParameters", "dynamic_rope_update"},
    "transformers.modeling_utils": {"ALL_ATTENTION_FUNCTIONS"},
    "transformers.processing_utils": {"Unpack"},
    "transformers.utils": {"TransformersKwargs", "can_return_tuple"},
    "transformers.utils.generic": {"maybe_autocast", "merge_with_config_defaults"},
    "transformers.utils.output_capturing": {"OutputRecorder", "capture_outputs"},
}
RUN = """
import sys, torch, transformers
assert transformers.__version__.startswith(sys.argv[1]), transformers.__version__
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = torch.load(f"{folder}/expected.pt")
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=0, atol=1e-5)
    model.generate(expected["ids"], max_new_tokens=2)
    model.train()(expected["ids"], labels=expected["ids"], use_cache=False).loss.backward()
"""


def test_the_range_of_pyproject_is_the_one_tested():
    assert f'"transformers>={LOWEST}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_code_in_a_checkpoint_imports_only_names_of_the_lowest_release(tmp_path):
    make_model().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == CHECKPOINT_FILES
    for file in CHECKPOINT_FILES:
        for node in ast.walk(ast.parse((tmp_path / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and re.match("transformers|huggingface_hub", node.module):
                assert {alias.name for alias in node.names} <= NAMES[node.module], (file, node.module)


@pytest.mark.slow
@pytest.mark.skipif("LOWEST_TRANSFORMERS" not in os.environ, reason="needs that release in a folder, see above")
def test_every_layer_runs(tmp_path):
    folders = []
    for name, fields in VARIANTS.items():
        folder = tmp_path / name
        model = make_model(**fields)
        model.save_pretrained(folder)
        ids = random_ids(2, 9)
        torch.save({"ids": ids, "logits": model(ids).logits.detach()}, folder / "expected.pt")
        folders.append(str(folder))
    environment = os.environ | {"PYTHONPATH": os.environ["LOWEST_TRANSFORMERS"]}
    subprocess.run([sys.executable, "-c", RUN, LOWEST, *folders], check=True, env=environment)
