"""What every recipe shows of a run: samples, loss curve, run card. Knows `Trainer`, and no recipe."""

from .curve import CurveCallback
from .run_card import write_run_card
from .samples import SampleCallback

__all__ = ["CurveCallback", "SampleCallback", "write_run_card"]
