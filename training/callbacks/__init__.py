"""What every run shows: speed, alarms, samples, curves, expert load, progress."""
