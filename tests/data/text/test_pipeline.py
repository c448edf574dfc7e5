"""Killed runs resume to the same bytes, and append rounds leave existing shards unchanged."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from test_prepare_pretrain import byte_tokenizer, documents, write_jsonl
from transformers import AutoTokenizer

from buddygpt.cli.errors import UserError, run_script
from buddygpt.data import prepare_pretrain
from buddygpt.data.shards.format import TokenShards, documents_file, read_manifest, verify_shards
from buddygpt.data.text import pipeline, publish, tokenize
from buddygpt.data.text.hold_out import HoldOutCheck
from buddygpt.data.text.pipeline import lock
from buddygpt.data.text.publish import Publisher
from buddygpt.data.text.steps import deduplicate
from buddygpt.data.text.steps.deduplicate import DuplicatePairs, DuplicateSignature
from buddygpt.data.text.tokenize import DocumentTable, HoldOut

SCRIPT = ROOT / "data" / "prepare_pretrain.py"
COMMON = {"eval_fraction": 0.1, "deduplicate": "exact", "shard_bytes": 20_000, "batch_chars": 2_000}
HANZI = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def texts(part: int, count: int = 150) -> list[str]:
    """Return different texts; every tenth is in all parts."""
    return [f"{0 if i % 10 == 0 else part}之{i}：" + HANZI[i % 40 :] * (1 + i % 7) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes") / "tokenizer")


@pytest.fixture
def config(tmp_path, tokenizer_folder):
    return make_config(tmp_path, tokenizer_folder)


def make_config(folder: Path, tokenizer: Path):
    """Write three files and return a function that writes a config for them, two sources, with changes."""
    for part in range(3):
        write_jsonl(folder / f"{part}.jsonl", texts(part))

    def write(output: str, **changes) -> Path:
        sources = [str(folder / "0.jsonl"), {"name": "more", "path": str(folder / "[12].jsonl"), "epochs": 2}]
        values = {"sources": sources, "tokenizer": str(tokenizer), "output": str(folder / output)}
        path = folder / f"{output}.yaml"
        path.write_text(json.dumps(COMMON | values | changes))
        return path

    return write


def prepare(config: Path, monkeypatch, *arguments: object) -> Path:
    """Run the script in this process; return its output folder."""
    monkeypatch.setattr(sys, "argv", ["prepare_pretrain.py", "--config", *map(str, [config, *arguments])])
    prepare_pretrain.main()
    return config.with_suffix("")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_table_of_a_shard_lists_its_documents_in_order(config, monkeypatch, tokenizer_folder, tmp_path):
    out = prepare(config("out"), monkeypatch)
    found = documents(out / "train", AutoTokenizer.from_pretrained(tokenizer_folder))
    shards = verify_shards(out / "train")["shards"]
    assert len(shards) > 3 and {shard["source"] for shard in shards} == {"0", "more"}
    assert all(shard["text_bytes"] < 27_000 for shard in shards)
    rows = [row for shard in shards for row in pq.read_table(out / "train" / documents_file(shard)).to_pylist()]
    for row, text in zip(rows, found, strict=True):
        file, number = row["id"].rsplit(":", 1)
        lines = Path(file).read_text("utf-8").splitlines()
        assert json.loads(lines[int(number) - 1])["text"] == text and row["chars"] == len(text)
    aside = [json.loads(line)["text"] for line in (out / "eval.jsonl").read_text("utf-8").splitlines()]
    assert len(found) + len(aside) == len({*found, *aside}) == 3 * 150 - 2 * 15
    cleaning = TokenShards(out / "train").manifest["cleaning"]
    assert sum(counts.get("dropped_duplicate", 0) for counts in cleaning.values()) == 30
    assert (out / "report.md").exists()


@pytest.mark.slow
def test_a_document_with_a_benchmark_question_is_dropped_and_shown(config, monkeypatch, tmp_path):
    question = "下列哪一项不是唐代诗人李白创作的五言绝句作品名称"
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems" / "test.csv").write_text(f"Question,A,B,C,D,Answer\n{question},静夜思,登高,独坐,秋浦,B\n")
    rows = texts(0)
    write_jsonl(tmp_path / "0.jsonl", [*rows, f"今天的题目：{question}？请作答。"])
    out = prepare(config("out", decontaminate=[str(tmp_path / "poems")]), monkeypatch)
    manifest = TokenShards(out / "train").manifest
    assert manifest["cleaning"]["0"]["dropped_exam_poems"] == 1 and manifest["cleaning"]["0"]["read"] == len(rows) + 1
    assert manifest["generations"][0]["exams"][0]["file"].endswith("test.csv")
    assert question in (out / "report.md").read_text("utf-8")


KILLS = [  # the stage, and the function that kills the process at its n-th call in that stage
    ("index", np, "save", 2),
    ("clean", pipeline, "write_document", 40),
    ("check", HoldOutCheck, "run", 1),
    ("signatures", DuplicateSignature, "get_signature", 200),
    ("buckets", DuplicatePairs, "run", 1),
    ("clusters", deduplicate, "link_to_first", 1),
    ("tokenize", HoldOut, "run", 2),
    ("tokenize", DocumentTable, "add", 50),
    ("tokenize", tokenize, "reorder_documents", 2),
    ("tokenize", DocumentTable, "write", 1),
    ("tokenize", tokenize, "hash_shard", 2),
    ("eval", DocumentTable, "add", 5),
    ("eval", tokenize, "reorder_documents", 2),
    ("manifest", publish, "resolve_mixture", 2),
    ("manifest", publish, "write_report", 1),
    ("publish", Publisher, "run", 1),
    ("publish", publish, "finish_publishing", 1),  # OUT is there, the stage not completed
    ("publish", shutil, "rmtree", 1),
]


def stages_at_work(partial: Path) -> set[str]:
    """Return the stages with a task that has started and is not complete."""
    locks = [(path.parents[1], path.name) for path in partial.glob("*/logs/*/locks/*")]
    return {stage.name for stage, task in locks if not (stage / "completions" / task).exists()}


def run_and_kill(config: Path, stage: str, owner: object, name: str, calls: int) -> int:
    """Run the script in another process that kills itself at this call; return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    function, count = getattr(owner, name), itertools.count(1)
    partial = config.with_suffix(".partial")

    def kill(*args: object, **kwargs: object) -> object:
        if stages_at_work(partial) == {stage} and next(count) == calls:
            os.killpg(0, signal.SIGKILL)
        return function(*args, **kwargs)

    with contextlib.suppress(BaseException):
        os.setsid()
        setattr(owner, name, kill)
        sys.argv = ["prepare_pretrain.py", "--config", str(config)]
        prepare_pretrain.main()
    os._exit(0)


