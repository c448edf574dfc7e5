"""Options of eval/run_eval.py: subsets, generation settings, all checkpoints of a run, and endpoints."""

import functools
import importlib
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lm_eval.tasks import TaskManager
from tiny_models import SIZES
from tiny_tokenizer import TEXTS, train_tiny_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.cli.serve import Serve

from buddygpt.cli.errors import UserError
from buddygpt.eval import run_eval as module
from buddygpt.eval.checkpoints import read_checkpoints

CONTEXT = 192
needs_tenacity = pytest.mark.skipif(not find_spec("tenacity"), reason="endpoints need tenacity: make setup")
DOCUMENTS = [f"{text} {number}" for number in range(10) for text in TEXTS]
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """A chat model of a stock architecture with random weights."""
    folder = tmp_path_factory.mktemp("native")
    tokenizer = AutoTokenizer.from_pretrained(train_tiny_tokenizer(folder))
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes | ends, num_key_value_heads=2, head_dim=12, initializer_range=0.2))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(folder / "documents.jsonl", DOCUMENTS)
    return folder / "model"


@pytest.fixture
def run_eval(monkeypatch, native, tmp_path):
    """Run the script with our own tasks only, because indexing lm-eval's 14,000 takes seconds."""
    monkeypatch.setattr(module, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    text = ["--heldout_text", native.parent / "documents.jsonl"]

    def run(*arguments: object) -> Path:
        words = [*arguments, *text, "--device", "cpu", "--output", tmp_path]
        monkeypatch.setattr(sys, "argv", ["run_eval.py", *map(str, words)])
        module.main()
        return tmp_path

    return run


def read_results(folder: Path, task: str) -> tuple[dict, list[dict]]:
    """Return the newest results of a checkpoint, and their samples of a task."""
    path = max(folder.glob("results_*.json"))
    rows = folder / f"samples_{task}_{path.stem.removeprefix('results_')}.jsonl"
    return json.loads(path.read_text(encoding="utf-8")), [
        json.loads(line) for line in rows.read_text(encoding="utf-8").split("\n")[:-1]
    ]


@pytest.mark.slow
def test_all_checkpoints_are_asked_the_same_questions_and_results_name_them(native, run_eval, monkeypatch, capsys):
    asked = []
    for count in (22, 30):
        counts = {"heldout_text": count, "open_answers": 20}
        monkeypatch.setattr(module, "plan", lambda *_, counts=counts: counts)  # not what this machine has time for
        checkpoints = ["--checkpoints", f"a={native}", f"b={native}", "--gen_kwargs", "max_gen_toks=2"]
        out = run_eval(*checkpoints, "--tasks", "heldout_text", "open_answers", "--minutes", 5)
        (first, rows), (second, others) = (read_results(out / name, "heldout_text") for name in ("a", "b"))
        assert first["subset"] == second["subset"] and first["n-samples"]["heldout_text"]["effective"] == count
        ids = [row["doc_id"] for row in rows]
        assert ids == [row["doc_id"] for row in others] == first["subset"]["doc_ids"]["heldout_text"]
        assert [row["doc"]["text"] for row in rows] == [DOCUMENTS[number] for number in ids]
        assert len(first["subset"]["doc_ids"]["open_answers"]) == 20
        asked.append(set(ids))
    assert asked[0] < asked[1]
    assert "of 5 minutes" in capsys.readouterr().out


@pytest.mark.slow
def test_answers_fit_the_context_and_tell_whether_they_end(native, run_eval, capsys):
    config = native.parent / "config.yaml"
    config.write_text("gen_kwargs: {max_new_tokens: 400}")
    out = run_eval(
        *("--config", config, "--checkpoints", f"a={native}", "--chat", "a", "--tasks", "open_answers"),
        *("--limit", 6, "--batch_size", 4),
    )
    results, rows = read_results(out / "a", "open_answers")
    tokenizer, model = AutoTokenizer.from_pretrained(native), AutoModelForCausalLM.from_pretrained(native)
    prompts = [tokenizer(row["arguments"]["gen_args_0"]["arg_0"], return_tensors="pt") for row in rows]
    room = max(CONTEXT - max(prompt.input_ids.shape[1] for prompt in prompts), CONTEXT // 2)
    assert results["shortened_answers"] == {"open_answers": [400, room]}
    assert f"answers had {room} tokens at most, not 400" in capsys.readouterr().out
    ends = []
    for row, prompt in zip(rows, prompts, strict=True):
        tokens = model.generate(**prompt, max_new_tokens=room, do_sample=False)[0, prompt.input_ids.shape[1] :]
        ends.append(bool(tokens[-1] == tokenizer.eos_token_id))
        assert (row["ended"], row["n_tokens"]) == (ends[-1], len(tokens) - ends[-1])
        assert row["filtered_resps"] == [tokenizer.decode(tokens, skip_special_tokens=True)]
    assert 0 < sum(ends) < len(ends)


@pytest.mark.slow
def test_every_checkpoint_of_a_finished_run_is_evaluated_by_step(native, run_eval, tmp_path):
    for step in (10, 2):
        shutil.copytree(native, tmp_path / f"run.training/checkpoint-{step}")
    (tmp_path / "run.training/checkpoint-3").mkdir()  # a save that was stopped
    (tmp_path / "run").mkdir()
    assert list(read_checkpoints([f"a={tmp_path}/run"], ["a"])) == ["a@2", "a@10"]
    out = run_eval(
        *("--checkpoints", f"a={tmp_path / 'run'}", "--every_checkpoint", "a", "--chat", "a"),
        *("--tasks", "heldout_text", "--limit", 2),
    )
    for step in (2, 10):
        results, _ = read_results(out / f"a@{step}", "heldout_text")
        assert results["config"]["model_args"]["pretrained"].endswith(f"run.training/checkpoint-{step}")
        assert results["chat_template"]  # as for the run


@pytest.mark.parametrize(
    ("items", "every", "match"),
    [
        (["a=FOLDER"], ["a"], "has no checkpoint-STEP"),
        (["a=of/hub"], ["b"], "every_checkpoint: `b` is not among"),
        (["a=FOLDER"], [], "is not a checkpoint"),
        (["a=http://127.0.0.1/v1"], [], "needs the weights"),
        (["a=nowhere/deep/down"], [], "is not a checkpoint"),
    ],
)
def test_places_without_checkpoints_are_refused(items, every, match, tmp_path):
    with pytest.raises(UserError, match=match):
        read_checkpoints([item.replace("FOLDER", str(tmp_path)) for item in items], every)


def test_a_name_of_the_hub_needs_no_folder_but_a_download(run_eval, monkeypatch):
    assert read_checkpoints(["a=owner/model"]) == {"a": "owner/model"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="owner/model.* HF_HUB_OFFLINE=0 downloads it"):
        run_eval("--checkpoints", "a=owner/model", "--tasks", "open_answers")


@pytest.fixture(scope="module")
def served(native) -> Iterator[str]:
    """The address of `transformers serve` for the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(str(native), host="127.0.0.1", port=port, device="cpu", log_level="error", non_blocking=True)
    while not server.server.started:
        assert server._thread.is_alive()
    yield f"http://127.0.0.1:{port}/v1"
    server.kill_server()


@needs_tenacity
@pytest.mark.slow
def test_transformers_serve_gives_the_answers_of_the_folder(native, served, run_eval):
    endpoint = f"{served}#{native}"
    out = run_eval(
        *("--checkpoints", f"folder={native}", f"served={endpoint}", f"folder-chat={native}", f"chat={endpoint}"),
        *("--chat", "chat", "folder-chat", "--tasks", "open_answers", "--limit", 4, "--batch_size", 2),
        *("--gen_kwargs", "max_gen_toks=12"),
    )
    for mine, other in (("folder", "served"), ("folder-chat", "chat")):
        (_, rows), (results, others) = (read_results(out / name, "open_answers") for name in (mine, other))
        # In answers of chats, the server keeps special tokens, and removes white space at the ends.
        texts = ([row["filtered_resps"][0].replace("<|pad|>", "").strip() for row in each] for each in (rows, others))
        assert len(set(map(tuple, texts))) == 1
        assert [row["ended"] for row in rows] == [row["ended"] for row in others]
        assert results["config"]["model_args"] == {"pretrained": endpoint}


@needs_tenacity
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--tasks", "heldout_text"], "gives no log-probabilities of prompts"),
        (["--tasks", "heldout_text", "--chat", "a"], "leave `a` out of `chat`"),
        (["--tasks", "open_answers", "MODEL=nosuch"], "answers with status 400 .*nosuch"),
    ],
)
def test_what_transformers_serve_cannot_do_is_refused(arguments, match, native, served, run_eval, tmp_path):
    model = "nosuch" if "MODEL=nosuch" in arguments else native
    words = [word for word in arguments if not word.startswith("MODEL=")]
    with pytest.raises(UserError, match=match):
        run_eval("--checkpoints", f"a={served}#{model}", *words)
    assert not (tmp_path / "a").exists()


class Endpoint(BaseHTTPRequestHandler):
    """An endpoint whose `responses` by path are a status and JSON, or a function of the request."""

    responses: dict = {}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        status, content = self.responses[self.path.removeprefix("/v1")](body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@needs_tenacity
@pytest.mark.parametrize(
    ("path", "response", "match"),
    [
        ("/completions", (401, {"error": "no key"}), "refuses the key .status 401.; set OPENAI_API_KEY"),
        ("/completions", (404, {"error": "no model x"}), "status 404 .*no model x.*check address and #MODEL"),
        ("/completions", (200, b"<html>"), "not that of an OpenAI-compatible endpoint"),
        ("/models", (200, {"data": []}), "lists no models; name one .*#MODEL"),
        ("/models", (200, {"data": [{"id": "x"}, {"id": "y"}]}), r"lists 2 models \(x, y\)"),
        (None, None, "no answer from the endpoint"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_refused_before_anything_runs(
    path, response, match, endpoint, native, run_eval, tmp_path, monkeypatch
):
    monkeypatch.setattr(Endpoint, "responses", {path: lambda _: response})
    place = endpoint if path == "/models" else f"{endpoint}#x" if path else "http://127.0.0.1:9/v1#x"
    with pytest.raises(UserError, match=match):
        run_eval("--checkpoints", f"a={place}", "--tasks", "open_answers")
    assert not (tmp_path / "a").exists()


@needs_tenacity
@pytest.mark.slow
def test_likelihoods_of_an_endpoint_are_those_of_the_folder(native, endpoint, run_eval, monkeypatch):
    tokenizer, model = AutoTokenizer.from_pretrained(native), AutoModelForCausalLM.from_pretrained(native)

    @torch.no_grad()
    def complete(body: dict) -> tuple[int, dict]:
        """Do what vLLM does with `echo` and `logprobs`: tell those of the prompt, and of one new token."""
        prompt = body["prompt"]
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt[0]
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [None, *logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), -1.0]
        best = [None, *({"x": value} for value in logprobs[:-1].amax(1).tolist()), {"x": -1.0}]
        found = {"token_logprobs": own, "top_logprobs": best, "tokens": [""] * len(own), "text_offset": [0] * len(own)}
        choice = {"index": 0, "text": "", "logprobs": found, "finish_reason": "length"}
        return 200, {"choices": [choice], "object": "text_completion", "id": "1", "created": 1, "model": "x"}

    models = {"data": [{"id": str(native), "object": "model", "created": 1, "owned_by": "me"}], "object": "list"}
    monkeypatch.setattr(Endpoint, "responses", {"/completions": complete, "/models": lambda _: (200, models)})
    out = run_eval("--checkpoints", f"a={native}", f"b={endpoint}", "--tasks", "heldout_text", "--limit", 4)
    (first, _), (second, _) = (read_results(out / name, "heldout_text") for name in ("a", "b"))
    values = [each["results"]["heldout_text"]["bits_per_byte,none"] for each in (first, second)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.slow
def test_speed_is_measured_for_every_setting(native, tmp_path, monkeypatch):
    words = ["--checkpoints", f"a={native}", "--batch_sizes", "1", "2", "--lengths", "4", "8", "--new_tokens", "3"]
    monkeypatch.setattr(
        sys, "argv", ["speed.py", *words, "--rounds", "2", "--device", "cpu", "--output", str(tmp_path)]
    )
    importlib.import_module("buddygpt.eval.speed").main()
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["batch_size"], row["length"]) for row in report["results"]] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    for row in report["results"]:
        for key in ("prefill", "decode", "decode_without_cache"):
            assert 0 < row[key]["slowest"] <= row[key]["median"] <= row[key]["fastest"]
    assert (tmp_path / "speed.md").read_text().count("| a |") == 4
    monkeypatch.setattr(sys, "argv", ["speed.py", "--checkpoints", f"a={native}", "--lengths", "180"])
    with pytest.raises(UserError, match="has 192 positions, fewer than the 212"):
        importlib.import_module("buddygpt.eval.speed").main()
