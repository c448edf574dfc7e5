"""A stopped run ends exactly like an uninterrupted one: block order, checkpoints, kill -9, appended data."""

import json
import os
import pickle
import random
import shutil
import signal
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import run
from safetensors.torch import load_file
from tiny_shards import Shard, write_shards
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemWriter
from torch.utils.data import BatchSampler
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.blocks import BlockDataset, BlockStream
from buddygpt.data.shards.format import tokenizer_fingerprint
from buddygpt.data.shards.history import make_order
from buddygpt.data.shards.order import BlockOrder, Quota
from buddygpt.model.presets import PRESETS, load_config
from buddygpt.pretrain.stream_trainer import PositionSampler
from buddygpt.training.pickles import require_plain_metadata
from buddygpt.training.resume import _saved_state, find_damage, last_checkpoint
from buddygpt.training.saving import claim_folder, write_checksums

VOCABULARY = 64
BLOCK = 32


# --- the order; tests/data/shards/test_mixture.py tests the mixture of sources ---


@pytest.mark.parametrize("processes, batch, accumulation", [(1, 8, 1), (1, 2, 4), (2, 2, 2), (4, 1, 2), (8, 1, 1)])
def test_a_global_batch_is_the_same_however_it_is_split(processes, batch, accumulation):
    """The batches that accelerate gives each process, from step 5 on, across the end of an epoch."""
    shares = {"a": Quota(9, 9), "b": Quota(12, 6)}
    order, steps = BlockOrder({"a": [range(9)], "b": [range(9, 21)]}, [(0, shares)], seed=0), range(5, 9)
    parts = []
    for process in range(processes):
        sampler = BatchSampler(PositionSampler(8 * 8, lambda: 5 * 8), batch, drop_last=False)
        parts.append([*BatchSamplerShard(sampler, processes, process)] if processes > 1 else [*sampler])
    micro = [[order.index(position) for part in parts for position in part[m]] for m in range(len(parts[0]))]
    read = [sum(micro[m : m + accumulation], []) for m in range(0, len(micro), accumulation)]
    assert read == [order.which_blocks(step + 1, 8) for step in steps][:3] and len(read) == 3


# --- tiny data, tiny runs ---


def write_tiny(folder: Path, sizes: dict[str, int], tokenizer: PreTrainedTokenizerFast, **epochs: float) -> None:
    """Write shards of one document each; the first letter of a shard is its source."""
    shards = [Shard(name, name[0], [size]) for name, size in sizes.items()]
    write_shards(folder, shards, tokenizer_fingerprint(tokenizer), **epochs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tokenizer, shards of 40 + 2 blocks, 8 held-out blocks, and a dense and an MoE model, both with dropout."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {"<|endoftext|>": 0, "<|pad|>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w2")), **special)
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    write_tiny(folder / "train", {"a.ds": 40 * BLOCK, "b.ds": 2 * BLOCK + 5}, tokenizer)
    write_tiny(folder / "eval", {"e.ds": 8 * BLOCK}, tokenizer)
    for name in ("debug", "debug-mla-moe"):
        load_config(name, attention_dropout=0.1).to_json_file(folder / f"{name}.json", use_diff=False)
    options = {
        "train_data": folder / "train", "eval_data": folder / "eval", "tokenizer": folder / "tokenizer",
        "model_config": folder / "debug.json", "block_size": BLOCK, "max_steps": 12, "learning_rate": 4.0e-3,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 4, "save_steps": 3, "use_cpu": "true", "bf16": "false",
    }  # fmt: skip
    (folder / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in options.items()))
    return folder


