"""Speed is measured correctly, alarms name the step that went wrong, and steps can be traced and replayed."""

import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run
from tiny_models import VARIANTS, make_model
from tiny_shards import Shard, write_shards
from transformers import Trainer, TrainingArguments

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError
from buddygpt.data.shards.blocks import BlockDataset
from buddygpt.data.shards.format import TokenShards
from buddygpt.data.shards.history import make_order, update_history
from buddygpt.data.shards.order import BlockOrder
from buddygpt.data.shards.trace import Passage, describe_blocks, trace_block
from buddygpt.model.presets import load_config
from buddygpt.training.callbacks.alarms import AlarmCallback
from buddygpt.training.callbacks.curve import PAUSE, CurveCallback
from buddygpt.training.callbacks.experts import ExpertLoadCallback
from buddygpt.training.callbacks.progress import describe_log
from buddygpt.training.callbacks.throughput import ThroughputCallback
from buddygpt.training.flops import flops_per_token
from buddygpt.training.run import recipe_defaults

# ----------------------------------------------------------------------------------------------- shards and a trainer


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> BlockDataset:
    """40 blocks of 32 tokens in two shards of documents of 10 and of 25 tokens."""
    shards = [Shard("a.ds", "zh", [10] * 64), Shard("b.ds", "en", [25] * 26)]
    return BlockDataset(write_shards(tmp_path_factory.mktemp("shards"), shards), block_size=32)


def order_of(blocks: BlockDataset) -> BlockOrder:
    return make_order(update_history([], blocks, 0, 1), blocks, seed=1)


def test_a_block_is_traced_to_its_documents(blocks):
    rows = tuple({"id": f"zh.jsonl:{n + 1}", "chars": 10, "score": n / 8} for n in range(3, 7))
    assert list(trace_block(blocks, 1)) == [Passage("a.ds", "zh", 3, 6, (8, 10, 10, 4), rows)]
    assert describe_blocks(blocks, [0, 1, 20]) == (
        "a.ds (zh): block 0 = documents 0-3, zh.jsonl:1 to zh.jsonl:4, "
        "block 1 = documents 3-6, zh.jsonl:4 to zh.jsonl:7; "
        "b.ds (en): block 20 = documents 0-1, en.jsonl:1 to en.jsonl:2"
    )
    for index in range(len(blocks)):  # compare the passages with the tokens
        separators = int((blocks[index]["input_ids"] == 0).sum())
        passages = list(trace_block(blocks, index))
        ended = sum(each.last - each.first for each in passages) + (blocks[index]["input_ids"][-1] == 0)
        assert ended + len(passages) - 1 == separators
        assert sum(sum(each.tokens) for each in passages) == 32
        for each in passages:
            numbers = [int(row["id"].split(":")[1]) - 1 for row in each.documents]
            assert numbers == list(range(each.first, each.last + 1))


def test_of_many_blocks_only_the_first_are_named(blocks):
    line = describe_blocks(blocks, list(range(20)))
    assert line.count("block ") == 8 and line.endswith("and 12 more blocks") and "\n" not in line


class InOrder(torch.utils.data.Sampler):
    def __init__(self, order: BlockOrder, rows: int):
        self.order, self.rows = order, rows

    def __iter__(self):
        return map(self.order.index, range(self.rows))

    def __len__(self):
        return self.rows


def train_watched(folder, dataset, steps: int, prepare=None, variant="gqa", **arguments) -> tuple[Trainer, list[str]]:
    """Train a tiny model with our callbacks; return the trainer and its warnings."""
    model = make_model(**VARIANTS[variant] | dict(vocab_size=64, tie_word_embeddings=False))
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_nan_inf_filter=False,
        **dict(learning_rate=1e-3, logging_steps=5, lr_scheduler_type="constant") | arguments,
    )
    held_out = torch.utils.data.Subset(dataset, [0])
    trainer = Trainer(model=model, args=args, train_dataset=dataset, eval_dataset=held_out)
    if prepare:
        prepare(trainer)
    order, rows = order_of(dataset), 2 * args.gradient_accumulation_steps
    trainer._get_train_sampler = lambda *_: InOrder(order, steps * rows)
    card: dict = {}
    load = ExpertLoadCallback(trainer) if "moe" in variant else None
    alarms = AlarmCallback(trainer, card, load, lambda step: describe_blocks(dataset, order.which_blocks(step, rows)))
    callbacks = [load, ThroughputCallback(trainer, card), alarms]
    trainer.callback_handler.callbacks[:0] = [each for each in callbacks if each is not None]
    trainer.train()
    return trainer, [row["warning"] for row in trainer.state.log_history if "warning" in row]