@pytest.mark.slow
def test_a_run_killed_in_every_stage_gives_the_same_bytes(config, monkeypatch, tmp_path):
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": texts(1)[1]}) + "\n")
    settings = {"decontaminate": [str(tmp_path / "exam.jsonl")]}
    whole = content(prepare(config("whole", **settings), monkeypatch))
    path, killed_in = config("killed", **settings), set()
    for stage, *call in KILLS:
        assert run_and_kill(path, stage, *call) == -signal.SIGKILL, call
        assert stages_at_work(tmp_path / "killed.partial") == {stage}
        assert (tmp_path / "killed").exists() == (call[1] in ("finish_publishing", "rmtree"))
        killed_in |= stages_at_work(tmp_path / "killed.partial")
    assert killed_in == {logs.name for logs in tmp_path.glob("killed.partial/*/logs/*")}
    prepare(path, monkeypatch)
    assert content(tmp_path / "killed") == whole
    assert not (tmp_path / "killed.partial").exists()


@pytest.mark.slow
def test_workers_that_outlive_their_run_are_waited_for(config, monkeypatch, tmp_path):
    whole = content(prepare(config("whole"), monkeypatch))
    config("orphaned")
    command = [sys.executable, SCRIPT, "--config", tmp_path / "orphaned.yaml", "--workers", "2"]
    run = subprocess.Popen(command, start_new_session=True)
    locks = []
    while not locks:  # a worker is at a task
        assert run.poll() is None
        locks = list(tmp_path.glob("orphaned.partial/*/logs/clean/locks/*"))
        time.sleep(0.002)
    run.kill()
    run.wait()
    assert not (tmp_path / "orphaned").exists()
    prepare(tmp_path / "orphaned.yaml", monkeypatch)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)  # the manager that multiprocessing leaves behind
    assert content(tmp_path / "orphaned") == whole