def arguments(tiny: Path, output: Path, **changes: object) -> list[str]:
    options = {"config": tiny / "config.yaml", "output_dir": output, **changes}
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def steps_of(folder: Path) -> list[int]:
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return [
        row["step"] for row in json.loads((last / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]


@pytest.fixture(scope="module")
def whole(tiny) -> Path:
    run("pretrain/pretrain.py", *arguments(tiny, tiny / "whole"))
    return tiny / "whole"


@pytest.fixture
def blocks_read(monkeypatch) -> list[int]:
    """The blocks that training reads, in order."""
    read, item = [], BlockStream.__getitem__

    def spy(stream: BlockStream, position: int):
        read.append(stream.order.index(position))
        return item(stream, position)

    monkeypatch.setattr(BlockStream, "__getitem__", spy)
    return read


# --- killed ---


def pretrain_in_child(words: list[str], environment: dict[str, str], death: tuple[str, int] | None, log: Path) -> None:
    """One process of a run, which sends itself SIGKILL inside the n-th call of a function."""
    log_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if death is not None:
        die_in(*death)
    run("pretrain/pretrain.py", *words)


def die_in(moment: str, call: int) -> None:
    owner, name = {
        "step": (Trainer, "training_step"),
        "evaluation": (Trainer, "prediction_step"),
        "write": (torch, "save"),
        "rename": (Path, "rename"),
    }[moment]
    function, calls = getattr(owner, name), Counter()

    def deadly(*args, **kwargs):
        calls[name] += 1
        if calls[name] < call:
            return function(*args, **kwargs)
        if moment == "write":  # half a file
            Path(args[1]).write_bytes(b"PK\x03\x04 half of it")
        elif moment == "step":
            function(*args, **kwargs)  # the gradient of one micro-batch of two
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)


@pytest.fixture(scope="module")
def forks():
    """Starts processes that have everything imported."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["buddygpt.training.run", "buddygpt.data.shards.blocks", "deepspeed"])
    return context


def launch(forks, words: list[str], log: Path, processes: int = 1, death=None, patience: float | None = None) -> list:
    """Run to the end, until the last process dies, or for `patience` seconds; then kill all processes."""
    ranks = [{"OMP_NUM_THREADS": "1"} for _ in range(processes)]
    if processes > 1:
        port = str(random.randint(20_000, 40_000))
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
        ranks = [{**rank, **shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r, rank in enumerate(ranks)]
    deaths = [None] * (processes - 1) + [death]
    targets = [(words, rank, mine, log) for rank, mine in zip(ranks, deaths, strict=True)]
    children = [forks.Process(target=pretrain_in_child, args=target, daemon=True) for target in targets]
    for child in children:
        child.start()
    children[-1].join(patience if patience is not None else 120)
    if death or patience is not None:
        for child in children:
            child.kill()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


MOMENTS = {1: [("step", 8), ("write", 2), ("evaluation", 1), ("rename", 1)], 2: [("step", 8), ("write", 2)]}


def check_folder(output: Path) -> None:
    """Check that every `checkpoint-N` is complete."""
    assert [find_damage(folder) for folder in output.glob("checkpoint-*")].count(None) == len(
        list(output.glob("checkpoint-*"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("model, processes", [("debug-mla-moe", 1), ("debug", 2)])
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tiny, tmp_path, forks, blocks_read, model, processes):
    """SIGKILL in a step, in an evaluation, while a checkpoint is written or renamed, and at a random moment."""
    log = tmp_path / "log"
    options = {"model_config": tiny / f"{model}.json", "per_device_train_batch_size": 4 // processes}
    begun = time.monotonic()
    expected = launch(forks, arguments(tiny, tmp_path / "whole", **options), log, processes)
    assert expected == [0] * processes, log.read_text()[-3000:]
    duration = time.monotonic() - begun

    command = arguments(tiny, tmp_path / "killed", **options)
    for death in MOMENTS[processes]:
        codes = launch(forks, command, log, processes, death)
        assert codes[-1] == -signal.SIGKILL, (death, log.read_text()[-3000:])
        check_folder(tmp_path / "killed")
    launch(forks, command, log, processes, patience=random.uniform(0.2, duration))
    check_folder(tmp_path / "killed")
    assert launch(forks, command, log, processes) == [0] * processes, log.read_text()[-3000:]

    assert_same(tmp_path / "killed", tmp_path / "whole")
    assert steps_of(tmp_path / "killed") == list(range(1, 13))
    assert json.loads((tmp_path / "killed/run.json").read_text())["world_size"] == processes
    biases = [tensor for name, tensor in weights(tmp_path / "whole").items() if "correction_bias" in name]
    assert ("moe" not in model) or biases[0].abs().max() > 0
    assert not list((tmp_path / "killed").glob("*.partial"))
    if processes == 2:  # one process continues with the same global batches
        delete_checkpoint(tmp_path / "killed/checkpoint-12")
        run("pretrain/pretrain.py", *command, "--per_device_train_batch_size", 4)
        history = json.loads((tmp_path / "killed/run.json").read_text())["data_history"]
        order = make_order(history, BlockDataset(tiny / "train", BLOCK), seed=42)
        assert blocks_read == sum((order.which_blocks(step, 8) for step in (10, 11, 12)), [])


def hold(folder: Path) -> None:
    with claim_folder(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_two_runs_do_not_share_a_folder(tiny, tmp_path, forks):
    """As after a launcher was killed but its processes were not."""
    child = forks.Process(target=hold, args=(tmp_path,), daemon=True)
    child.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"is in use: process {child.pid} is training there. Stop it"):
        run("pretrain/pretrain.py", *arguments(tiny, tmp_path))
    child.kill()
    child.join()
    claim_folder(tmp_path).close()


# --- checkpoints ---


def delete_checkpoint(link: Path) -> None:
    """Delete a checkpoint of a finished run, which was set aside."""
    shutil.rmtree(link.resolve())
    link.unlink()


def damage(folder: Path, how: str) -> None:
    file = folder / "optimizer.pt"
    if how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "a bit flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    else:
        (folder / "checksums.json").write_text('{"optimizer.pt"')


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "a bit flipped", "missing", "no checksums"])
def test_a_damaged_checkpoint_is_named_and_skipped(whole, tmp_path, capsys, how):
    shutil.copytree(whole, tmp_path / "run")
    model = AutoModelForCausalLM.from_config(load_config(str(PRESETS["debug"]), vocab_size=VOCABULARY))
    assert last_checkpoint(tmp_path / "run", model) == str(tmp_path / "run/checkpoint-12")
    damage(tmp_path / "run/checkpoint-12", how)
    assert last_checkpoint(tmp_path / "run", model) == str(tmp_path / "run/checkpoint-9")
    told = capsys.readouterr().out.splitlines()
    skipped = f"warning: skipped {tmp_path / 'run/checkpoint-12'}, which is damaged"
    assert len(told) == 1 and told[0].startswith(skipped)
    assert ("checksums.json" if how == "no checksums" else "optimizer.pt") in told[0]


@pytest.mark.slow
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(tiny, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run/checkpoint-12", "a bit flipped")
    command = arguments(tiny, tmp_path / "run", save_total_limit=2)
    with pytest.raises(UserError, match="checkpoint-12: optimizer.pt was changed"):
        run("pretrain/pretrain.py", *command, "--resume_from_checkpoint", tmp_path / "run/checkpoint-12")
    run("pretrain/pretrain.py", *command)
    assert_same(tmp_path / "run", whole)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]
    check_folder(tmp_path / "run")


@pytest.mark.slow
def test_a_full_disk_leaves_earlier_checkpoints_intact(tiny, whole, tmp_path, monkeypatch):
    save, calls = torch.save, Counter()

    def full(content, path, *args, **kwargs):
        calls["save"] += 1
        if calls["save"] == 7:  # of the second checkpoint
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "run"))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-3"]
    run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "run"))
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_named(tiny, tmp_path):
    best = {"load_best_model_at_end": "true", "metric_for_best_model": "loss", "save_total_limit": 2}
    steps = {"eval_steps": 2, "save_steps": 2, "max_steps": 8, "learning_rate": 0.05}
    run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "run", **best, **steps))
    assert len([*(tmp_path / "run").glob("checkpoint-*")]) == 2
    state = json.loads((tmp_path / "run/checkpoint-8/trainer_state.json").read_text())
    losses = {row["eval_loss"]: row["step"] for row in state["log_history"] if "eval_loss" in row}
    assert state["best_model_checkpoint"] == str(tmp_path / f"run/checkpoint-{losses[min(losses)]}")
    check_folder(tmp_path / "run")


# The tokens are random, so the held-out loss rises at this learning rate: the first evaluation is the best one.
BEST = {"load_best_model_at_end": "true", "metric_for_best_model": "loss", "greater_is_better": "false",
        "save_total_limit": 2, "eval_steps": 2, "save_steps": 2, "learning_rate": 0.003}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", "copied"])
def test_the_best_checkpoint_of_a_moved_run_is_kept_and_its_scores_are_reported(tiny, tmp_path, how):
    run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "run", **BEST, max_steps=4))
    (shutil.move if how == "moved" else shutil.copytree)(tmp_path / "run", tmp_path / "other")
    run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "other", **BEST, max_steps=8))

    names = {path.name for path in (tmp_path / "other").glob("checkpoint-*")}
    state = json.loads((tmp_path / "other/checkpoint-8/trainer_state.json").read_text())
    losses = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    assert min(losses, key=losses.get) == 2 and names == {"checkpoint-2", "checkpoint-8"}
    card = json.loads((tmp_path / "other/run.json").read_text())
    assert (card["weights_of_step"], card["steps"]) == (2, 8)
    assert card["metrics"]["eval_loss"] == losses[2] and card["metrics"]["step"] == 2
    assert_same(tmp_path / "other", tmp_path / "other/checkpoint-2")


@pytest.mark.slow
def test_a_best_checkpoint_that_was_deleted_is_replaced_by_the_next_best(tiny, tmp_path, capsys):
    command = arguments(tiny, tmp_path / "run", **BEST)
    run("pretrain/pretrain.py", *command, "--max_steps", "4")
    state = json.loads((tmp_path / "run/checkpoint-4/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "run/checkpoint-2")
    delete_checkpoint(tmp_path / "run/checkpoint-2")
    run("pretrain/pretrain.py", *command, "--max_steps", "8")
    assert "the best checkpoint, " in capsys.readouterr().err
    card = json.loads((tmp_path / "run/run.json").read_text())
    assert card["weights_of_step"] == card["metrics"]["step"] == 6
    assert_same(tmp_path / "run", tmp_path / "run/checkpoint-6")


@pytest.mark.parametrize(
    "option, message",
    [
        ({"enable_jit_checkpoint": "true"}, "enable_jit_checkpoint: a run stopped by SIGTERM would look finished"),
        ({"save_total_limit": 1}, "save_total_limit is 1: if the only checkpoint is damaged, there is none"),
        ({"z_loss_coef": -1}, "z_loss_coef is -1.0; use 0"),
    ],
)
def test_unsafe_options_are_refused(tiny, tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "run", **option))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_finished_run_takes_no_further_step(tiny, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "run"))
    assert "missing keys" not in caplog.text  # the tied output head is saved once, as the embedding
    assert_same(tmp_path / "run", whole)
    assert steps_of(tmp_path / "run") == list(range(1, 13))


def test_another_global_batch_is_refused_with_the_remedy(tiny, whole):
    command = arguments(tiny, whole, per_device_train_batch_size=3)
    with pytest.raises(UserError, match=r"global_batch was 4, this run's is 6. Choose per_device.* = 4, or set"):
        run("pretrain/pretrain.py", *command)
    with pytest.raises(UserError, match="data_seed was 42, this run's is 43"):
        run("pretrain/pretrain.py", *arguments(tiny, whole, data_seed=43))


@pytest.mark.slow
def test_the_requested_z_loss_is_used(tiny, tmp_path):
    run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "run", max_steps=1, eval_strategy="no", z_loss_coef=0.01))
    assert json.loads((tmp_path / "run/config.json").read_text())["z_loss_coef"] == 0.01


@pytest.mark.slow
def test_a_checkpoint_without_what_a_resume_needs_is_refused(tiny, tmp_path):
    run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "run", max_steps=3, save_only_model="true"))
    more = arguments(tiny, tmp_path / "run", max_steps=6)
    with pytest.raises(
        UserError, match=r"checkpoint-3: it holds no optimizer and schedule, as save_only_model writes"
    ):
        run("pretrain/pretrain.py", *more)
    weights_before = weights(tmp_path / "run/checkpoint-3")
    for files, state in [
        (["optimizer.pt"], None),  # without schedule
        (["optimizer.pt", "scheduler.pt"], "plain or data-parallel training"),
        (["optimizer.bin", "scheduler.pt"], "FSDP"),
        (["latest", "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "ZeRO-1 or ZeRO-2 on 1 process"),
        (["latest", "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt",
          "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt",
          "global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt"], "ZeRO-3 on 2 processes"),
    ]:  # fmt: skip
        folder = tmp_path / "other/checkpoint-3"
        shutil.copytree(tmp_path / "run/checkpoint-3", folder)
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("global_step3")
        assert _saved_state(folder) == state
        write_checksums(folder)
        if state != "plain or data-parallel training":
            message = f"is for {state}, this run is plain or data-parallel training" if state else "holds no optimizer"
            with pytest.raises(UserError, match=message):
                fresh = arguments(tiny, tmp_path / "fresh", max_steps=6, resume_from_checkpoint=folder)
                run("pretrain/pretrain.py", *fresh)
        shutil.rmtree(tmp_path / "other")
    assert weights_before.keys() == weights(tmp_path / "run/checkpoint-3").keys()


def test_a_missing_or_broken_checkpoint_is_told(tiny, whole, tmp_path):
    with pytest.raises(UserError, match=f"resume_from_checkpoint: there is no folder {tmp_path}/none"):
        run("pretrain/pretrain.py", *arguments(tiny, whole, resume_from_checkpoint=tmp_path / "none"))
    other = arguments(tiny, tmp_path / "run", resume_from_checkpoint=whole / "checkpoint-6")
    with pytest.raises(UserError, match=r"cannot resume from .*checkpoint-6: tensor"):
        run("pretrain/pretrain.py", *other, "--model_config", tiny / "debug-mla-moe.json")
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy/run.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot resume: .*copy/run.json is damaged or of another form"):
        run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "copy"))


# --- pickles ---


class Crafted:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def resume_crafted(tiny: Path, whole: Path, folder: Path, name: str, content: object) -> str:
    """Resume from a checkpoint whose file `name` was replaced, with correct checksums; return the error."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoint-12", "checkpoint-9", "checkpoint-3"))
    target = folder / "checkpoint-6" / name
    target.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
    elif name.endswith(".metadata"):
        target.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, target)
    write_checksums(folder / "checkpoint-6")
    try:
        run("pretrain/pretrain.py", *arguments(tiny, folder, max_steps=7, eval_strategy="no", save_strategy="no"))
    except UserError as error:
        return str(error)
    return "resumed"