# ----------------------------------------------------------------------------------------------------------- alarms


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_healthy_run_gives_no_warning(tmp_path, blocks, accumulate, capsys):
    trainer, warnings = train_watched(tmp_path, blocks, 60, gradient_accumulation_steps=accumulate)
    assert warnings == [] and "warning" not in capsys.readouterr().err
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and 0 <= row["data_wait"] < 1 for row in logged)
    assert logged[-1]["eta_seconds"] == 0 and "mfu" not in logged[-1]  # the peak of a CPU is unknown


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nan_is_traced_to_the_block_that_caused_it(tmp_path, blocks, accumulate, capsys):
    poison, order = 37, order_of(blocks)
    dataset = Poisoned(blocks.folder, 32, poison)

    def make_token_63_nan(trainer):
        trainer.model.get_input_embeddings().weight.data[63] = math.nan

    _, warnings = train_watched(tmp_path, dataset, 20, make_token_63_nan, gradient_accumulation_steps=accumulate)
    rows = 2 * accumulate
    step = next(step for step in range(1, 21) if poison in order.which_blocks(step, rows))
    assert len(warnings) == 1 and warnings[0].startswith(f"step {step}: the loss is nan")
    assert f"block {poison} = documents" in warnings[0]
    named = [int(number) for number in re.findall(r"block (\d+)", warnings[0])]
    assert sorted(named) == sorted(order.which_blocks(step, rows))
    assert capsys.readouterr().err.count("warning: step") == 1
    assert json.loads((tmp_path / "run.json").read_text())["warnings"] == warnings


class Poisoned(BlockDataset):
    """Blocks with token 63 in one of them only."""

    def __init__(self, folder, block_size, poisoned: int):
        super().__init__(folder, block_size)
        self.poisoned = poisoned

    def __getitem__(self, index):
        block = super().__getitem__(index)
        block["input_ids"][block["input_ids"] == 63] = 62
        if index == self.poisoned:
            block["input_ids"][5] = 63
        return block


@pytest.mark.slow
def test_an_infinite_gradient_is_reported_at_its_step(tmp_path, blocks):
    def overflow(trainer):
        original = trainer._get_grad_norm
        trainer._get_grad_norm = lambda *args, **kwargs: (
            torch.tensor(math.inf) if trainer.state.global_step == 7 else original(*args, **kwargs)
        )

    _, warnings = train_watched(tmp_path, blocks, 20, overflow)
    assert len(warnings) == 1 and re.match(r"step 8: the loss is \d.*, the gradient norm inf", warnings[0])


@pytest.mark.slow
def test_steps_without_loss_and_gradient_are_reported_once(tmp_path, blocks):
    def nothing_counts(trainer):
        original = trainer.training_step

        def training_step(model, inputs, *args, **kwargs):
            loss = original(model, inputs, *args, **kwargs)
            if not 8 <= trainer.state.global_step < 12:
                return loss
            model.zero_grad()  # as TRL does with a batch whose labels are all -100
            return loss * 0

        trainer.training_step = training_step

    _, warnings = train_watched(tmp_path, blocks, 20, nothing_counts)
    assert len(warnings) == 1 and warnings[0].startswith(
        "step 9: the loss and the gradient norm are 0: no token counts"
    )


