"""Is data the same whoever prepares it, however often that is killed, and does what is added leave the rest alone?"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dill
import pyarrow.parquet as pq
import pytest
from datatrove.pipeline.dedup import MinhashDedupBuckets
from test_pretrain_data import byte_tokenizer, documents, write_jsonl
from transformers import AutoTokenizer

from buddygpt.data import finish_shards, prepare_pretrain, stages, write_shards
from buddygpt.data.deduplication import DuplicateClusters, DuplicateSignature
from buddygpt.data.finish_shards import Publisher
from buddygpt.data.stages import lock
from buddygpt.data.token_shards import TokenShards, documents_file, read_manifest, verify_shards
from buddygpt.data.write_shards import DocumentTable, HoldOut
from buddygpt.launch import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare_pretrain.py"
COMMON = {"eval_fraction": 0.1, "deduplicate": "exact", "shard_bytes": 20_000, "batch_chars": 2_000}
HANZI = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def texts(part: int, count: int = 150) -> list[str]:
    """Different texts; every tenth is in all parts."""
    return [f"{0 if i % 10 == 0 else part}之{i}：" + HANZI[i % 40 :] * (1 + i % 7) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes") / "tokenizer")


@pytest.fixture
def config(tmp_path, tokenizer_folder):
    """Write a config for two sources of three files; return it with `changes`."""
    for part in range(3):
        write_jsonl(tmp_path / f"{part}.jsonl", texts(part))

    def write(output: str, **changes) -> Path:
        sources = [str(tmp_path / "0.jsonl"), {"name": "more", "path": str(tmp_path / "[12].jsonl"), "epochs": 2}]
        values = {"sources": sources, "tokenizer": str(tokenizer_folder), "output": str(tmp_path / output)}
        path = tmp_path / f"{output}.yaml"
        path.write_text(json.dumps(COMMON | values | changes))
        return path

    return write


def prepare(config: Path, monkeypatch, *arguments: object) -> Path:
    """Run the script in this process; return what it made."""
    monkeypatch.setattr(sys, "argv", ["prepare_pretrain.py", "--config", *map(str, [config, *arguments])])
    prepare_pretrain.main()
    return config.with_suffix("")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_table_beside_a_shard_names_its_documents_in_its_order(config, monkeypatch, tokenizer_folder, tmp_path):
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


def test_a_document_with_an_exam_question_is_dropped_and_shown(config, monkeypatch, tmp_path):
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


KILLS = [  # when the n-th call of a function begins, stage by stage
    (stages, "write_document", 40),
    (DuplicateSignature, "get_signature", 200),
    (MinhashDedupBuckets, "run", 1),
    (DuplicateClusters, "run", 1),
    (HoldOut, "run", 2),
    (DocumentTable, "add", 50),
    (write_shards, "reorder_documents", 2),
    (DocumentTable, "write", 3),
    (write_shards, "file_sha256", 4),
    (finish_shards, "achieve_mixture", 2),
    (finish_shards, "write_report", 1),
    (Publisher, "run", 1),
    (shutil, "rmtree", 1),
]


def is_killed(config: Path, owner: object, name: str, calls: int) -> bool:
    """Run the script in a process of its own that is killed at such a call; return whether it came to that."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    function, count = getattr(owner, name), itertools.count(1)

    def kill(*args: object, **kwargs: object) -> object:
        if next(count) == calls:
            os.killpg(0, signal.SIGKILL)
        return function(*args, **kwargs)

    with contextlib.suppress(BaseException):
        os.setsid()
        setattr(owner, name, kill)
        sys.argv = ["prepare_pretrain.py", "--config", str(config)]
        prepare_pretrain.main()
    os._exit(0)


def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(config, monkeypatch, tmp_path):
    whole = content(prepare(config("whole"), monkeypatch))
    path = config("killed")
    for owner, name, calls in KILLS:
        assert is_killed(path, owner, name, calls), name
        assert (tmp_path / "killed").exists() == (name == "rmtree")
    prepare(path, monkeypatch)
    assert content(tmp_path / "killed") == whole
    assert not (tmp_path / "killed.partial").exists()


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


def test_two_runs_do_not_work_on_the_same_data(config, monkeypatch, tmp_path):
    path = config("out")
    holder = os.fork()
    if holder == 0:
        with lock(tmp_path / "out.partial" / "lock"):
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "out.partial" / "lock").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    with pytest.raises(UserError, match=r"out\.partial is being worked on by another process"):
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


def test_what_is_added_leaves_the_rest_alone(grown, monkeypatch, tmp_path, capsys):
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
    assert [len(generation["inputs"]) for generation in new["generations"]] == [2, 2]
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
    said = capsys.readouterr().out
    assert "holds all these input files already" in said and "already made" in said
    assert content(out) == after and not out.with_name("out.partial").exists()


