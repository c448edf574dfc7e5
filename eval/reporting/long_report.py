"""The report of eval/long_context.py: tables in Markdown and one picture."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from buddygpt.cli.files import write_atomically
from buddygpt.cli.fonts import plot_labels
from buddygpt.cli.tables import escape_markdown, markdown_table
from buddygpt.eval.benchmarks.needles import CHANCE, DEPTHS
from buddygpt.eval.reporting.scores import Score, format_score, proportion

BINS = 8  # ranges of positions
Results = dict[str, dict[str, Any]]  # model -> bits_per_byte, needles, positions, stretched
LANGUAGES = {"zh": "Chinese", "en": "English"}


def to_markdown(results: Results, length: int, lengths: list[int]) -> str:
    """Return the report: bits per byte by position, needles by length, needles by depth."""
    parts = ["# Long context\n\n![bits per byte by position, and numbers found](report.png)\n"]
    parts.append("## Bits per byte by position\n\n" + bits_table(results, length) + "\n")
    if any(found["needles"] for found in results.values()):
        parts.append(
            "## Numbers found\n\nA text holds four numbers; the model continues a sentence that asks for one. Exact "
            f"match with 95% interval; repeating any of the four is right in {CHANCE:.0%}.\n\n"
            + needle_table(results, lengths)
            + "\n\nBy depth of the number (0% is the beginning), both languages:\n\n"
            + depth_table(results, lengths)
            + "\n"
        )
    return "\n".join(parts)


def bits_table(results: Results, length: int) -> str:
    """Return the bits per byte of each model; each range of positions is twice as long as the one before."""
    size = length // BINS
    ranges = [(0, 1), (1, 2), (2, 4), (4, 8)]  # in bins
    header = ["model", "positions", *(f"{low * size:,}–{high * size - 1:,}" for low, high in ranges)]
    rows = []
    for name, found in results.items():
        values = found["bits_per_byte"]
        means = [sum(values[low:high]) / (high - low) for low, high in ranges]
        rows.append([_label(name, found), f"{found['positions']:,}", *(f"{mean:.3f}" for mean in means)])
    return markdown_table(header, rows)


def needle_table(results: Results, lengths: list[int]) -> str:
    """Return the share of numbers found by model, language and length, over all depths."""
    rows = []
    for name, found in results.items():
        for language, title in LANGUAGES.items():
            scores = [total(found["needles"], language=language, length=length) for length in lengths]
            rows.append([_label(name, found), title, str(scores[0]["n"]), *map(format_score, scores)])
    return markdown_table(["model", "language", "n", *(f"{length:,} tokens" for length in lengths)], rows)


def depth_table(results: Results, lengths: list[int]) -> str:
    """Return the share of numbers found by model, length and depth, over both languages."""
    rows = []
    for name, found in results.items():
        for length in lengths:
            scores = [total(found["needles"], length=length, depth=depth) for depth in DEPTHS]
            rows.append([_label(name, found), f"{length:,}", *(f"{score['value']:.0%}" for score in scores)])
    return markdown_table(["model", "tokens", *(f"depth {depth:.0%}" for depth in DEPTHS)], rows)


def total(scores: Iterable[dict[str, Any]], **wanted: Any) -> Score:
    """Return one score over all cells with the wanted language, length or depth."""
    cells = [score for score in scores if all(score[key] == value for key, value in wanted.items())]
    return proportion(sum(cell["found"] for cell in cells), sum(cell["n"] for cell in cells), CHANCE)


def _label(name: str, found: dict[str, Any]) -> str:
    return escape_markdown(name) + (" (untrained)" if found["stretched"] else "")


def plot(results: Results, length: int, lengths: list[int], path: Path) -> None:
    """Draw bits per byte by position and, if there are any, the numbers found by length with intervals."""
    has_needles = any(found["needles"] for found in results.values())
    columns = 2 if has_needles else 1
    figure, axes = plt.subplots(
        1, columns, figsize=(5 * columns if has_needles else 7.5, 4.6), squeeze=False, layout="constrained"
    )
    left = axes[0, 0]
    centers = [(number + 0.5) * length / BINS for number in range(BINS)]
    labels = plot_labels(list(results))
    for label, found in zip(labels, results.values(), strict=True):
        style = "--" if found["stretched"] else "-"
        left.plot(centers, found["bits_per_byte"], style, marker="o", markersize=3, label=label)
    for positions in {found["positions"] for found in results.values() if found["positions"] < length}:
        left.axvline(positions, color="black", linestyle=":", linewidth=1)
    values = [value for found in results.values() for value in found["bits_per_byte"]]
    if max(values) > 4 * min(values):
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
    left.set(title="bits per byte", xlabel="position (dotted: positions of the shorter model)")
    left.grid(alpha=0.3, which="both")

    if has_needles:
        right = axes[0, 1]
        for place, (label, found) in enumerate(zip(labels, results.values(), strict=True)):
            scores = [total(found["needles"], length=each) for each in lengths]
            shares = [100 * score["value"] for score in scores]
            errors = [
                [share - 100 * score["ci95"][0] for share, score in zip(shares, scores, strict=True)],
                [100 * score["ci95"][1] - share for share, score in zip(shares, scores, strict=True)],
            ]
            x = [number + 0.06 * (place - len(results) / 2) for number in range(len(lengths))]
            style = "--" if found["stretched"] else "-"
            right.errorbar(x, shares, errors, linestyle=style, marker="o", markersize=3, capsize=2, label=label)
        right.axhline(100 * CHANCE, color="black", linestyle="dashed", linewidth=1)
        right.set_xticks(range(len(lengths)), [f"{each:,}" for each in lengths])
        right.set(title="numbers found, in % (dashed: chance)", xlabel="tokens of the text", ylim=(-2, 102))
        right.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    with write_atomically(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
