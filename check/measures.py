"""What a check measures, and how results are compared.

Differences of logits are relative: the largest absolute difference, divided by the standard deviation of the logits.
So one tolerance fits all model sizes. Float32 sums in another order differ by about 1e-6; the faults that the checks
look for cause differences of 1e-2 and more.
"""

from dataclasses import dataclass

import torch

LENGTH = 40  # tokens of a row
DOCUMENTS = [5, 14, 9, 12]  # lengths of documents packed into one row of LENGTH
SAME = 1e-4  # tolerance for results that differ only by the order of float32 sums


@dataclass(frozen=True)
class Measure:
    """Result of a check. It passes if `value` is at most `tolerance`, or with `at_least` if it is at least that.

    `note` says where the value was measured, and is shown if the check fails; `remark` is shown if it passes.
    """

    value: float
    tolerance: float
    at_least: bool = False
    note: str = ""
    remark: str = ""

    @property
    def holds(self) -> bool:
        if self.at_least:
            return self.tolerance <= self.value < torch.inf
        return self.value <= self.tolerance


class NotApplicable(Exception):
    """The model lacks the part that the check is about. The message names it."""


def require(condition: bool, reason: str) -> None:
    """Raise NotApplicable with the reason unless the condition holds."""
    if not condition:
        raise NotApplicable(reason)


def difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference, in standard deviations of the reference."""
    return nan_to_inf(((logits - reference).abs().max() / reference.std()).item())


def gradient_difference(gradients: dict, reference: dict) -> float:
    """Return the largest relative difference of a parameter's gradient.

    Norms below 1e-3 of the largest count as 1e-3 of it; otherwise rounding in gradients near 0 would dominate.
    """
    norms = {}
    for name, gradient in reference.items():
        norms[name] = 0.0 if gradient is None else nan_to_inf(gradient.norm().item())
    floor = 1e-3 * max(norms.values())

    largest = 0.0
    for name in reference:
        if gradients[name] is None or reference[name] is None:
            # A missing gradient equals a zero one.
            relative = 0.0 if norms[name] == 0.0 else torch.inf
        else:
            distance = (gradients[name] - reference[name]).norm().item()
            relative = nan_to_inf(distance / max(norms[name], floor))
        largest = max(largest, relative)
    return largest


def nan_to_inf(value: float) -> float:
    """Return infinity for NaN: no tolerance allows it, and `max` does not skip it."""
    return torch.inf if value != value else value
