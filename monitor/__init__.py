"""What every recipe shows of a run: samples, loss curve, expert load, run card. Knows `Trainer`, and no recipe."""

from .curve import CurveCallback
from .expert_load import ExpertLoadCallback, find_routers
from .run_card import write_run_card
from .samples import SampleCallback

__all__ = ["CurveCallback", "ExpertLoadCallback", "SampleCallback", "find_routers", "write_run_card"]
