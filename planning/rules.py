"""The rules that turn a budget into the numbers of a run. Each number names its source.

A source in brackets is a paper (arXiv number) or a project whose settings and results are published: "nanochat" is
github.com/karpathy/nanochat (dev/LOG.md, README), "OLMo ladder" is that of github.com/allenai/OLMo-core. "Measured"
are runs of this project (docs/results.md). `tools/benchmarks/sweep.py` tells how far the rules are from the best
choice on your own text and machine.
"""

import math
from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["muon", "adamw"]

# --- shape ---

# Width over depth: 64 was better than 128 at 10^18 FLOPs (nanochat, LOG 2026-01-17).
ASPECT = 64
LEAST_LAYERS = 4
FEED_FORWARD = 8 / 3  # width of a gated feed-forward layer over that of the model (SwiGLU, 2002.05202)


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense model with grouped-query attention, QK-norm and a tied head, as in model/configs/*.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int

    @property
    def head_dim(self) -> int:
        """128 is better than 64 (nanochat, LOG 2026-01-17), but a narrow model would be left with one or two heads."""
        return 32 if self.hidden_size < 512 else 64 if self.hidden_size < 1024 else 128

    @property
    def num_attention_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def num_key_value_heads(self) -> int:
        """Two heads share a key and a value, as in the presets; they halve the cache."""
        return self.num_attention_heads // 2

    @property
    def intermediate_size(self) -> int:
        step = 32 if self.hidden_size < 512 else 128
        return round(FEED_FORWARD * self.hidden_size / step) * step

    @property
    def matrices(self) -> int:
        """Parameters of the layers' matrices."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def parameters(self) -> int:
        """All parameters; the embedding counts once, because the head is tied to it."""
        norms = self.num_hidden_layers * (2 * self.hidden_size + 2 * self.head_dim) + self.hidden_size
        return self.vocab_size * self.hidden_size + self.matrices + norms

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs of a token, as in training/flops.py."""
        attention = self.num_hidden_layers * self.num_attention_heads * 2 * self.head_dim * length
        return 6 * (self.vocab_size * self.hidden_size + self.matrices + attention)

    def muon_flops(self) -> float:
        """FLOPs of Muon's five Newton-Schulz iterations in a step, which do not depend on its tokens.

        An iteration multiplies an m x n matrix (m the smaller) by its transpose, the m x m product by itself, and that
        by the matrix. They count 0.45, because plain products run faster than training: measured, a step of 1,024
        tokens of 6.7M parameters takes 0.18 CPU s longer with Muon (docs/performance.md, "Switches of the recipe").
        """
        width, keys = self.hidden_size, self.num_key_value_heads * self.head_dim
        sizes = [(width, width)] * 2 + [(keys, width)] * 2 + [(width, self.intermediate_size)] * 3
        step = sum(5 * (4 * small**2 * large + 2 * small**3) for small, large in sizes)
        return 0.45 * self.num_hidden_layers * step


def widths() -> list[int]:
    """Return the widths to choose from: whole heads, an even number of them."""
    return [*range(64, 512, 64), *range(512, 1024, 128), *range(1024, 8192 + 1, 256)]


def shape_of_width(width: int, vocab_size: int) -> Shape:
    return Shape(vocab_size, width, max(LEAST_LAYERS, round(width / ASPECT)))


def shape_of_size(parameters: float, vocab_size: int) -> Shape:
    """Return the shape with about so many parameters; depth may differ from the rule by a half to come close."""
    found = []
    for width in widths():
        deepest = max(LEAST_LAYERS, round(1.5 * width / ASPECT))
        for layers in range(max(2, round(width / ASPECT / 1.5)), deepest + 1):
            shape = Shape(vocab_size, width, layers)
            error = abs(math.log(shape.parameters / parameters))
            found.append((error + 0.1 * abs(math.log(width / layers / ASPECT)), width, shape))
    return min(found)[2]


def block_size(parameters: float) -> int:
    """Tokens in a row: those of our presets and of minimind, nanochat and Bitbrain at these sizes."""
    return 256 if parameters < 10e6 else 512 if parameters < 50e6 else 1024 if parameters < 500e6 else 2048


# --- vocabulary ---

# Entries by bytes of text. 8,192 at 54 MB is measured (docs/results.md); nanochat has 32,768 on tens of GB; larger
# models deserve more (2407.13623, fitted on 33M to 3B parameters). The rest is interpolated.
VOCABULARIES = ((1e6, 1024), (5e6, 2048), (20e6, 4096), (200e6, 8192), (5e9, 16_384), (math.inf, 32_768))
# Byte-level entries must occur to be learned. tokenizer/train_tokenizer.py finds that many in such a text; assumed.
BYTES_PER_ENTRY = 250
LEAST_TEXT = 200_000  # bytes; assumed: below, a held-out document is a tenth of the text
EMBEDDING_SHARE = 2 / 3  # of all parameters, at most: 60% in the best of the runs of 2 CPU-minutes (docs/results.md)


def vocabulary(text_bytes: float, width: int | None = None) -> int:
    """Return the entries of a tokenizer for so much text and a model of this width."""
    entries = next(size for most, size in VOCABULARIES if text_bytes <= most)
    while width and entries > 1024 and entries * width > EMBEDDING_SHARE * shape_of_width(width, entries).parameters:
        entries //= 2
    return entries


def largest_vocabulary(text_bytes: float) -> int:
    """Return the largest number of entries that so much text supports."""
    return int(text_bytes / BYTES_PER_ENTRY)


def bytes_per_token(vocab_size: int) -> float:
    """Return bytes of Chinese and English text per token: 3.31 with 8,192 entries is measured (docs/results.md).

    Others are assumed to be proportional to the bits of an entry.
    """
    return 3.31 * math.log2(vocab_size) / 13


# --- tokens ---

# Tokens per parameter by training FLOPs. 20 at 10^21 is Hoffmann et al. (2203.15556); 8 to 12 at 10^18 to 10^19 is
# nanochat with Muon. Below 10^17 nobody has published any. Measured (docs/results.md,
# "The rules and their neighbours"): at 7 x 10^12, 3 tokens per parameter are 1.5% better than 0.5; up to
# 10^17 it is interpolated.
TOKENS_PER_PARAMETER = ((1e13, 2.5), (1e14, 3.5), (1e15, 5.0), (1e17, 8.0), (1e18, 12.0), (1e21, 20.0))


def tokens_per_parameter(flops: float) -> float:
    """Return the ratio for a budget in training FLOPs, interpolated on logarithms."""
    points = [(math.log(budget), math.log(ratio)) for budget, ratio in TOKENS_PER_PARAMETER]
    position = math.log(flops)
    if position <= points[0][0]:
        return math.exp(points[0][1])
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if position <= right:
            return math.exp(low + (high - low) * (position - left) / (right - left))
    return math.exp(points[-1][1])


# Up to four epochs are nearly as good as new text; what repetition adds decays with 15.4 epochs (2305.16264).
GOOD_EPOCHS = 4
EPOCHS_DECAY = 15.39


def effective_tokens(tokens: float, unique: float) -> float:
    """Return how many tokens of new text are worth as much as `tokens`, if only `unique` are different."""
    if tokens <= unique:
        return tokens
    repeats = tokens / unique - 1
    return unique + unique * EPOCHS_DECAY * (1 - math.exp(-repeats / EPOCHS_DECAY))


# --- batch and learning rate ---


def batch_tokens(tokens: float, length: int) -> int:
    """Return the tokens of a step for a run of so many, a power of two of whole rows.

    4,096 for 6.6M tokens is measured. The exponent 2/3 is that of the OLMo ladder (batch ~ N^(2/3) at tokens ~ N);
    2505.13738 found 0.383 from a larger start.
    """
    wished = 4096 * (tokens / 6.55e6) ** (2 / 3)
    rows = max(4, 2 ** round(math.log2(wished / length)))
    return min(rows * length, 2**21)


# A step of Muon with `match_rms_adamw` at rate r moves a matrix as nanochat's does at 0.2 x r x sqrt(width): its 0.02
# at a width of 768 is 3.6e-3 here, 1.4 times the rate of the OLMo ladder for AdamW at that size and batch.
# Half of it is 0.1 to 0.3% better for 0.4M to 1.8M parameters (docs/results.md).
MUON_OVER_ADAMW = 1.4
HIGHEST_RATE = 1e-2  # measured: best of two on the quickstart's 1.0M parameters
# Beside Muon, AdamW trains the embedding, which prefers a higher rate: 3e-2 beside 1e-2 (measured, docs/speedrun.md);
# three times Muon's rate is 1 to 4% better than the same (docs/results.md).
EMBEDDING_OVER_MUON = 3


def learning_rate(optimizer: Optimizer, parameters: float, batch: float) -> float:
    """Return the peak learning rate.

    The OLMo ladder has 0.0047 x (N / 108M)^(-1/3) / 2 for AdamW at a batch of 2048 x 160 x (N / 108M)^(2/3) tokens.
    For another batch it is multiplied by the square root of their ratio (2006.09092). At 4.0M parameters and 4,096
    tokens that is 2.4e-3 for AdamW and 3.3e-3 for Muon; the runs of docs/results.md had 3.0e-3.
    """
    size = parameters / 108e6
    rate = 0.0047 * size ** (-1 / 3) / 2 * math.sqrt(batch / (2048 * 160 * size ** (2 / 3)))
    rate = min(rate * (MUON_OVER_ADAMW if optimizer == "muon" else 1), HIGHEST_RATE)
    return float(f"{rate:.1e}")


WEIGHT_DECAY = 0.1  # OLMo ladder, and the measured run
# The ladder warms up for as many tokens as there are parameters; nanochat for 40 steps. A short run cannot afford the
# first, so at most a twentieth of the steps.
WARMUP_SHARE = 0.05
LEAST_WARMUP = 20
# Share of the steps in which the rate falls, linearly, to a twentieth of its peak (nanochat: the last 65%, to 5%).
DECAY_SHARE = 0.65
END_OF_DECAY = 0.05
# Share of the tokens of an annealing stage on better text: 1.1 of 11.2T in SmolLM3, about 10% in MiniCPM4.
ANNEAL_SHARE = 0.1


def warmup_steps(parameters: float, batch: int, steps: int) -> int:
    least = min(LEAST_WARMUP, max(1, steps // 10))
    return max(least, min(round(parameters / batch), round(WARMUP_SHARE * steps)))


# --- tuning ---

SFT_RATE = 1 / 3  # of the rate of pretraining with AdamW: 1e-3 after 3e-3 (measured)
DPO_RATE = 1 / 20  # of that of SFT: 5e-5 after 1e-3 (measured)
SFT_EPOCHS = 3  # at most; assumed
DPO_EPOCHS = 1


# --- result ---

# Bits per byte = E + A / N^0.28 + B / D^0.16 with N parameters and D tokens: the form of Chinchilla (2203.15556). Its
# exponents for large models (0.35 and 0.37 as refitted in 2404.10102) miss ours by up to 10%; these five numbers are
# the best fit to the runs below.
IRREDUCIBLE, OF_PARAMETERS, OF_TOKENS = 0.175, 23.4, 16.5
EXPONENT_OF_PARAMETERS, EXPONENT_OF_TOKENS = 0.28, 0.16
# Parameters, tokens, bits per byte. Measured: runs of 2, 8 and 30 CPU-minutes (docs/results.md, "The rules and their
# neighbours"). Published by nanochat on English web text: d12, and d24 at a ratio of 8.
MEASURED = ((0.435e6, 1.430e6, 2.456), (0.521e6, 0.971e6, 2.513), (0.697e6, 4.024e6, 2.228), (1.787e6, 1.995e6, 2.219),
            (1.787e6, 8.122e6, 1.956), (2.157e6, 1.774e6, 2.243), (3.197e6, 1.325e6, 2.298))  # fmt: skip
PUBLISHED = ((135e6, 1.156e9, 0.854), (730e6, 5.8e9, 0.718))
# AdamW needs more tokens for the same: 1.22M where Muon needs 0.58M (measured, docs/speedrun.md). The advantage
# shrinks to 1.4 at 0.1B and 1.1 at 1.2B (2509.02046).
ADAMW_NEEDS = ((20e6, 2.1), (0.6e9, 1.4), (math.inf, 1.1))


def adamw_needs(parameters: float) -> float:
    """Return how many times the tokens of Muon AdamW needs for the same bits per byte."""
    return next(factor for most, factor in ADAMW_NEEDS if parameters <= most)


def expected_bits_per_byte(parameters: float, tokens: float, optimizer: Optimizer = "muon") -> float:
    """Return the bits per byte of held-out text of the same kind that a run of these sizes can expect.

    Near the fitted runs, within 4%. It is a guess for other text (poems have 2.9, statutes 1.9 in the same run), and
    for all sizes between 4M and 135M parameters, where nothing was measured.
    """
    if optimizer == "adamw":
        tokens /= adamw_needs(parameters)
    of_parameters = OF_PARAMETERS / parameters**EXPONENT_OF_PARAMETERS
    return IRREDUCIBLE + of_parameters + OF_TOKENS / tokens**EXPONENT_OF_TOKENS


def describe_expectation(parameters: float, tokens: float) -> str:
    """Return how far a run is from those that the law was fitted to, in words."""
    if 0.3e6 < parameters < 5e6 and 0.9e6 < tokens < 20e6:
        return "close to measured runs of 0.4M to 3.2M parameters; other text may differ by a third"
    if parameters > 60e6 and tokens > 5e8:
        return "close to runs that nanochat has published, on English web text; not measured here"
    return "extrapolated from runs of 0.4M to 3.2M parameters with up to 8M tokens, and from nanochat's 135M and more"


# --- all of it ---


@dataclass(frozen=True)
class Pretraining:
    """The numbers of a pretraining run.

    Attributes:
        shape: Of the model.
        block_size: Tokens in a row.
        tokens: That the run reads.
        batch: Tokens of a step, all GPUs together.
        optimizer: "muon" or "adamw".
        seconds: Expected time.
    """

    shape: Shape
    block_size: int
    tokens: int
    batch: int
    optimizer: Optimizer
    seconds: float

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / self.batch))

    @property
    def learning_rate(self) -> float:
        return learning_rate(self.optimizer, self.shape.parameters, self.batch)

    @property
    def embedding_rate(self) -> float:
        """Peak learning rate of what AdamW trains beside Muon."""
        return float(f"{EMBEDDING_OVER_MUON * self.learning_rate:.1e}")

    @property
    def warmup_steps(self) -> int:
        return warmup_steps(self.shape.parameters, self.batch, self.steps)

    @property
    def decay_steps(self) -> int:
        return max(1, round(DECAY_SHARE * self.steps))


def plan_shape(shape: Shape, flops: float, speed: float, optimizer: Optimizer = "muon") -> Pretraining:
    """Return the run of a given shape that uses a budget of training FLOPs at a speed in FLOP/s."""
    length = block_size(shape.parameters)
    work = shape.flops_per_token(length)
    tokens = flops / work
    for _ in range(8):  # the batch depends on the tokens, and Muon's work on the number of steps
        batch = batch_tokens(tokens, length)
        tokens = flops / (work + (shape.muon_flops() / batch if optimizer == "muon" else 0))
    return Pretraining(shape, length, max(1, round(tokens)), batch, optimizer, flops / speed)


def plan_budget(
    flops: float, speed: float, text_bytes: float, vocab_size: int | None = None, optimizer: Optimizer = "muon"
) -> Pretraining:
    """Return the run that the rules choose for a budget: of the shapes, that with the right tokens per parameter."""
    wished = tokens_per_parameter(flops)
    found = []
    for width in widths():
        entries = vocab_size or vocabulary(text_bytes, width)
        run = plan_shape(shape_of_width(width, entries), flops, speed, optimizer)
        found.append((abs(math.log(run.tokens / run.shape.parameters / wished)), width, run))
    return min(found, key=lambda each: each[:2])[2]
