"""Callbacks of every run: speed, expert load, alarms, samples, curves, progress."""