PICKLES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model_fsdp_0/.metadata")


@pytest.mark.slow
def test_no_pickle_of_a_checkpoint_runs_code(tiny, whole, tmp_path):
    for number, name in enumerate(PICKLES):
        executed = tmp_path / f"executed-{number}"
        for content in (Crafted(executed), {"state": Crafted(executed)}):
            outcome = resume_crafted(tiny, whole, tmp_path / "run", name, content)
            shutil.rmtree(tmp_path / "run")
            assert not executed.exists(), name
            if name == "training_args.bin":  # it is not needed, so it is not loaded
                assert outcome == "resumed"
            else:
                assert outcome.startswith(f"cannot load {tmp_path / 'run/checkpoint-6'}: a file in it holds"), name


@pytest.mark.slow
def test_a_pickle_of_other_content_is_told_in_one_line(tiny, whole, tmp_path):
    for name, content in [
        ("optimizer.pt", {"a": 1}),
        ("rng_state.pth", {}),
        ("scheduler.pt", b"text\n"),
        ("optimizer.pt", b""),
    ]:
        outcome = resume_crafted(tiny, whole, tmp_path / "run", name, content)
        shutil.rmtree(tmp_path / "run")
        assert outcome.startswith("cannot load ") and "\n" not in outcome, name


def test_metadata_of_distributed_checkpoints_is_read(tmp_path):
    state = {"weight": torch.ones(2, 3), "step": 3}
    distributed_checkpoint.save(state, storage_writer=FileSystemWriter(tmp_path / "optimizer_0"), no_dist=True)
    require_plain_metadata(tmp_path)


