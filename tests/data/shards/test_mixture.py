"""Every source is read as often as requested, block by block, also after appends and when a run resumes."""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice

import numpy as np
import pytest
from tiny_shards import Shard, write_shards

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.blocks import BlockDataset
from buddygpt.data.shards.format import TokenShards, verify_shards
from buddygpt.data.shards.history import count_slots, make_order, update_history
from buddygpt.data.shards.mixture import resolve_mixture
from buddygpt.data.shards.order import PARTS, BlockOrder, EpochOrder, Quota, Stages, permute

# --- from requests to epochs ---


def source(name: str, tokens: int, language: str | None = None, **request: float) -> dict:
    return {"name": name, "language": language, "tokens": tokens, "documents": 1, "text_bytes": 3 * tokens, **request}


ZH, EN, WIKI = source("zh", 600, "zh"), source("en", 600, "en"), source("wiki", 150, "zh", epochs=2)


@pytest.mark.parametrize(
    "sources, languages, epochs",
    [
        ([ZH, EN], None, [1, 1]),
        ([ZH, WIKI], None, [1, 2]),
        ([ZH, source("web", 100, epochs=0.5)], None, [1, 0.5]),
        ([ZH, EN], {"zh": 3, "en": 1}, [1, 1 / 3]),
        ([ZH, EN], {"zh": 1, "en": 4}, [1 / 4, 1]),
        ([ZH, WIKI, EN], {"zh": 3, "en": 1}, [1, 2, 0.5]),  # 900 Chinese tokens read, 300 English
        ([ZH, WIKI, EN], {"zh": 1, "en": 2}, [1 / 3, 2 / 3, 1]),
        ([source("a", 100, weight=3), source("b", 300, weight=1)], None, [1, 1 / 9]),
        ([source("a", 100, weight=10), source("b", 300, weight=30)], None, [1, 1]),
        # 3:1 by language, by weight within one: 450, 150 and 200 of each 800 tokens; `c` is repeated most
        (
            [source("a", 900, "zh", weight=3), source("b", 900, "zh", weight=1), source("c", 100, "en", weight=9)],
            {"zh": 3, "en": 1},
            [225 / 900, 75 / 900, 1],
        ),
    ],
)
def test_requests_become_epochs_and_shares(sources, languages, epochs):
    resolved = resolve_mixture(sources, languages)
    assert [each["epochs"] for each in resolved] == pytest.approx(epochs)
    read = [each["tokens"] * each["epochs"] for each in resolved]
    assert [each["share"] for each in resolved] == pytest.approx([amount / sum(read) for amount in read])
    assert [each["name"] for each in resolved] == [each["name"] for each in sources]
    assert set(resolved[0]) == {"name", "language", "tokens", "documents", "text_bytes", "epochs", "share"}
    for language, ratio in (languages or {}).items():
        share = sum(each["share"] for each in resolved if each["language"] == language)
        assert share == pytest.approx(ratio / sum(languages.values()))


@pytest.mark.parametrize(
    "sources, languages, message",
    [
        ([ZH, EN], {"zh": 3, "de": 1}, "source en: `languages` asks for zh, de, and its language is en"),
        ([ZH], {"zh": 3, "en": 1}, "no source has tokens in `en`"),
        ([ZH, source("en", 0, "en")], {"zh": 3, "en": 1}, "no source has tokens in `en`"),
        ([ZH, source("code", 5)], {"zh": 1}, "source code: .* its language is not given"),
        ([ZH, source("a", 5, weight=1), source("b", 5)], None, "sources: zh, b have no weight, others have"),
        ([source("a", 5, weight=1, epochs=2)], None, "source a: weight and epochs contradict each other"),
        ([source("a", 0, weight=1)], None, "source a has a weight and no tokens"),
        ([source("a", 5, weight=0)], None, "weight of a is 0; write a number above 0"),
        ([source("a", 5, epochs=-1)], None, "epochs of a is -1; write"),
        ([source("a", 5, epochs="two")], None, "epochs of a is two; write"),
        ([ZH, EN], {"zh": float("nan"), "en": 1}, "languages zh is nan; write"),
        ([ZH, EN], {"zh": True, "en": 1}, "languages zh is True; write"),
        ([source("a", 0)], None, "no source has any tokens"),
    ],
)
def test_impossible_requests_are_refused(sources, languages, message):
    with pytest.raises(UserError, match=message):
        resolve_mixture(sources, languages)


