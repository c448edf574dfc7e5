"""Benchmarks that lm-eval lacks, local files of others, and a sandbox for programs."""