@pytest.mark.slow
def test_a_full_disk_is_one_error_line_and_loses_nothing(config, monkeypatch, tmp_path, capsys):
    whole = content(prepare(config("whole"), monkeypatch))
    path = config("full")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name in ((pipeline, "write_document"), (DocumentTable, "write"), (publish, "write_report")):
        with monkeypatch.context() as full, pytest.raises(SystemExit, match="2"):
            full.setattr(owner, name, fail)
            full.setattr(sys, "argv", ["prepare_pretrain.py", "--config", str(path)])
            run_script(prepare_pretrain.main)
        assert "\nerror: the disk is full ([Errno 28] No space left on device). Free" in capsys.readouterr().err
    assert content(prepare(path, monkeypatch)) == whole


@pytest.mark.slow
def test_two_runs_cannot_work_in_the_same_folder(config, monkeypatch, tmp_path):
    path = config("out")
    holder = os.fork()
    if holder == 0:
        with lock(tmp_path / "out.partial" / "lock"):
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "out.partial" / "lock").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    with pytest.raises(UserError, match=r"another process is working in \S+out\.partial"):
        prepare(path, monkeypatch)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    prepare(path, monkeypatch)


@pytest.fixture
def grown(config, monkeypatch, tmp_path):
    """A folder made from two files, and the config that adds a third, of a known source, and a new source."""
    (tmp_path / "2.jsonl").rename(tmp_path / "later.jsonl")
    out = prepare(config("out"), monkeypatch)
    (tmp_path / "later.jsonl").rename(tmp_path / "2.jsonl")
    new = write_jsonl(tmp_path / "new.jsonl", texts(3))
    sources = [
        str(tmp_path / "0.jsonl"),
        {"name": "more", "path": str(tmp_path / "[12].jsonl"), "epochs": 3},
        str(new),
    ]
    return out, config("out", sources=sources)


@pytest.mark.slow
def test_an_append_leaves_existing_shards_unchanged(grown, monkeypatch, tmp_path, capsys):
    out, path = grown
    before, old = content(out), TokenShards(out / "train").manifest
    capsys.readouterr()
    with pytest.raises(UserError, match="out was made with other sources, inputs.*add them with `--append true`"):
        prepare(path, monkeypatch)
    prepare(path, monkeypatch, "--append", "true")
    after, new = content(out), verify_shards(out / "train")
    kept = [name for name in before if name.endswith((".ds", ".index", ".parquet"))]
    assert len(kept) > 9 and all(after[name] == before[name] for name in kept)
    assert new["shards"][: len(old["shards"])] == old["shards"]
    assert {shard["source"] for shard in new["shards"][len(old["shards"]) :]} == {"more", "new"}
    assert [Path(entry["file"]).name for entry in new["inputs"]] == ["0.jsonl", "1.jsonl", "2.jsonl", "new.jsonl"]
    assert [len(each["inputs"]) for each in new["generations"]] == [2, 2]
    assert [shard["file"] for shard in new["shards"]] == sum((each["shards"] for each in new["generations"]), [])
    assert {source["name"]: source["epochs"] for source in new["sources"]} == {"0": 1, "more": 3, "new": 1}
    counts = new["cleaning"]
    assert counts["more"]["read"] == 300 and counts["0"] == old["cleaning"]["0"]
    assert counts["more"]["dropped_duplicate"] == 30 and counts["new"]["dropped_duplicate"] == 15  # by the index
    assert after["eval.jsonl"].startswith(before["eval.jsonl"]) and len(after["eval.jsonl"]) > len(
        before["eval.jsonl"]
    )
    assert verify_shards(out / "eval")["documents"] == after["eval.jsonl"].count(b"\n")
    capsys.readouterr()
    prepare(path, monkeypatch, "--append", "true")
    prepare(path, monkeypatch)
    printed = capsys.readouterr().out
    assert "has all these input files already" in printed and "already made" in printed
    assert content(out) == after and not out.with_name("out.partial").exists()


