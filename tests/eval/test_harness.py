"""Tests of which tokens of an answer lm-eval scores: those that the answer changes, and at least one."""

import json
import os
import subprocess
import sys

import pytest
import tiny_models
from conftest import ROOT
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import buddygpt.eval.harness  # noqa: F401  replaces lm-eval's rule

# Each is one token. A mark joins the letters after it, and Chinese characters join each other, as in our tokenizer.
MARKS = ["：", "：C", "：大海", "（", "（1", ":", "?"]
WORDS = ["<|endoftext|>", "答案", "问", "大", "大海", "1", "A", "B", "C", "D", " Paris", " ", "\n", *MARKS]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("：C|：大海|（1|大海|答案| ?Paris|."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="?")


@pytest.mark.parametrize(
    ("prompt", "answer", "scored"),
    [
        ("答案：", "A", ["A"]),
        ("答案：", "C", ["：C"]),  # lm-eval: no token
        ("答案：", "大海\n", ["：大海", "\n"]),  # lm-eval: the line break alone
        ("问（", "1", ["（1"]),
        ("大", "海", ["大海"]),
        ("：", "C", ["：C"]),  # the prompt is a part of the first token
        ("答案：", "", ["："]),
        ("答案: ", "Paris", [" Paris"]),  # white space belongs to the answer, as in lm-eval
        ("答案\n", "A", ["\n", "A"]),
        ("", "A", ["A"]),
    ],
)
def test_an_answer_is_scored_from_the_first_token_that_it_changes(prompt, answer, scored, tokenizer):
    model = RecordingLM(tokenizer)
    model.loglikelihood([Instance("loglikelihood", doc={}, arguments=(prompt, answer), idx=0)], disable_tqdm=True)
    ((_, context_tokens, answer_tokens),) = model.requests
    assert tokenizer.convert_ids_to_tokens(answer_tokens) == scored
    whole = tokenizer.encode(prompt + answer)
    assert context_tokens + answer_tokens in (whole, [0, *whole])  # 0 is the prefix token
    assert context_tokens


def test_a_prompt_for_generation_ends_before_the_mark_that_tokenizers_join(tmp_path):
    row = {"question": "法国首都？", "answer": "巴黎", "subject": "all"}
    (tmp_path / "qa_test.jsonl").write_text(json.dumps(row), encoding="utf-8")
    manager = TaskManager(include_path=ROOT / "eval/tasks", include_defaults=False, metadata={"sample_dir": tmp_path})
    task = manager.load("sample_qa")["tasks"]["sample_qa"]
    for answer in ("：巴黎。\n问：", "巴黎"):
        task.build_all_requests(limit=1)
        (request,) = task.instances
        assert request.args[0] == "问：法国首都？\n答"
        request.resps = [answer]
        task.apply_filters()
        assert task.process_results(task.eval_docs[0], [request.filtered_resps["none"]]) == {"exact_match": 1.0}


@pytest.mark.slow
def test_a_task_of_your_own_is_scored_so_under_plain_lm_eval(tokenizer, tmp_path):
    tiny_models.make_model(eos_token_id=0, num_key_value_heads=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"question": "答案", "label": 2}\n', encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(
        "task: mine\nclass: !function buddygpt.eval.harness.Task\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}："\ndoc_to_choice: [A, B, C]\ndoc_to_target: label\n'
        'target_delimiter: ""\n',
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--include_path", tmp_path, "--tasks", "mine"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True", "--device", "cpu"]
    command += ["--output_path", tmp_path / "results", "--log_samples"]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    (path,) = (tmp_path / "results").glob("*/samples_mine_*.jsonl")
    (row,) = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    likelihoods = [float(response[0][0]) for response in row["resps"]]
    assert len(likelihoods) == 3 and max(likelihoods) < 0  # 0 is the likelihood of no tokens


class RecordingLM(TemplateLM):
    """Keeps the tokens of each request instead of scoring them."""

    eot_token_id = 0

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, **kwargs):
        self.requests = requests
        return [(0.0, True)] * len(requests)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError
