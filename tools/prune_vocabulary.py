"""Prune a byte-level BPE vocabulary to the entries that some text uses most.

    python tools/prune_vocabulary.py --tokenizer QWEN --files corpus/*.jsonl --vocab_size 32768 --output OUT

The result is consistent: a kept entry also keeps the two entries it is merged from, all bytes and added tokens stay,
and entries keep their order. So a text whose tokens are all kept is tokenized as before. In other texts, each removed
entry splits into the two it was merged from. A twentieth of the text is held out to measure the cost.

OUT is a tokenizer folder with the template, special tokens and normalizer of the original. Its `old_ids.json` lists
the old id of each new id, for pruning a model's embedding: tokenizer/README.md shows how.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from buddygpt.cli.arguments import parse_arguments, require_count
from buddygpt.cli.checkpoints import load_tokenizer, save_tokenizer
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import write_atomically
from buddygpt.tokenizer.byte_level_bpe import BYTE_CHARACTERS
from buddygpt.tokenizer.train_tokenizer import CHAT_TEMPLATE, check_output, read_all_texts

HELD_OUT = 20  # one text in this many measures the cost of pruning
BATCH_SIZE = 256  # texts encoded at once


@dataclass
class PruneArguments:
    """Which tokenizer to prune, for which text, to which size."""

    tokenizer: str = field(metadata={"help": "Folder of a byte-level BPE tokenizer."})
    files: list[str] = field(metadata={"help": "Files or globs: .jsonl, .json, .parquet, .csv, .txt, also .gz."})
    output: str = field(metadata={"help": "Tokenizer folder to write."})
    vocab_size: int = field(default=16384, metadata={"help": "Entries, including 256 bytes and the special tokens."})
    text_column: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns that may hold the text; the first found counts."}
    )
    max_bytes: int = field(
        default=50_000_000,
        metadata={"help": "Read at most this much text; each file contributes its share of the bytes on disk."},
    )

    def __post_init__(self) -> None:
        for key in ("vocab_size", "max_bytes"):
            require_count(key, getattr(self, key))


def main() -> None:
    (args,) = parse_arguments(PruneArguments, description=__doc__)
    output = Path(args.output)

    # Check everything that can be checked before reading gigabytes of text.
    source = load_tokenizer(args.tokenizer)
    state = read_state(source, args.tokenizer)
    n_fixed = len(fixed_entries(state))
    if args.vocab_size < n_fixed:
        raise UserError(
            f"vocab_size {args.vocab_size} is too small: bytes and special tokens already take {n_fixed} entries"
        )
    check_output(output)
    used, held_out = split_by_hash(read_all_texts(args.files, args.text_column, args.max_bytes))

    before = source.backend_tokenizer
    kept = choose_entries(state, count_tokens(before, used), args.vocab_size)
    after, old_ids = remove_entries(state, kept)
    save(after, old_ids, source, output)

    print(f"{output}: {len(old_ids):,} of {len(source):,} entries")
    if len(old_ids) < args.vocab_size:
        print(f"warning: `vocab_size` is {args.vocab_size}, but the text uses no more entries")
    if held_out:
        print_cost(before, after, held_out)


def read_state(tokenizer: PreTrainedTokenizerBase, name: str) -> dict:
    """Return the content of tokenizer.json; UserError if `name` is not a byte-level BPE tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"tokenizer: {name} is {type(tokenizer).__name__}; only byte-level BPE can be pruned")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise UserError(f"tokenizer: {name} is {model['type']}; only byte-level BPE can be pruned")
    missing = [char for char in BYTE_CHARACTERS.values() if char not in model["vocab"]]
    if missing:
        raise UserError(f"tokenizer: {name} is BPE, but not byte-level: {len(missing)} of 256 bytes have no entry")
    return state


def fixed_entries(state: dict) -> set[str]:
    """Return the entries that are never removed: bytes and added tokens."""
    return set(BYTE_CHARACTERS.values()) | {token["content"] for token in state["added_tokens"]}


