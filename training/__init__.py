"""Shared by all trainers: the steps of a run, resume, hardware checks, optimizers, run card, callbacks."""