@pytest.mark.slow
def test_a_spike_is_reported_once_at_its_step(tmp_path, blocks):
    def spike(trainer):
        original, extra = trainer.training_step, {50: 6.0, 51: 6.0, 58: 6.0}  # two steps in a row are one spike
        trainer.training_step = lambda *args, **kwargs: (
            original(*args, **kwargs) + extra.get(trainer.state.global_step, 0)
        )

    _, warnings = train_watched(tmp_path, blocks, 64, spike, logging_steps=7)
    assert [warning.split(":")[0] for warning in warnings] == ["step 51", "step 59"]
    read = order_of(blocks).which_blocks(51, 2)
    assert "loss spike" in warnings[0] and all(f"block {index} =" in warnings[0] for index in read)


@pytest.mark.slow
def test_a_loss_near_zero_may_multiply(tmp_path, blocks):
    def learned_by_heart(trainer):
        original, losses = trainer.training_step, {40: 0.06, 48: 0.12, 56: 0.5}
        trainer.training_step = lambda *args, **kwargs: (
            original(*args, **kwargs) * 0 + losses.get(trainer.state.global_step, 0.004)
        )

    _, warnings = train_watched(tmp_path, blocks, 64, learned_by_heart)
    assert [warning.split(":")[0] for warning in warnings] == ["step 57"]