def split_by_hash(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the texts to count, and about a twentieth of them held out. Equal texts are on the same side."""
    used, held_out = [], []
    for text in texts:
        first_byte = sha256(text.encode()).digest()[0]
        side = held_out if first_byte < 256 // HELD_OUT else used
        side.append(text)
    return used, held_out


def count_tokens(tokenizer: Tokenizer, texts: list[str]) -> Counter[int]:
    """Return how often each token id occurs in the texts."""
    counts: Counter[int] = Counter()
    for start in range(0, len(texts), BATCH_SIZE):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + BATCH_SIZE], add_special_tokens=False):
            counts.update(encoding.ids)
    return counts


def choose_entries(state: dict, counts: Counter[int], size: int) -> set[str]:
    """Return the entries to keep, at most `size`.

    Starts from all entries that are used and removes the least used one at a time. Only an entry that no other entry
    is merged from can be removed. This is leaf-based pruning (Purason et al., 2025), with counts that stay up to date:
    when an entry is removed, its two parents occur instead.

    Args:
        state: Content of tokenizer.json.
        counts: Occurrences of each token id in the text.
        size: Entries to keep, at least the number of fixed ones.
    """
    vocab, fixed = state["model"]["vocab"], fixed_entries(state)
    ranks = {tuple(pair): rank for rank, pair in enumerate(state["model"]["merges"])}
    used = Counter({entry: counts[number] for entry, number in vocab.items() if counts[number]})

    # Keep what is used and everything it is merged from.
    parents = find_ancestors(used, ranks, fixed)
    kept = fixed | set(parents)
    n_children = Counter(parent for pair in parents.values() for parent in pair)

    # Remove leaves from a heap: the least used first, and of equally used ones the one with the highest id.
    leaves = [(used[entry], -vocab[entry], entry) for entry in kept - fixed if n_children[entry] == 0]
    heapq.heapify(leaves)
    while len(kept) > size:
        count, _, entry = heapq.heappop(leaves)
        kept.remove(entry)
        for parent in parents[entry]:
            used[parent] += count
            n_children[parent] -= 1
            if n_children[parent] == 0 and parent not in fixed:
                heapq.heappush(leaves, (used[parent], -vocab[parent], parent))
    return kept


def find_ancestors(
    entries: Iterable[str], ranks: dict[tuple[str, str], int], fixed: set[str]
) -> dict[str, tuple[str, ...]]:
    """Return the parents of each entry, of each parent, and so on. A fixed entry has none."""
    parents: dict[str, tuple[str, ...]] = {}
    waiting = list(entries)
    while waiting:
        entry = waiting.pop()
        if entry not in parents:
            parents[entry] = () if entry in fixed else find_parents(entry, ranks)
            waiting += parents[entry]
    return parents


def find_parents(entry: str, ranks: dict[tuple[str, str], int]) -> tuple[str, ...]:
    """Return the two entries of the last merge that produces `entry`, or () if merges do not produce it.

    The same merges produce the entry inside a longer text: until it is complete, no merge crosses its ends.

    Args:
        entry: An entry as the vocabulary writes it, one character for each byte.
        ranks: Merge -> its position in the list of merges; a lower one is applied first.
    """
    parts = list(entry)
    last_pair: tuple[str, ...] = ()
    while len(parts) > 1:
        # Apply the merge with the lowest rank at its first position, as BPE does.
        pairs = list(zip(parts, parts[1:], strict=False))
        position = min(range(len(pairs)), key=lambda index: ranks.get(pairs[index], len(ranks)))
        last_pair = pairs[position]
        if last_pair not in ranks:
            return ()
        parts[position : position + 2] = ["".join(last_pair)]
    return last_pair


def remove_entries(state: dict, kept: set[str]) -> tuple[Tokenizer, list[int]]:
    """Return a tokenizer with the kept entries only, renumbered in their order, and the old id of each new id.

    `state` is changed.
    """
    model = state["model"]
    old_ids = dict(model["vocab"])
    for token in state["added_tokens"]:
        old_ids[token["content"]] = token["id"]
    order = sorted(kept, key=old_ids.__getitem__)
    new_ids = {entry: number for number, entry in enumerate(order)}

    # Ids occur in the vocabulary, in the added tokens and in post-processors that add special tokens.
    model["vocab"] = {entry: new_ids[entry] for entry in order if entry in model["vocab"]}
    model["merges"] = [[left, right] for left, right in model["merges"] if {left, right, left + right} <= kept]
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["content"]]
    for processor in list_processors(state["post_processor"]):
        for token in processor.get("special_tokens", {}).values():
            token["ids"] = [new_ids[content] for content in token["tokens"]]
    return Tokenizer.from_str(json.dumps(state)), [old_ids[entry] for entry in order]


def list_processors(processor: dict | None) -> list[dict]:
    """Return a post-processor and all those nested in it."""
    if processor is None:
        return []
    found = [processor]
    for nested in processor.get("processors", []):
        found += list_processors(nested)
    return found


def save(pruned: Tokenizer, old_ids: list[int], source: PreTrainedTokenizerBase, output: Path) -> None:
    """Write the tokenizer folder with the settings of `source`. ChatML without a template gets the project's."""
    template = source.chat_template
    if not template and {"<|im_start|>", "<|im_end|>"} <= source.get_added_vocab().keys():
        template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pruned,
        **source.special_tokens_map,
        extra_special_tokens=source.extra_special_tokens,
        model_max_length=source.model_max_length,
        chat_template=template,
    )
    with write_atomically(output) as partial:
        save_tokenizer(tokenizer, partial)
        (partial / "old_ids.json").write_text(json.dumps(old_ids), encoding="utf-8")


def print_cost(before: Tokenizer, after: Tokenizer, texts: list[str]) -> None:
    """Print how many more tokens the texts take after pruning."""
    size = sum(len(text.encode()) for text in texts)
    old = count_tokens(before, texts).total()
    new = count_tokens(after, texts).total()
    print(
        f"held-out text of {size:,} bytes: {new / old - 1:+.2%} tokens, "
        f"{size / old:.2f} -> {size / new:.2f} bytes per token"
    )


if __name__ == "__main__":
    run_script(main)