# --- data ---


@pytest.mark.slow
def test_epochs_are_those_of_the_data(tiny, tmp_path, blocks_read):
    """42 blocks, 4 per step: two epochs take 21 steps, and the first ends within step 11."""
    epochs = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"}
    run("pretrain/pretrain.py", *arguments(tiny, tmp_path / "run", **epochs))
    assert sorted(blocks_read[:42]) == sorted(blocks_read[42:]) == list(range(42))
    history = json.loads((tmp_path / "run/checkpoint-21/trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "eval_loss" in row] == [11, 21]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-11", "checkpoint-21"}
    assert [row["epoch"] for row in history if "loss" in row] == [step * 4 / 42 for step in range(1, 22)]


@pytest.mark.slow
def test_appended_data_and_another_mixture_apply_from_the_next_epoch(tiny, tmp_path, blocks_read, capsys):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny / "tokenizer")
    sizes = {"a.ds": 4 * BLOCK, "b.ds": 6 * BLOCK}
    write_tiny(tmp_path / "train", sizes, tokenizer)
    command = arguments(tiny, tmp_path / "run", train_data=tmp_path / "train", save_steps=4, eval_strategy="no")
    run("pretrain/pretrain.py", *command, "--max_steps", "4")  # 16 blocks: within the second epoch
    grown = sizes | {"a2.ds": 1 * BLOCK, "c.ds": 4 * BLOCK}
    write_tiny(tmp_path / "train", grown, tokenizer)
    run("pretrain/pretrain.py", *command, "--max_steps", "9")  # 36 blocks: 10 + 10 of the old, 15 of all, one more
    assert sorted(blocks_read[:10]) == sorted(blocks_read[10:20]) == list(range(10))
    assert sorted(blocks_read[20:35]) == list(range(15)) and len(blocks_read) == 36
    write_tiny(tmp_path / "train", grown, tokenizer, a=2, b=0.5)
    capsys.readouterr()
    run("pretrain/pretrain.py", *command, "--max_steps", "17")  # to the end of the epoch of 15, then 17 and one more
    mixture = "a 58.8% (2 epochs), b 17.6% (0.5 epochs), c 23.5% (1 epochs)"
    assert f"Data: 17 blocks per epoch, {mixture}; applies from epoch 4" in capsys.readouterr().out
    assert sorted(blocks_read[35:50]) == list(range(15)) and len(blocks_read) == 68
    counts = Counter(blocks_read[50:67])
    assert [counts[block] for block in (*range(4), 10)] == [2] * 5  # a and a2
    assert sum(counts[block] for block in range(4, 10)) == 3 == len(set(counts) & set(range(4, 10)))
    assert [counts[block] for block in range(11, 15)] == [1] * 4

    card = json.loads((tmp_path / "run/run.json").read_text())
    first, second, third = card["data_history"]
    assert [[entry[key] for key in ("step", "epoch")] for entry in (first, second, third)] == [[0, 0], [4, 2], [9, 4]]
    assert second["sources"]["a"] == {"blocks": 5, "slots": 5} and third["sources"]["b"] == {"blocks": 6, "slots": 3}
    assert [shard["file"] for shard in second["shards"]] == ["a2.ds", "c.ds"] and third["shards"] == []
    assert card["tokens_seen"] == 68 * BLOCK
    assert card["metrics"]["epochs/b"] == pytest.approx(4.5 + 3 / 17 / 6)
    assert card["metrics"]["share/c"] == pytest.approx((4 + 4 + 4 + 4 / 17) / 68)

    continued = list(blocks_read)
    blocks_read.clear()
    for step in (8, 9, 12, 16, 17):
        delete_checkpoint(tmp_path / f"run/checkpoint-{step}")
    run("pretrain/pretrain.py", *command, "--max_steps", "17")  # from step 4 again: the history is known by now
    assert blocks_read == continued[16:]

    for changed in ({"a.ds": 4 * BLOCK + 1}, {"b.ds": 6 * BLOCK, "a.ds": 4 * BLOCK}, {"a.ds": 4 * BLOCK}):
        write_tiny(tmp_path / "train", changed, tokenizer)
        with pytest.raises(UserError, match="shard [01] of the run was [ab].ds of [ab] .sha256 .*Data can only be"):
            run("pretrain/pretrain.py", *command, "--max_steps", "17")


def test_a_shard_changed_on_disk_is_found_by_verify_data(tiny, tmp_path):
    shutil.copytree(tiny / "train", tmp_path / "train")
    tokens = np.fromfile(tmp_path / "train/a.ds", "<u2")
    tokens[5] ^= 1
    tokens.tofile(tmp_path / "train/a.ds")
    with pytest.raises(UserError, match="a.ds was changed"):
        run(
            "pretrain/pretrain.py",
            *arguments(tiny, tmp_path / "run", train_data=tmp_path / "train", verify_data="true"),
        )
