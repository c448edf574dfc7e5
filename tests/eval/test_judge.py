"""Pairwise judgment, against a server on this machine whose verdicts follow a known rule."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import run
from result_files import TIME

from buddygpt.cli.errors import UserError

pytestmark = pytest.mark.slow

# What the judge prefers, by question: see `Judge.verdict`.
ANSWERS = {  # question -> answer of a, answer of b
    "谁写了《红楼梦》？": ("鲁迅", "good 曹雪芹"),
    "2+2?": ("5", "good 4"),
    "3+3?": ("good 6", "7 {first} [[A]]"),
    "tie?": ("x", "x"),
    "first?": ("one", "two"),  # the judge takes the one that stands first
    "garbage?": ("good", "y"),
}


class Judge(BaseHTTPRequestHandler):
    """Prefers the answer with `good`, or the first one. It refuses a wrong key, and says nothing clear at times."""

    asked: list = []
    status = 200

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.headers["Authorization"], request["messages"][0]["content"]))
        content = {"choices": [{"message": {"role": "assistant", "content": self.verdict(self.asked[-1][1])}}]}
        status = self.status if self.headers["Authorization"] == "Bearer right" else 401
        body = json.dumps(content if status == 200 else {"error": {"message": "no"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def verdict(self, prompt):
        marks = ("【回答 B】", "【问题】") if "【问题】" in prompt else ("[Answer B]", "[Question]")
        first, second = prompt.split(marks[0])
        first = first.split(marks[1])[1]
        if "garbage?" in prompt:
            return None
        if "tie?" in prompt:
            return "They are equal: [[C]]"
        if "first?" in prompt or ("good" in first) == ("good" in second):
            return "Not [[B]] but [[A]]"
        return "[[A]]" if "good" in first else "[[B]]"

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Judge, "asked", [])
    monkeypatch.setattr(Judge, "status", 200)
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.fixture
def folder(tmp_path):
    """Answers of two checkpoints; each was also asked a question that the other was not."""
    for place, name in enumerate("ab"):
        rows = []
        for number, (question, answers) in enumerate([*ANSWERS.items(), (f"only {name}?", ("x", "y"))]):
            settings = {"gen_args_0": {"arg_0": "prompt", "arg_1": {"max_gen_toks": 9}}}
            row = {"doc_id": number, "doc": {"question": question}, "doc_hash": question, "arguments": settings}
            rows.append(json.dumps(row | {"resps": [[answers[place]]]}) + "\n")
        (tmp_path / name).mkdir()
        (tmp_path / name / f"samples_open_answers_{TIME}.jsonl").write_text("".join(rows), encoding="utf-8")
        (tmp_path / name / f"samples_open_answers_sampled_{TIME}.jsonl").write_text("")  # of another task
    return tmp_path


def judge(folder, url, *more):
    places = ["--a", folder / "a", "--b", folder / "b", "--output", folder / "out"]
    run("eval/judge.py", *places, "--model", "judge", "--url", url, *more)
    return json.loads((folder / "out/judge.json").read_text())


def test_verdicts_in_both_orders(folder, server, capsys):
    result = judge(folder, server)
    counts = {key: result[key] for key in ("questions", "wins", "losses", "ties", "invalid", "flipped")}
    assert counts == {"questions": 6, "wins": 2, "losses": 1, "ties": 2, "invalid": 1, "flipped": 1}
    assert result["win_rate"]["value"] == 2 / 3 and result["win_rate"]["ci95"] == pytest.approx(
        [0.2077, 0.9385], abs=1e-3
    )
    assert (result["first_wins"]["n"], result["first_wins"]["value"]) == (8, 5 / 8) and result["p"] == 1
    assert "cannot tell" in capsys.readouterr().out and (folder / "out/judge.md").is_file()
    prompts = [prompt for _, prompt in Judge.asked]
    assert len(prompts) == 12 and sum("【问题】\n谁写了《红楼梦》？" in prompt for prompt in prompts) == 2
    assert any("[Answer A]\n7 {first} [[A]]\n[End" in prompt for prompt in prompts)  # answers fill in nothing


def test_a_stopped_run_goes_on(folder, server):
    judge(folder, server, "--limit", 2)
    file = folder / "out/judgments.jsonl"
    with file.open("a") as log:
        log.write('{"key": "cut')  # killed while it wrote
    assert len(Judge.asked) == 4 and judge(folder, server)["wins"] == 2
    assert len(Judge.asked) == 12 and len(file.read_text().splitlines()) == 12
    judge(folder, server)
    assert len(Judge.asked) == 12  # nothing is asked twice
    judge(folder, server, "--model", "another", "--limit", 1)
    assert len(Judge.asked) == 14


def test_an_endpoint_that_refuses_or_is_down_is_one_line(folder, server, monkeypatch):
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0.0)
    for status, match in {404: "status 404; check the address", 503: "status 503; run the same command again"}.items():
        monkeypatch.setattr(Judge, "status", status)
        with pytest.raises(UserError, match=match):
            judge(folder, server)
    with pytest.raises(UserError, match="does not answer .*; run the same command again"):
        judge(folder, "http://127.0.0.1:9/v1")
    for key, match in {"wrong": "refuses the key \\(status 401\\)", "café": "OPENAI_API_KEY in the env"}.items():
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match=match):
            judge(folder, server)
    assert not (folder / "out/judge.json").exists()
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    monkeypatch.setattr(Judge, "status", 400)  # such as a prompt that is too long
    assert judge(folder, server)["invalid"] == 6
    assert "Most questions have a reply without verdict" in (folder / "out/judge.md").read_text(encoding="utf-8")


def test_files_that_hold_no_answers_are_one_line(folder):
    options = {"gen_args_0": {"arg_0": "q", "arg_1": "a"}, "gen_args_1": {"arg_0": "q", "arg_1": "b"}}
    row = {"doc_id": 0, "doc": {}, "resps": [[["-1", "False"]]], "arguments": options}
    (folder / "exam.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "cut.jsonl").write_text("{")
    other = {"doc_id": 99, "doc": {}, "resps": [["x"]], "arguments": {"a": {"arg_0": "q", "arg_1": {}}}}
    (folder / "other.jsonl").write_text(json.dumps(other))
    for name, match in {
        "exam.jsonl": "question 0 has options",
        "cut.jsonl": "cut.jsonl is damaged",
        "nothing": "there is no .*nothing",
        "out": "holds no samples_open_answers",
        "other.jsonl": "have no common question",
    }.items():
        (folder / "out").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=match):
            judge(folder, "http://127.0.0.1:9/v1", "--a", folder / name)
    with pytest.raises(UserError, match="url is ftp://x"):
        judge(folder, "ftp://x")