@pytest.fixture
def clock(monkeypatch):
    """A clock for ThroughputCallback that only `clock.sleep` moves, so that the load of the machine has no effect."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr("buddygpt.training.callbacks.throughput.time", clock)
    return clock


@pytest.mark.slow
def test_a_slow_loader_is_reported(tmp_path, blocks, clock):
    class Slow(BlockDataset):
        def __getitem__(self, index):
            clock.sleep(0.05)
            return super().__getitem__(index)

    trainer, warnings = train_watched(tmp_path, Slow(blocks.folder, 32), 12, logging_steps=2)
    assert len(warnings) == 1 and "waiting for data" in warnings[0]
    logged = [row["data_wait"] for row in trainer.state.log_history if "loss" in row]
    assert statistics.median(logged) > 0.5


@pytest.mark.slow
def test_an_expert_without_tokens_is_named(tmp_path, blocks):
    def shut_out(trainer):
        routers = [module for module in trainer.model.modules() if hasattr(module, "e_score_correction_bias")]
        routers[1].e_score_correction_bias[3] = -100.0

    _, warnings = train_watched(tmp_path, blocks, 45, shut_out, variant="gqa-moe", logging_steps=15)
    assert len(warnings) == 1 and "no token reached expert 3 of MoE layer 1 in steps 1 to 15" in warnings[0]


# ------------------------------------------------------------------------------------------------------------ speed


@pytest.mark.slow
def test_speed_counts_real_tokens_and_no_pauses(tmp_path, blocks, clock):
    """Half of every row is padding, a step takes 50 ms and an evaluation one second."""

    class HalfPadded(BlockDataset):
        def __getitem__(self, index):
            mask = (torch.arange(32) < 16).long()
            return super().__getitem__(index) | {"attention_mask": mask}

    def slow_down(trainer):
        step, evaluate = trainer.training_step, trainer.evaluate
        trainer.training_step = lambda *args, **kwargs: (clock.sleep(0.05), step(*args, **kwargs))[1]
        trainer.evaluate = lambda *args, **kwargs: (clock.sleep(1), evaluate(*args, **kwargs))[1]

    dataset = HalfPadded(blocks.folder, 32)
    trainer, _ = train_watched(tmp_path, dataset, 8, slow_down, logging_steps=4, eval_strategy="steps", eval_steps=2)
    for row in (row for row in trainer.state.log_history if "loss" in row):
        assert row["tokens_per_second"] == pytest.approx(2 * 16 / 0.05)


@pytest.mark.slow
def test_mfu_is_work_over_time_over_peak(tmp_path, blocks, monkeypatch):
    monkeypatch.setattr("buddygpt.training.callbacks.throughput.find_peak", lambda trainer: 1e9)
    trainer, _ = train_watched(tmp_path, blocks, 10)
    for row in (row for row in trainer.state.log_history if "loss" in row):
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops_per_token(trainer.model.config, 32) / 1e9)


def test_the_curve_is_drawn_at_the_end_and_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("buddygpt.training.callbacks.curve.time.monotonic", lambda: now[0])
    args, curve, path = SimpleNamespace(output_dir=str(tmp_path)), CurveCallback(), tmp_path / "loss_curve.png"
    state = SimpleNamespace(is_world_process_zero=True, log_history=[{"step": 1, "eval_loss": 2.0}])

    def drawn_after(event: str, seconds: float) -> bool:
        now[0] += seconds
        path.unlink(missing_ok=True)
        getattr(curve, event)(args, state, None)
        return path.exists()

    assert not drawn_after("on_evaluate", PAUSE / 2) and drawn_after("on_evaluate", PAUSE / 2)
    assert not drawn_after("on_evaluate", 1) and drawn_after("on_train_end", 1)
    assert drawn_after("on_evaluate", 1), "an evaluation after the last step is part of the curve"
    state.is_world_process_zero = False
    assert not drawn_after("on_train_end", PAUSE)


def test_progress_lines_are_short():
    logs = {"loss": 3.21, "bits_per_byte": 1.1, "learning_rate": 4e-4, "tokens_per_second": 512_345.0, "mfu": 0.4321}
    logs |= {"grad_norm": 0.5, "data_wait": 0.001, "eta_seconds": 3725.4, "epoch": 0.1, "num_input_tokens_seen": 9}
    assert describe_log(logs, 20, 600) == (
        "step 20/600  loss 3.2100  bits/byte 1.1000  grad 0.50  lr 4.00e-04  512k tokens/s  MFU 43.2%  "
        "data wait 0.1%  ETA 1:02:05"
    )
    held_out = {"eval_zh_loss": 3.0, "eval_zh_bits_per_byte": 1.0, "eval_zh_runtime": 1.0}
    assert describe_log(held_out, 20, 600) == "step 20/600  eval zh  loss 3.0000  bits/byte 1.0000"
    assert describe_log({"train_runtime": 1.0, "train_loss": 2.0}, 20, 600) is None


# ------------------------------------------------------------------------------------------------- the recipe itself


@pytest.fixture(scope="module")
def run_of_two_sources(workspace, tmp_path_factory) -> Path:
    """A run of 8 steps on shards of a Chinese and an English file, a checkpoint every 4 steps."""
    folder = tmp_path_factory.mktemp("two_sources")
    rows = (workspace / "sample" / "pretrain.jsonl").read_text("utf-8").splitlines()
    for name, ascii_only in (("zh", False), ("en", True)):
        kept = [row for row in rows if json.loads(row)["text"].isascii() is ascii_only]
        (folder / f"{name}.jsonl").write_text("\n".join(kept), encoding="utf-8")
    sources = ["--sources", folder / "zh.jsonl", folder / "en.jsonl", "--output", folder / "shards"]
    run("data/prepare_pretrain.py", *sources, "--tokenizer", workspace / "tokenizer", "--eval_fraction", 0.1)
    pretrain(folder, workspace, "--logging_steps", 1, "--save_steps", 4, "--eval_steps", 4)
    return folder


def pretrain(folder: Path, workspace: Path, *arguments: object) -> None:
    data = ["--train_data", folder / "shards/train", "--eval_data", folder / "shards/eval"]
    steps = ["--tokenizer", workspace / "tokenizer", "--output_dir", folder / "run", "--max_steps", 8]
    run("pretrain/pretrain.py", "--config", "pretrain/configs/debug.yaml", *data, *steps, *arguments)


@pytest.mark.slow
def test_held_out_text_is_measured_by_source(run_of_two_sources):
    metrics = json.loads((run_of_two_sources / "run" / "run.json").read_text())["metrics"]
    shards = TokenShards(run_of_two_sources / "shards" / "eval")
    assert set(shards.sources) == {"en", "zh"} and sum(shards.sources.values()) == shards.tokens
    blocks = {source: tokens // 64 for source, tokens in shards.sources.items()}
    whole = sum(metrics[f"eval_{source}_loss"] * count for source, count in blocks.items()) / sum(blocks.values())
    assert metrics["eval_loss"] == pytest.approx(whole)
    for source in blocks:
        part = TokenShards(shards.folder, source)
        bits = metrics[f"eval_{source}_loss"] * part.tokens / part.text_bytes / math.log(2)
        assert metrics[f"eval_{source}_bits_per_byte"] == pytest.approx(bits)
    samples = (run_of_two_sources / "run" / "samples.md").read_text("utf-8")
    assert samples.count("## step 4\n") == 1  # once, not once per source
    assert "广东省的省会是" in samples and "The capital of France is" in samples


def test_the_run_card_says_how_fast_and_how_large(run_of_two_sources):
    card = json.loads((run_of_two_sources / "run" / "run.json").read_text())
    assert card["warnings"] == [] and card["throughput"]["median_tokens_per_second"] > 0
    config = load_config("debug", vocab_size=card["model_config"]["vocab_size"])
    assert card["throughput"]["flops_per_token"] == flops_per_token(config, 64)
    assert 2e8 < card["throughput"]["peak_process_memory_bytes"] < 1e11
    embedding = config.vocab_size * config.hidden_size
    assert card["parameters"] - card["non_embedding_parameters"] == embedding
    assert card["active_parameters"] == card["parameters"]


@pytest.mark.parametrize("step, weights", [(1, 0), (3, 0), (5, 4)])
def test_a_replay_shows_the_step_as_it_was(run_of_two_sources, workspace, capsys, step, weights):
    output = run_of_two_sources / "run"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    pretrain(run_of_two_sources, workspace, "--replay-step", step)
    printed = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    found = re.search(r"step (\d+) on the weights after step (\d+): loss (\S+), gradient norm (\S+)", printed)
    assert (int(found[1]), int(found[2])) == (step, weights)
    state = json.loads((output / "checkpoint-8" / "trainer_state.json").read_text())
    logged = next(row for row in state["log_history"] if row["step"] == step and "loss" in row)
    if step == weights + 1:  # the step had the same weights
        assert float(found[3]) == pytest.approx(logged["loss"], abs=1e-3)
        assert float(found[4]) == pytest.approx(logged["grad_norm"], abs=1e-3)
    rows = re.findall(
        r"^loss (\S+)  \S+ \((?:zh|en)\): block (\d+) = documents \d+-\d+, \S+:\d+", printed, re.MULTILINE
    )
    losses = [float(loss) for loss, _ in rows]
    assert len(rows) == 4 and losses == sorted(losses, reverse=True)
    assert statistics.mean(losses) == pytest.approx(float(found[3]), abs=1e-3)


def test_a_missing_step_cannot_be_replayed(run_of_two_sources, workspace, tmp_path):
    with pytest.raises(UserError, match="replay_step is 9, the run's steps are 1 to 8"):
        pretrain(run_of_two_sources, workspace, "--replay-step", 9)
    with pytest.raises(UserError, match=r"holds no run\.json"):
        pretrain(run_of_two_sources, workspace, "--replay-step", 3, "--output_dir", tmp_path)


@pytest.mark.parametrize(
    "installed, words, expected",
    [
        (False, [], []),
        (True, [], ["trackio"]),
        (True, ["--report_to", "none"], []),
        (False, ["--report_to", "tensorboard"], ["tensorboard"]),
    ],
)
def test_trackio_is_the_default_if_it_is_installed(monkeypatch, tmp_path, installed, words, expected):
    monkeypatch.setattr("buddygpt.training.run.find_spec", lambda name: installed or None)
    monkeypatch.setattr("sys.argv", ["script.py", "--output_dir", str(tmp_path), *words])
    (args,) = parse_arguments(TrainingArguments, defaults=recipe_defaults())
    assert args.report_to == expected and not args.logging_nan_inf_filter


@pytest.mark.slow
def test_recipes_use_these_defaults(base, chat_model):
    for folder in (base, chat_model):
        assert not json.loads((folder / "run.json").read_text())["training_arguments"]["logging_nan_inf_filter"]