@pytest.mark.slow
def test_a_killed_append_leaves_the_old_or_the_new_state(grown, monkeypatch, tmp_path):
    out, path = grown
    shutil.copytree(out, tmp_path / "copy")
    old = read_manifest(out / "train")
    prepare(path, monkeypatch, "--append", "true")
    whole = content(out)
    shutil.rmtree(out)
    (tmp_path / "copy").rename(out)
    replace, moved = Path.replace, []

    def fail(file: Path, target: Path) -> Path:
        if target.is_relative_to(out):
            moved.append(target)
            if len(moved) % 4 == 0:  # in the middle of moving everything to its place
                raise KeyboardInterrupt
        return replace(file, target)

    monkeypatch.setattr(Path, "replace", fail)
    interrupts = 0
    while True:
        try:
            prepare(path, monkeypatch, "--append", "true")
            break
        except KeyboardInterrupt:
            interrupts += 1
            assert verify_shards(out / "train") == old
    assert interrupts > 3 and content(out) == whole


@pytest.mark.slow
def test_an_interrupted_append_is_finished_first(grown, config, monkeypatch, tmp_path, capsys):
    out, path = grown
    replace, moved = Path.replace, []

    def fail(file: Path, target: Path) -> Path:
        moved.append(target) if target.is_relative_to(out) else None
        if len(moved) == 9:
            raise KeyboardInterrupt
        return replace(file, target)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Path, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(path, monkeypatch, "--append", "true")
    assert f"resumes from {out}.partial" in capsys.readouterr().err
    last = write_jsonl(tmp_path / "last.jsonl", [*texts(3), *texts(4)])
    prepare(config("out", sources=[str(last)]), monkeypatch, "--append", "true")
    assert "finished an interrupted append" in capsys.readouterr().out
    train, aside = verify_shards(out / "train"), verify_shards(out / "eval")
    assert [Path(each["inputs"][-1]["file"]).name for each in train["generations"]] == [
        "1.jsonl",
        "new.jsonl",
        "last.jsonl",
    ]
    assert train["cleaning"]["last"]["dropped_duplicate"] == 150 + 15
    assert train["documents"] + aside["documents"] == 5 * 150 - 4 * 15
    assert aside["documents"] == (out / "eval.jsonl").read_bytes().count(b"\n")


