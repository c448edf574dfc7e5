"""Evaluation with lm-eval: tasks, runs, report."""
