"""Run lm-eval: options, tasks, models, subsets of questions."""
