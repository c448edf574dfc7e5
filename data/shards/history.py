"""The shards and mixtures that a run has read so far, kept as `data_history` in its run card.

A run may be resumed after shards were appended or the mixture was changed. The current mixture epoch keeps the old
mixture; the new manifest applies from the next.
"""

import math
from itertools import zip_longest
from typing import Any

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_sha256
from buddygpt.data.shards.blocks import BlockDataset
from buddygpt.data.shards.format import MANIFEST
from buddygpt.data.shards.order import BlockOrder, Quota

SHARD_KEYS = ("file", "source", "tokens", "sha256")


def update_history(
    history: list[dict[str, Any]], blocks: BlockDataset, step: int, global_batch: int
) -> list[dict[str, Any]]:
    """Return the history with an entry for what has changed on disk; the same list if nothing has.

    Args:
        history: From the run card, as an earlier call returned it; empty for a new run.
        blocks: The data as it is now.
        step: Steps taken so far.
        global_batch: Blocks in a step.

    Returns:
        One entry per state of the data:

        - `step`: Steps taken when it was found.
        - `epoch`: The first mixture epoch that reads it.
        - `sources`: The [`Quota`] of each source, as a dictionary.
        - `spread_repeats`: The order of the run, see [`BlockOrder`]. Runs from before December 2026 lack it.
        - `manifest_sha256`
        - `shards`: `file`, `source`, `tokens` and `sha256` of each new shard.

    Raises:
        UserError: A shard that the run has read is missing, was changed, or is at another place in the list.
    """
    known = [shard for entry in history for shard in entry["shards"]]
    found = [{key: shard[key] for key in SHARD_KEYS} for shard in blocks.shards]
    _require_unchanged(known, found[: len(known)], blocks)
    sources = {name: quota._asdict() for name, quota in count_slots(blocks).items()}
    if history and len(found) == len(known) and sources == history[-1]["sources"]:
        return history

    # The current epoch keeps its mixture. Epochs never decrease, even if the last checkpoints are lost and the run
    # resumes before an earlier change.
    next_epoch = 0
    if history:
        epochs_read = make_order(history, blocks, seed=0).epoch(step * global_batch)
        next_epoch = max(math.ceil(epochs_read), history[-1]["epoch"])
    entry = {
        "step": step,
        "epoch": next_epoch,
        "sources": sources,
        "spread_repeats": _spreads_repeats(history),
        "manifest_sha256": file_sha256(blocks.folder / MANIFEST),
        "shards": found[len(known) :],
    }
    return [*history, entry]


def _require_unchanged(known: list[dict[str, Any]], found: list[dict[str, Any]], blocks: BlockDataset) -> None:
    for number, (before, now) in enumerate(zip_longest(known, found)):
        if before != now:
            raise UserError(
                f"cannot resume on {blocks.folder / MANIFEST}: shard {number} of the run was {_describe(before)}, "
                f"now it is {_describe(now)}. Data can only be added after the existing shards: restore the shard, or "
                "use another output_dir"
            )


def _describe(shard: dict[str, Any] | None) -> str:
    if shard is None:
        return "missing"
    return f"{shard['file']} of {shard.get('source')} (sha256 {shard['sha256'][:12]})"


def count_slots(blocks: BlockDataset) -> dict[str, Quota]:
    """Return the quota of each source: `epochs` x its blocks, but at least one slot for a source with blocks."""
    quotas = {}
    for source, ranges in blocks.blocks_of.items():
        count = sum(len(each) for each in ranges)
        slots = round(blocks.epochs[source] * count)
        if count:
            slots = max(slots, 1)
        quotas[source] = Quota(count, slots)
    return quotas


def make_order(history: list[dict[str, Any]], blocks: BlockDataset, seed: int) -> BlockOrder:
    """Return the order in which a run with this history reads its blocks.

    Args:
        history: As [`update_history`] returns it.
        blocks: The data that it describes.
        seed: Each seed gives another order.
    """
    mixtures = []
    for entry in history:
        quotas = {name: Quota(**quota) for name, quota in entry["sources"].items()}
        mixtures.append((entry["epoch"], quotas))
    return BlockOrder(blocks.blocks_of, mixtures, seed, _spreads_repeats(history))


def _spreads_repeats(history: list[dict[str, Any]]) -> bool:
    """Return the order of a run with this history; it never changes, so that a resumed run reads what it promised."""
    return history[0].get("spread_repeats", False) if history else True


def describe_mixture(history: list[dict[str, Any]], blocks: BlockDataset) -> str:
    """Return one line about the newest mixture and, if it replaced another, from which epoch it applies.

    Args:
        history: As [`update_history`] returns it.
        blocks: The data that it describes.
    """
    quotas = history[-1]["sources"]
    total = sum(quota["slots"] for quota in quotas.values())
    sources = []
    for name, quota in quotas.items():
        sources.append(f"{name} {quota['slots'] / total:.1%} ({blocks.epochs[name]:.4g} epochs)")
    line = f"Data: {total:,} blocks per epoch, {', '.join(sources)}"
    if len(history) > 1:
        line += f"; applies from epoch {history[-1]['epoch']}, found at step {history[-1]['step']}"
    return line
