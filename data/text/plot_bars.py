"""Draw report.png. report.py runs this file as a separate process: matplotlib takes 40 MB that no worker should keep.

python -I data/text/plot_bars.py report.png < bars.json    # {"names": [source, ...], "bars": {label: [percent, ...]}}
"""

import json
import sys

from matplotlib.figure import Figure

from buddygpt.cli.fonts import plot_labels

COLORS = ["#c8ccd0", "#d1495b", "#edae49", "#00798c", "#8d5a97", "#5a9367", "#b5651d", "#3d405b", "#e07a9b", "#222222"]


def draw(names: list[str], bars: dict[str, list[float]], path: str) -> None:
    """Draw a horizontal bar for each name, with its parts next to each other."""
    figure = Figure(figsize=(10, 1.6 + 0.34 * max(len(names), len(bars) / 1.6)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(names)
    for (label, widths), color in zip(bars.items(), COLORS, strict=False):
        axes.barh(range(len(names)), widths, left=left, color=color, label=label, height=0.72)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(names)), plot_labels(names))
    axes.invert_yaxis()
    axes.set_xlim(0, max(*left, 1))
    axes.set_xlabel("share of the rows read, %")
    axes.set_title("Rows that were not written, by source", loc="left", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    for text in (*axes.get_yticklabels(), *legend.get_texts()):
        text.set_parse_math(False)  # a name may contain $
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(**json.load(sys.stdin), path=sys.argv[1])
