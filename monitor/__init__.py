"""What every recipe shows of a run: speed, alarms, samples, curves, run card. Knows `Trainer`, and no recipe."""

from .alarms import AlarmCallback
from .curve import CurveCallback
from .expert_load import ExpertLoadCallback, find_routers
from .progress import show_progress_lines
from .run_card import write_run_card
from .samples import SampleCallback
from .throughput import ThroughputCallback

__all__ = [
    "AlarmCallback",
    "CurveCallback",
    "ExpertLoadCallback",
    "SampleCallback",
    "ThroughputCallback",
    "find_routers",
    "show_progress_lines",
    "write_run_card",
]
