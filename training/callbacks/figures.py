"""Save matplotlib figures without a display."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from buddygpt.cli.files import write_atomically


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and free its memory."""
    with write_atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