@pytest.mark.slow
def test_requests_of_sources_that_are_not_listed_again_are_kept(config, monkeypatch, tmp_path):
    """An append round may list new sources only: others keep their weight, and their epochs before `languages`."""
    paths = [str(tmp_path / f"{number}.jsonl") for number in range(3)]
    weighted = [{"name": name, "path": path, "weight": 2} for name, path in zip("abc", paths, strict=True)]
    out = prepare(config("out", sources=weighted[:2]), monkeypatch)
    prepare(config("out", sources=[weighted[2] | {"weight": 4}]), monkeypatch, "--append", "true")
    shares = {each["name"]: each["share"] for each in read_manifest(out / "train")["sources"]}
    assert shares == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5})
    new = write_jsonl(tmp_path / "new.jsonl", texts(5))
    with pytest.raises(UserError, match="sources: new have no weight, others have"):
        prepare(config("out", sources=[str(new)]), monkeypatch, "--append", "true")
    mixed = [weighted[0] | {"weight": 6}, {"name": "new", "path": str(new), "weight": 4}]  # a is there, new is not
    prepare(config("out", sources=mixed), monkeypatch, "--append", "true")
    shares = {each["name"]: each["share"] for each in read_manifest(out / "train")["sources"]}
    assert shares == pytest.approx({"a": 6 / 16, "b": 2 / 16, "c": 4 / 16, "new": 4 / 16})


@pytest.mark.slow
def test_a_ratio_of_languages_applies_to_all_rounds(config, monkeypatch, tmp_path):
    languages = {"zh": 3, "en": 1}
    sources = [
        {"name": n, "path": str(tmp_path / f"{n}.jsonl"), "language": "en" if n == "1" else "zh"} for n in "012"
    ]
    out = prepare(config("out", sources=sources[:2], languages=languages), monkeypatch)
    prepare(config("out", sources=sources[2:], languages=languages), monkeypatch, "--append", "true")
    whole = prepare(config("whole", sources=[sources[n] for n in (0, 1, 2)], languages=languages), monkeypatch)
    grown, made = (read_manifest(folder / "train")["sources"] for folder in (out, whole))
    assert [each["epochs"] for each in grown] == pytest.approx([each["epochs"] for each in made])
    assert max(each["epochs"] for each in grown) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ({"document_separator": "<|im_end|>"}, r"made with `document_separator: <\|endoftext\|>`, not <\|im_end\|>"),
        ({"clean": "text"}, "made with `clean: none`, not text"),
        ({"deduplicate": "none"}, "made with `deduplicate: exact`, not none"),
        (
            {"sources": [{"name": "0", "path": "0.jsonl", "clean": "text"}]},
            "source 0 was made with `clean: none`, not",
        ),
    ],
)
def test_an_append_with_other_settings_is_refused(change, message, grown, config, monkeypatch):
    before = content(grown[0])
    monkeypatch.chdir(grown[0].parent)
    with pytest.raises(UserError, match=message):
        prepare(config("out", **change), monkeypatch, "--append", "true")
    assert content(grown[0]) == before and not grown[0].with_name("out.partial").exists()


@pytest.mark.slow
def test_an_append_with_another_tokenizer_or_a_changed_file_is_refused(grown, config, monkeypatch, tmp_path):
    other = byte_tokenizer(tmp_path / "other", extra=1)
    with pytest.raises(
        UserError, match=r"other \(\w{12}\) is not the one that .*out/train was made with, .*tokenizer \(\w{12}\)"
    ):
        prepare(config("out", tokenizer=str(other)), monkeypatch, "--append", "true")
    write_jsonl(tmp_path / "0.jsonl", texts(7))
    with pytest.raises(UserError, match=r"0\.jsonl was changed since it was read into the shards"):
        prepare(config("out"), monkeypatch, "--append", "true")
    with pytest.raises(UserError, match=r"none/train is not a folder of token shards"):
        prepare(config("none"), monkeypatch, "--append", "true")
    assert not (tmp_path / "none.partial").exists()


def test_an_impossible_mixture_is_reported_before_any_work(config, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="`languages` asks for zh, and its language is not given"):
        prepare(config("out", languages={"zh": 1}), monkeypatch)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_folder_of_the_user_named_like_the_work_folder_is_left_alone(config, monkeypatch, tmp_path):
    notes = tmp_path / "out.partial" / "notes" / "a.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(UserError, match="out.partial exists and is no work folder of this script"):
        prepare(config("out"), monkeypatch)
    assert notes.read_text() == "mine"
