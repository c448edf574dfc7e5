"""What every recipe shows of a run: samples, loss curve, run card."""
