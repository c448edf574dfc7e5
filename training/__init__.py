"""What all trainers share: the course of a run, resume, hardware checks, optimizers, run card, callbacks."""
