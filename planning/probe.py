"""Measure how fast this CPU trains a model, in a few seconds."""

import time

import torch
from transformers import AutoModelForCausalLM

from buddygpt.model.configuration_buddygpt import BuddyGPTConfig
from buddygpt.planning.budget import model_config
from buddygpt.planning.hardware import Speed
from buddygpt.planning.rules import Pretraining
from buddygpt.training.optimizers import muon_adamw

LEAST_SECONDS = 3
LEAST_STEPS = 3
MOST_ROWS = 16
BUSY = 1.5  # seconds over CPU seconds


def measure_speed(run: Pretraining, cores: int) -> Speed:
    """Train a random model of the run's shape for a few steps on random tokens, on so many threads of this machine.

    If other processes hold the machine up, CPU seconds count, since the run takes longer than they do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        rows = min(run.batch // run.block_size, MOST_ROWS)
        wall, cpu = _seconds_of_a_step(run, rows)
    finally:
        torch.set_num_threads(threads)
    tokens = rows * run.block_size
    is_busy = wall > BUSY * cpu / cores
    seconds = cpu / cores if is_busy else wall
    flops = (tokens * run.shape.flops_per_token(run.block_size) + run.shape.muon_flops()) / seconds
    source = f"{flops / cores / 1e9:.0f} GFLOP/s a core, measured on this machine with this model for a few seconds"
    if is_busy:
        source += f", in CPU seconds: other processes made it {wall * cores / cpu:.1f} times slower"
    return Speed(flops, None, source)


def _seconds_of_a_step(run: Pretraining, rows: int) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of a step of `rows` rows: the means of several, without the first."""
    model = AutoModelForCausalLM.from_config(BuddyGPTConfig(**model_config(run.shape, run.block_size))).train()
    optimizer = muon_adamw(model, weight_decay=0.1, lr=1e-3, fused=True)
    tokens = torch.randint(run.shape.vocab_size, (rows, run.block_size))
    started, cpu_started, steps = 0.0, 0.0, -1
    while steps < LEAST_STEPS or time.perf_counter() - started < LEAST_SECONDS:
        if steps == 0:
            started, cpu_started = time.perf_counter(), time.process_time()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return (time.perf_counter() - started) / steps, (time.process_time() - cpu_started) / steps
