"""Importing the package registers the model in any order of imports, and preparing text imports no torch."""

import subprocess
import sys

import pytest

IS_REGISTERED = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
config = AutoConfig.for_model("buddygpt")
autos = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
registered = [type(config), *(auto._model_mapping[type(config)] for auto in autos)]
from buddygpt.model import BuddyGPTConfig, BuddyGPTForCausalLM, BuddyGPTForSequenceClassification, BuddyGPTModel
assert registered == [BuddyGPTConfig, BuddyGPTModel, BuddyGPTForCausalLM, BuddyGPTForSequenceClassification]
assert [each._auto_class for each in registered] == ["AutoConfig", *(auto.__name__ for auto in autos)]
"""


def run_python(program: str) -> str:
    """Run a program in a new process. Return the last line of its error output, or an empty string."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return done.stderr.strip().split("\n")[-1] if done.returncode else ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "import buddygpt.model",
        "from transformers import AutoModelForCausalLM; import buddygpt.model",
        "from buddygpt.model.modeling_buddygpt import BuddyGPTAttention",
        "from buddygpt.model import BuddyGPTConfig",
    ],
)
def test_registered_in_any_order_of_imports(before):
    assert run_python(f"{before}\n{IS_REGISTERED}") == ""


def test_a_name_that_does_not_exist_is_an_import_error():
    with pytest.raises(ImportError, match="BuddyGPTForSpeech"):
        from buddygpt.model import BuddyGPTForSpeech  # noqa: F401


@pytest.mark.slow
def test_preparing_text_imports_no_torch():
    program = "import sys, buddygpt.data.prepare_pretrain\nassert 'torch' not in sys.modules"
    assert run_python(program) == ""
