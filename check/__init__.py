"""Correctness checks that any causal language model of transformers should pass. Run `python -m buddygpt.check`."""

from .checks import CHECKS, Row, run_check
from .subject import Subject, open_subject, reduce_config

__all__ = ["CHECKS", "Row", "Subject", "open_subject", "reduce_config", "run_check"]
