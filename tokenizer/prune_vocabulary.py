"""Cut a byte-level BPE vocabulary down to the entries that some text uses most.

What is left is consistent: the two entries that a kept one is merged from are kept too, all bytes and added tokens
stay, and entries keep their order. A text whose tokens were all kept is therefore tokenized as before, and any other
is cut into smaller entries: a token that goes becomes the two it was merged from.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from itertools import islice

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError
from buddygpt.tokenizer.byte_level_bpe import BYTES

Parents = dict[str, tuple[str, ...]]


def read_state(tokenizer: PreTrainedTokenizerBase, name: str) -> dict:
    """Return what tokenizer.json holds; UserError where that is no byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    model = state["model"]
    if model["type"] != "BPE":
        raise UserError(f"prune_from: {name} is {model['type']}; only byte-level BPE can be cut")
    missing = sum(char not in model["vocab"] for char in BYTES.values())
    if missing:
        raise UserError(f"prune_from: {name} is BPE, but not byte-level: {missing} of 256 bytes have no entry")
    return state


def split_by_hash(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the texts to count, and about a twentieth of them to judge by: copies are on one side."""
    sides: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        sides[sha256(text.encode()).digest()[0] < 256 // 20].append(text)
    return sides


def fixed_entries(state: dict) -> set[str]:
    """Return the bytes and the added tokens, which always stay."""
    return set(BYTES.values()) | {token["content"] for token in state["added_tokens"]}


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str], batch: int = 256) -> Counter[int]:
    """Return how often each id occurs in the texts."""
    counts: Counter[int] = Counter()
    texts = iter(texts)
    while some := list(islice(texts, batch)):
        for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False):
            counts.update(encoding.ids)
    return counts


def find_parents(entry: str, ranks: dict[tuple[str, str], int]) -> tuple[str, ...]:
    """Return the two entries of the last merge that makes this one, or none where no merge does.

    Inside a text the same merges make it: until it is whole, none reaches across its ends.
    """
    parts: list[str] = list(entry)
    last: tuple[str, ...] = ()
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:], strict=False))
        rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairs))
        if rank == len(ranks):
            return ()
        last = pairs[at]
        parts[at : at + 2] = ["".join(last)]
    return last


def with_ancestors(entries: Iterable[str], ranks: dict[tuple[str, str], int], fixed: set[str]) -> Parents:
    """Return the parents of the entries, of their parents, and so on; a fixed entry needs none."""
    parents: Parents = {}
    waiting = list(entries)
    while waiting:
        entry = waiting.pop()
        if entry not in parents:
            parents[entry] = () if entry in fixed else find_parents(entry, ranks)
            waiting += parents[entry]
    return parents


def choose_entries(state: dict, counts: Counter[int], size: int) -> set[str]:
    """Return the at most `size` entries to keep: all that are used, less the least used, one after the other.

    Only an entry that no other is merged from can go: leaf-based pruning (Purason et al., 2025), but with the counts
    kept up to date. Each time the entry occurred, its two parents occur instead.
    """
    vocab, fixed = state["model"]["vocab"], fixed_entries(state)
    ranks = {tuple(pair): rank for rank, pair in enumerate(state["model"]["merges"])}
    used = Counter({entry: counts[i] for entry, i in vocab.items() if counts[i]})
    parents = with_ancestors(used, ranks, fixed)
    children = Counter(parent for pair in parents.values() for parent in pair)
    kept = fixed | set(parents)
    leaves = [(used[entry], -vocab[entry], entry) for entry in kept - fixed if not children[entry]]
    heapq.heapify(leaves)
    while len(kept) > size:
        count, _, entry = heapq.heappop(leaves)
        kept.remove(entry)
        for parent in parents[entry]:
            used[parent] += count
            children[parent] -= 1
            if not children[parent] and parent not in fixed:
                heapq.heappush(leaves, (used[parent], -vocab[parent], parent))
    return kept


def rebuild(state: dict, kept: set[str]) -> tuple[Tokenizer, list[int]]:
    """Return the tokenizer of the kept entries, renumbered in their order, and the former id of each."""
    model = state["model"]
    old = {**model["vocab"], **{token["content"]: token["id"] for token in state["added_tokens"]}}
    order = sorted(kept, key=old.__getitem__)
    new = {entry: i for i, entry in enumerate(order)}
    model["vocab"] = {entry: new[entry] for entry in order if entry in model["vocab"]}
    model["merges"] = [[a, b] for a, b in model["merges"] if {a, b, a + b} <= kept]
    for token in state["added_tokens"]:
        token["id"] = new[token["content"]]
    for processor in _processors(state["post_processor"]):
        for token in processor.get("special_tokens", {}).values():
            token["ids"] = [new[content] for content in token["tokens"]]
    return Tokenizer.from_str(json.dumps(state)), [old[entry] for entry in order]


def _processors(processor: dict | None) -> list[dict]:
    """Return the post-processors that one is made of."""
    if processor is None:
        return []
    return [processor, *(part for each in processor.get("processors", []) for part in _processors(each))]