def test_adding_that_is_killed_leaves_what_was_or_what_shall_be(grown, monkeypatch, tmp_path):
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
def test_what_is_of_another_kind_is_not_added(change, message, grown, config, monkeypatch):
    before = content(grown[0])
    monkeypatch.chdir(grown[0].parent)
    with pytest.raises(UserError, match=message):
        prepare(config("out", **change), monkeypatch, "--append", "true")
    assert content(grown[0]) == before and not grown[0].with_name("out.partial").exists()


def test_neither_another_tokenizer_nor_a_changed_file_is_added(grown, config, monkeypatch, tmp_path):
    other = byte_tokenizer(tmp_path / "other", extra=1)
    with pytest.raises(
        UserError, match=r"other \(\w{12}\) is not the one that .*out/train was made with, .*tokenizer \(\w{12}\)"
    ):
        prepare(config("out", tokenizer=str(other)), monkeypatch, "--append", "true")
    write_jsonl(tmp_path / "0.jsonl", texts(7))
    with pytest.raises(UserError, match=r"0\.jsonl was changed since it was read into the shards"):
        prepare(config("out"), monkeypatch, "--append", "true")
    with pytest.raises(UserError, match=r"none/train is no folder of token shards"):
        prepare(config("none"), monkeypatch, "--append", "true")
    assert not (tmp_path / "none.partial").exists()


def test_an_impossible_mixture_is_told_before_any_work(config, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="`languages` asks for zh, and its language is not given"):
        prepare(config("out", languages={"zh": 1}), monkeypatch)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def run_on_slurm(scripts: list[Path], monkeypatch) -> None:
    """Do what the cluster would: every job of an array by itself."""
    for script in scripts:
        text = script.read_text()
        last = int(re.search(r"--array=0-(\d+)", text)[1])
        for index in range(last + 1):
            with monkeypatch.context() as job:
                job.setenv("SLURM_ARRAY_TASK_ID", str(index))
                job.setenv("SLURM_NODELIST", "here")
                with open(re.search(r"launch_pickled_pipeline (\S+)", text)[1], "rb") as file:
                    dill.load(file).run()


def write_command(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_slurm_gets_chained_jobs_that_make_the_same(config, monkeypatch, tmp_path, capsys):
    whole = content(prepare(config("whole"), monkeypatch))
    path = config("out", executor="slurm", workers=2, slurm={"partition": "cpu", "time": "4:00:00", "qos": None})
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with pytest.raises(UserError, match="there is no `sbatch` here: run the same command on a machine of the cluster"):
        prepare(path, monkeypatch)
    scripts = [Path(line.split(": ")[0]) for line in capsys.readouterr().out.splitlines() if ".slurm" in line]
    assert [script.parent.name for script in scripts][:2] == ["clean", "signatures"]
    assert all("#SBATCH --partition=cpu" in script.read_text() for script in scripts)
    write_command(tmp_path / "bin" / "scontrol", "echo here")
    write_command(tmp_path / "bin" / "sbatch", "exit 1")
    with pytest.raises(UserError, match=r"sbatch refused .*clean/launch_script\.slurm; mend `slurm`"):
        prepare(path, monkeypatch)
    calls = tmp_path / "calls"
    write_command(tmp_path / "bin" / "sbatch", f'echo "$@" >> {calls}; echo Submitted batch job $(wc -l < {calls})')
    prepare(path, monkeypatch)
    for number, call in enumerate(calls.read_text().splitlines()):
        assert (f"--dependency=afterok:{number}" in call) == (number > 0)
    assert number + 1 == len(scripts)
    run_on_slurm(scripts, monkeypatch)
    assert content(tmp_path / "out") == whole
    prepare(path, monkeypatch)
    assert "already made" in capsys.readouterr().out and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "slurm, message",
    [
        (None, "`slurm` needs at least a partition and a time in quotes"),
        ({"partition": "cpu", "time": 14400}, "a time in quotes"),
        ({"partition": "cpu", "time": "4:00:00", "memory": 3}, "`slurm`: .*memory"),
    ],
)
def test_mistakes_in_the_slurm_settings_are_named(slurm, message, config, monkeypatch):
    with pytest.raises(UserError, match=message):
        prepare(config("out", executor="slurm", slurm=slurm), monkeypatch)


def test_ray_makes_the_same(config, monkeypatch, tmp_path):
    ray = pytest.importorskip("ray")
    settings = {"deduplicate": "none", "eval_fraction": 0, "tasks": 2}
    whole = content(prepare(config("whole", **settings), monkeypatch))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        assert content(prepare(config("out", executor="ray", workers=2, **settings), monkeypatch)) == whole
        (tmp_path / "1.jsonl").write_text("3\n")
        with pytest.raises(UserError, match=r"1\.jsonl:1: the row is no object but int"):
            prepare(config("bad", executor="ray", workers=2, **settings), monkeypatch)
    finally:
        ray.shutdown()