# --- permutations ---


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("size", [*range(1, 40), 97, 100, 256, 1000, 4097])
def test_every_epoch_reads_everything_once(size, halves):
    order = EpochOrder(size, seed=7, halves=halves)
    epochs = [[order.index(position) for position in range(e * size, (e + 1) * size)] for e in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 9 or len(set(map(tuple, epochs))) == 3


@pytest.mark.slow
def test_the_order_looks_random():
    firsts = Counter(EpochOrder(10, seed).index(0) for seed in range(5000))
    assert len(firsts) == 10 and set(firsts.values()) <= set(range(400, 600))
    orders = Counter(tuple(map(EpochOrder(4, seed).index, range(4))) for seed in range(4800))
    assert len(orders) == 24 and set(orders.values()) <= set(range(120, 280))
    mixed = BlockOrder({"a": [range(9000)], "b": [range(9000, 20_000)]}, [(0, stage(a=9000, b=11_000))], 3)
    for order in (EpochOrder(20_000, 3), EpochOrder(20_000, 3, halves=True), mixed):
        places = np.array([order.index(position) for position in range(20_000)])
        assert sorted(places) == list(range(20_000))
        assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.03
        assert abs(np.corrcoef(places, np.arange(20_000))[0, 1]) < 0.03


def test_a_size_changes_after_the_epochs_before():
    order, old = EpochOrder(10, 5, growth=[(2, 15), (2, 18), (4, 30)]), EpochOrder(10, 5)
    assert [order.index(p) for p in range(20)] == [old.index(p) for p in range(20)]
    third, fourth, fifth = range(20, 38), range(38, 56), range(56, 86)
    for epoch, size in ((third, 18), (fourth, 18), (fifth, 30)):
        assert sorted(map(order.index, epoch)) == list(range(size))
    assert [order.epoch(p) for p in (0, 5, 20, 29, 56, 71)] == [0, 0.5, 2, 2.5, 4, 4.5]
    stages = Stages()
    for epoch, size in ((0, 10), (2, 15), (2, 18), (4, 30)):
        stages.append(epoch, size)
    assert [stages.position(e) for e in (0, 0.5, 2, 2.5, 4, 4.5)] == [0, 5, 20, 29, 56, 71]


# --- mixture epochs ---


def stage(**sources: int | tuple[int, int]) -> dict[str, Quota]:
    """Quotas by source: (blocks, slots), or one number if both are equal."""
    return {name: Quota(*(each if isinstance(each, tuple) else (each, each))) for name, each in sources.items()}


class SlowOrder:
    """The definition of a mixture, without shortcuts: lists, and an iterator for each source."""

    def __init__(
        self,
        blocks: dict[str, list[range]],
        history: list[tuple[int, dict[str, Quota]]],
        seed: int,
        spread_repeats: bool = True,
    ) -> None:
        self.blocks = {name: [block for each in ranges for block in each] for name, ranges in blocks.items()}
        self.history, self.seed, self.spread_repeats, self.now = history, seed, spread_repeats, {}
        self.own = {name: self.read_source(name) for name in blocks}

    def shuffled(self, size: int, key: str) -> list[int]:
        return [permute(place, size, blake2b(key.encode()).digest()) for place in range(size)]

    def shuffled_source(self, size: int, name: str, epoch: int) -> list[int]:
        key = f"{self.seed} {name}"
        if not self.spread_repeats:
            return self.shuffled(size, f"{key} {epoch}")
        numbers, half = self.shuffled(size, f"{key} halves"), (size + 1) // 2
        first, second = numbers[:half], numbers[half:]
        first = [first[place] for place in self.shuffled(len(first), f"{key} {epoch} first")]
        return first + [second[place] for place in self.shuffled(len(second), f"{key} {epoch} second")]

    def read_source(self, name: str) -> Iterator[int]:
        epoch = 0
        while True:  # blocks that are appended during an epoch are read from the next one on
            order = self.shuffled_source(self.now[name].blocks, name, epoch)
            yield from [self.blocks[name][number] for number in order]
            epoch += 1

    def __iter__(self) -> Iterator[int]:
        epoch = 0
        while True:
            self.now = [shares for first, shares in self.history if first <= epoch][-1]
            parts = 1
            if self.spread_repeats:
                parts = PARTS * max(math.ceil(each.slots / each.blocks) for each in self.now.values() if each.blocks)
            for part in range(parts):
                slots = []
                for name, share in self.now.items():
                    count = (part + 1) * share.slots // parts - part * share.slots // parts
                    slots += islice(self.own[name], count)
                key = f"{self.seed} {epoch} {part}" if self.spread_repeats else f"{self.seed} {epoch}"
                yield from [slots[n] for n in self.shuffled(len(slots), key)]
            epoch += 1


def random_history(rng: random.Random) -> tuple[dict[str, list[range]], list[tuple[int, dict[str, Quota]]]]:
    """Sources that grow, join later and change their epochs."""
    blocks: dict[str, list[range]] = {}
    history, total, epoch = [], 0, 0
    for names in ("ab", "ab", "abc", "bca"):
        for name in rng.sample(names, rng.randint(1, len(names))):
            size = rng.randint(int(total == 0), 9)
            blocks.setdefault(name, []).append(range(total, total + size))
            total += size
        counts = {name: sum(map(len, ranges)) for name, ranges in blocks.items()}
        shares = {name: Quota(n, rng.randint(1, 2 * n) if n else 0) for name, n in counts.items()}
        history.append((epoch, shares))
        epoch += rng.randint(0, 3)
    return blocks, history


@pytest.mark.slow
@pytest.mark.parametrize("spread_repeats", [False, True])
def test_any_mixture_is_read_as_defined(spread_repeats):
    for seed in range(300):
        blocks, history = random_history(random.Random(seed))
        order = BlockOrder(blocks, history, seed, spread_repeats)
        expected = [*islice(SlowOrder(blocks, history, seed, spread_repeats), 200)]
        assert [order.index(position) for position in range(200)] == expected, seed
        for number in range(1, len(history)):  # a change does not affect the epochs before it
            epoch = history[number][0]
            before = BlockOrder(blocks, history[:number], seed, spread_repeats)
            unaffected = min(int(before.position(epoch)), 200)
            assert [before.index(position) for position in range(unaffected)] == expected[:unaffected]


def test_two_readings_of_a_block_are_far_apart():
    """At least one part of the mixture epoch lies between them, also across its end; it had been nothing."""
    rng = random.Random(0)
    for seed in range(60):
        quotas, blocks, total = {}, {}, 0
        for name in "abc"[: rng.randint(1, 3)]:
            size = rng.randint(1, 120)
            blocks[name] = [range(total, total + size)]
            quotas[name] = Quota(size, rng.randint(1, 3 * size))
            total += size
        order = BlockOrder(blocks, [(0, quotas)], seed)
        parts = PARTS * max(quota.repeats for quota in quotas.values())
        smallest_part = sum(quota.slots // parts for quota in quotas.values())
        last: dict[int, int] = {}
        for position in range(order.position(3)):
            block = order.index(position)
            assert position - last.get(block, -1_000_000) > smallest_part, (seed, position)
            last[block] = position


def test_a_run_that_began_with_the_old_order_keeps_it(tmp_path):
    shards = [Shard("0.ds", "zh", [160])]
    blocks = BlockDataset(write_shards(tmp_path, shards, zh=2), 16)
    history = update_history([], blocks, 0, 4)
    new = make_order(history, blocks, seed=3)
    del history[0]["spread_repeats"]  # as in run cards from before
    assert update_history(history, blocks, 3, 4) is history
    old = make_order(history, blocks, seed=3)
    expected = [*islice(SlowOrder(blocks.blocks_of, [(0, {"zh": Quota(10, 20)})], 3, spread_repeats=False), 40)]
    assert [old.index(position) for position in range(40)] == expected
    assert [new.index(position) for position in range(40)] != expected

    shards.append(Shard("1.ds", "zh", [160]))
    blocks = BlockDataset(write_shards(tmp_path, shards, zh=2), 16)
    history = update_history(history, blocks, 7, 4)
    assert len(history) == 2 and history[1]["spread_repeats"] is False
    assert [make_order(history, blocks, seed=3).index(position) for position in range(40)] == expected


def test_every_block_of_a_source_is_read_equally_often():
    blocks = {"zh": [range(10), range(30, 47)], "en": [range(10, 30)], "few": [range(47, 48)]}
    order = BlockOrder(blocks, [(0, stage(zh=(27, 54), en=(20, 9), few=(1, 3)))], seed=1)
    counts: Counter = Counter()
    for epoch in range(20):
        read = Counter(map(order.index, range(66 * epoch, 66 * (epoch + 1))))
        assert [read[block] for block in (*range(10), *range(30, 47))] == [2] * 27 and read[47] == 3
        assert sum(read[block] for block in range(10, 30)) == 9
        counts += read
        english = [counts[block] for block in range(10, 30)]
        assert max(english) - min(english) <= 1 and sum(english) == 9 * (epoch + 1)
    read = order.progress_by_source(20 * 66)
    assert read == {"zh": (40, 54 / 66), "en": (9, 9 / 66), "few": (60, 3 / 66)}


def test_positions_cost_the_same_wherever_they_are():
    sources = {"a": [range(10**9 * n, 10**9 * (n + 1)) for n in range(500)], "b": [range(5 * 10**11, 7 * 10**11)]}
    shares = stage(a=(5 * 10**11, 10**12), b=(2 * 10**11, 10**11))
    growth = [(e, shares) for e in (0, 1, 3)]

    def seconds(begin: int) -> float:
        order, start = BlockOrder(sources, growth, seed=1), time.process_time()
        assert all(0 <= order.index(position) < 7 * 10**11 for position in range(begin, begin + 1000))
        return time.process_time() - start

    costs = [(seconds(0), seconds(10**12 + 7), seconds(10**15)) for _ in range(4)]
    first, *others = map(min, zip(*costs, strict=True))
    assert max(others) < 1.5 * first + 0.01


# --- from shards ---


def source_of_each(blocks: BlockDataset) -> list[str]:
    """The source of the shard in which each block begins."""
    names = [shard["source"] for shard in blocks.shards for _ in range(shard["tokens"])]
    return [names[block * blocks.block_size] for block in range(len(blocks))]


def test_three_to_one_is_read_as_three_to_one(tmp_path):
    shards = [Shard(f"{name}{n}.ds", name, [50] * 20, name) for n in range(3) for name in ("zh", "en")]
    resolved = resolve_mixture([source("zh", 3000, "zh"), source("en", 3000, "en")], {"zh": 3, "en": 1})
    epochs = {each["name"]: each["epochs"] for each in resolved}
    blocks = BlockDataset(write_shards(tmp_path, shards, **epochs), 16)
    order, sources = make_order(update_history([], blocks, 0, 1), blocks, seed=3), source_of_each(blocks)
    size = order.position(1)
    for epoch in range(6):
        read = Counter(sources[order.index(position)] for position in range(size * epoch, size * (epoch + 1)))
        assert read["zh"] == sources.count("zh") and read["en"] == round(sources.count("en") / 3)
    counts = Counter(order.index(position) for position in range(6 * size))
    assert {counts[block] for block, name in enumerate(sources) if name == "zh"} == {6}
    assert {counts[block] for block, name in enumerate(sources) if name == "en"} <= {1, 2, 3}


def test_a_block_belongs_to_the_source_in_which_it_begins(tmp_path):
    """16 tokens per block: 2.5 blocks of zh, a shard in which none begins, over 2 blocks of en, zh again."""
    sizes = [("zh", 40), ("tiny", 5), ("en", 40), ("zh", 30)]
    shards = [Shard(f"{number}.ds", name, [size]) for number, (name, size) in enumerate(sizes)]
    blocks = BlockDataset(write_shards(tmp_path, shards, en=0.1, tiny=3), 16)
    assert {name: [*map(list, ranges)] for name, ranges in blocks.blocks_of.items()} == {
        "zh": [[0, 1, 2], [6]],
        "tiny": [[]],
        "en": [[3, 4, 5]],
    }
    assert source_of_each(blocks) == ["zh"] * 3 + ["en"] * 3 + ["zh"]
    # A source with blocks has at least one slot.
    assert count_slots(blocks) == {"zh": (4, 4), "tiny": (0, 0), "en": (3, 1)}
    order = make_order(update_history([], blocks, 0, 1), blocks, seed=3)
    assert sorted(Counter(map(order.index, range(15))).values()) == [1, 1, 1, 3, 3, 3, 3]


@pytest.mark.slow
def test_appended_shards_are_read_from_the_next_epoch(tmp_path):
    """Random appends and mixtures at random steps: the current epoch stays as it is, later ones have everything."""
    rng = random.Random(0)
    shards, history, orders, step = [], [], [], 0
    for append_round in range(8):
        for name in rng.sample(["zh", "en", "code"], rng.randint(1, 3)):
            shards.append(Shard(f"{append_round}{name}.ds", name, [rng.randint(1, 60) for _ in range(9)]))
        epochs = {name: rng.choice([0.3, 1, 2.5]) for name in ("zh", "en", "code")}
        blocks = BlockDataset(write_shards(tmp_path, shards, **epochs), 16)
        history = update_history(history, blocks, step, 4)
        order = make_order(history, blocks, seed=9)
        assert update_history(history, blocks, step + 1, 4) is history
        next_epoch = history[-1]["epoch"]
        assert (next_epoch - 1) < (orders[-1].epoch(4 * step) if orders else 0) <= next_epoch
        start = order.position(next_epoch)
        for before in orders[-1:]:
            assert [order.index(p) for p in range(start)] == [before.index(p) for p in range(start)]
        everything = {name: share["slots"] for name, share in history[-1]["sources"].items()}
        sources = source_of_each(blocks)
        stop = order.position(next_epoch + 1)
        assert Counter(sources[order.index(p)] for p in range(start, stop)) == everything
        assert history[-1]["sources"] == {name: share._asdict() for name, share in count_slots(blocks).items()}
        orders.append(order)
        step = rng.randint(start // 4 + 1, stop // 4 + 1)
    newest = Counter(orders[-1].index(p) for p in range(orders[-1].position(history[-1]["epoch"] + 40)))
    assert set(newest) == set(range(len(blocks)))


def test_going_back_before_a_change_keeps_it(tmp_path):
    """If the last checkpoints are lost and more data was appended, no change moves to an earlier epoch."""
    shards = [Shard("0.ds", "zh", [160])]
    blocks = BlockDataset(write_shards(tmp_path, shards), 16)
    history = update_history([], blocks, 0, 4)
    shards.append(Shard("1.ds", "zh", [160]))
    history = update_history(history, BlockDataset(write_shards(tmp_path, shards), 16), 9, 4)
    assert history[-1]["epoch"] == 4
    shards.append(Shard("2.ds", "zh", [160]))
    history = update_history(history, BlockDataset(write_shards(tmp_path, shards), 16), 2, 4)
    assert [entry["epoch"] for entry in history] == [0, 4, 4]


@pytest.mark.parametrize("key", ["tokens", "documents", "text_bytes"])
def test_a_manifest_with_a_changed_sum_is_refused(key, tmp_path):
    folder = write_shards(tmp_path, [Shard("0.ds", "zh", [40]), Shard("1.ds", "en", [40, 40])])
    manifest = json.loads((folder / "manifest.json").read_text())
    for part, name in ((manifest, "the manifest"), (manifest["sources"][1], "source en")):
        part[key] += 1
        (folder / "manifest.json").write_text(json.dumps(manifest))
        part[key] -= 1
        for read in (verify_shards, TokenShards):
            with pytest.raises(
                UserError, match=f"manifest.json was changed: {name} has {part[key] + 1} {key}, its shards"
            ):
                read(folder)


def test_verifying_finds_a_changed_separator_and_share(tmp_path):
    folder = write_shards(tmp_path, [Shard("0.ds", "zh", [40]), Shard("1.ds", "en", [40, 40])])
    verify_shards(folder)
    text = (folder / "manifest.json").read_text()
    for key, old, new, message in (
        ("eos_id", 0, 5, "2 of 2 shards are damaged: .*0.ds: its documents end with token 0, .* says `eos_id` 5; "),
        ("share", 1 / 3, 0.5, "source zh has share 0.5, but its epochs and tokens give 0.333333; correct it"),
        ("dtype", '"uint16"', '"uint32"', "0.ds holds 80 bytes, but manifest.json says 160"),
    ):
        changed = text.replace(f'"{key}": {old}', f'"{key}": {new}', 1)
        assert changed != text
        (folder / "manifest.json").write_text(changed)
        with pytest.raises(UserError, match=message):
            verify_shards(folder)


def test_a_source_without_a_description_is_refused(tmp_path):
    folder = write_shards(tmp_path, [Shard("0.ds", "zh", [40]), Shard("1.ds", "en", [40])])
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"name": "en"', '"name": "fr"'))
    with pytest.raises(UserError, match=r"`sources` lacks en, the source of 1\.ds"):
        BlockDataset(folder, 16)
    (folder / "manifest.json").write_text(manifest.replace('"epochs": 1.0', '"epochs": 0', 1))
    with pytest.raises(UserError, match="source zh has 0 epochs; write a number above 0"):
        BlockDataset(folder, 16)
