"""The checks. Each compares a model with itself or with plain arithmetic and returns what it measured.

Differences are relative (`difference`: greatest absolute difference of logits over their standard deviation), so that
one tolerance fits every size. Float32 sums in another order differ by about 1e-6; the faults the checks are for, by
1e-2 and more.
"""

import copy
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .routing import expected_weights, recorded_routing, routing_rule
from .subject import Subject

LENGTH = 40
DOCUMENTS = [5, 14, 9, 12]  # lengths of those packed in a row of LENGTH
SAME = 1e-4  # tolerance where only the order of float32 sums differs


@dataclass(frozen=True)
class Measure:
    """What a check found. It holds where `value` is at most, or `at_least`, the `tolerance`. `note` says where."""

    value: float
    tolerance: float
    at_least: bool = False
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.tolerance <= self.value < torch.inf if self.at_least else self.value <= self.tolerance


class NotApplicable(Exception):
    """The model lacks what the check is about. The message says what."""


@dataclass(frozen=True)
class Row:
    """A line of the gate's table. `status` is "pass", "FAIL" or "n/a"; `note` says why or where."""

    check: str
    status: str
    seconds: float
    measure: Measure | None = None
    note: str = ""


def run_check(name: str, subject: Subject) -> Row:
    """Run one of `CHECKS`. An exception is a failure."""
    start = time.perf_counter()
    torch.manual_seed(subject.seed)
    try:
        measure = CHECKS[name](subject)
        status, note = ("pass", "") if measure.holds else ("FAIL", measure.note)
    except NotApplicable as reason:
        status, measure, note = "n/a", None, str(reason)
    except Exception as error:
        status, measure = "FAIL", None
        note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        subject.model.zero_grad(set_to_none=True)
    return Row(name, status, time.perf_counter() - start, measure, note)


def difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Greatest difference, in standard deviations of the reference."""
    return number(((logits - reference).abs().max() / reference.std()).item())


def gradient_difference(gradients: dict, reference: dict) -> float:
    """Greatest relative difference of a parameter's gradient. One below 1e-3 of the largest counts as that large, so
    that rounding is not judged by gradients that are nearly 0."""
    norms = {name: 0.0 if g is None else number(g.norm().item()) for name, g in reference.items()}
    floor = 1e-3 * max(norms.values())
    return max(
        (0.0 if norms[name] == 0.0 else torch.inf) if gradients[name] is None or reference[name] is None
        else number((gradients[name] - reference[name]).norm().item() / max(norms[name], floor))
        for name in reference
    )  # fmt: skip


def number(value: float) -> float:
    """NaN as infinity, which no tolerance holds and no `max` overlooks."""
    return torch.inf if value != value else value


def need(condition: bool, reason: str) -> None:
    if not condition:
        raise NotApplicable(reason)


@contextmanager
def training(model: PreTrainedModel):
    """Training mode, each time with the same dropout and with kernels that add in a fixed order."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    model.train()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        model.eval()


def causality(subject: Subject) -> Measure:
    """A changed token changes no earlier logit and no other row. Measured against the change it makes in its own."""
    ids = subject.ids(2, LENGTH)
    before, leak, effect = subject.logits(ids), 0.0, 0.0
    for position in (1, LENGTH // 2, LENGTH - 1):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % subject.config.get_text_config().vocab_size
        change = (subject.logits(changed) - before).abs().nan_to_num(nan=torch.inf)
        leak = max(leak, change[0, :position].max().item(), change[1].max().item())
        effect = max(effect, change[0, position:].max().item())
    return Measure(leak / effect if effect else torch.inf, SAME)


def cached_decoding(subject: Subject) -> Measure:
    """Prefill and single steps, and chunks, give the logits of one pass without a cache."""
    need(subject.takes("past_key_values"), "forward has no past_key_values")
    ids = subject.ids(2, LENGTH)
    expected = subject.logits(ids)
    return Measure(
        max(
            difference(decode(subject, ids, [LENGTH - 12] + 12 * [1]), expected),
            difference(decode(subject, ids, [11, 1, 3, LENGTH - 15]), expected),
        ),
        SAME,
    )


def decode(subject: Subject, ids: torch.Tensor, chunks: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of `ids` fed to a cache in chunks; with a mask (B, T), at the positions that `generate` would give."""
    past, logits, seen = None, [], 0
    with torch.no_grad():
        for chunk in ids.split(chunks, dim=1):
            kwargs = {}
            if mask is not None:
                kwargs = padded_inputs(subject, mask[:, : seen + chunk.shape[1]], chunk.shape[1])
            output = subject.model(chunk, past_key_values=past, use_cache=True, **kwargs)
            past, seen = output.past_key_values, seen + chunk.shape[1]
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


def padded_inputs(subject: Subject, mask: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    """Mask and, where the model takes them, the positions of the last `length` tokens, counted from the first real
    one."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return {"attention_mask": mask} | ({"position_ids": positions} if subject.takes("position_ids") else {})


def left_padding(subject: Subject) -> Measure:
    """A row with padding on its left gives the logits it gives alone, in one pass and through a cache."""
    need(subject.takes("attention_mask"), "forward has no attention_mask")
    ids, padding = subject.ids(2, LENGTH), 7
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = subject.logits(ids[:1, padding:])
    padded = [subject.logits(ids, **padded_inputs(subject, mask, LENGTH))]
    if subject.takes("past_key_values"):
        padded.append(decode(subject, ids, [LENGTH - 4] + 4 * [1], mask))
    return Measure(max(difference(logits[:1, padding:], expected) for logits in padded), SAME)


def packed_documents(subject: Subject) -> Measure:
    """Documents in one row, told apart by restarting position_ids (no mask, no cache), give what each gives alone."""
    need(subject.takes("position_ids"), "forward has no position_ids")
    ids = subject.ids(2, LENGTH)
    packed = subject.logits(ids, position_ids=packed_positions(2))
    separate = [subject.logits(document) for document in ids.split(DOCUMENTS, dim=1)]
    return Measure(difference(packed, torch.cat(separate, dim=1)), SAME)


def packed_positions(rows: int) -> torch.Tensor:
    """Positions (rows, LENGTH) of rows that hold documents of the lengths in `DOCUMENTS`."""
    return torch.cat([torch.arange(length) for length in DOCUMENTS]).expand(rows, -1)


def position_ids(subject: Subject) -> Measure:
    """Positions three apart give other logits than positions one apart: the position_ids are read."""
    need(subject.takes("position_ids"), "forward has no position_ids")
    ids = subject.ids(1, LENGTH)
    mask, positions = torch.ones_like(ids), torch.arange(LENGTH).unsqueeze(0)  # without a mask: LENGTH documents
    near, far = (subject.logits(ids, attention_mask=mask, position_ids=p) for p in (positions, 3 * positions))
    return Measure(difference(far, near), 1e-3, at_least=True)


def loss_accumulation(subject: Subject) -> Measure:
    """Rows with unlike numbers of labels, one at a time with num_items_in_batch, add up to loss and gradient of the
    batch; and the loss is the cross-entropy of the next token."""
    ids = subject.ids(4, LENGTH // 2)
    labels = ids.clone()
    labels[0, :15], labels[1, 3:9] = -100, -100
    targets = labels[:, 1:]
    items = (targets != -100).sum()
    whole, reference = subject.gradients((ids, labels), num_items_in_batch=items)
    parts, gradients = subject.gradients(*zip(ids.split(1), labels.split(1), strict=True), num_items_in_batch=items)
    plain = cross_entropy(subject.logits(ids)[:, :-1].flatten(0, 1), targets.flatten()).item()
    losses = max(abs(parts - whole), abs(whole - plain)) / plain
    return Measure(max(losses, gradient_difference(gradients, reference)), SAME)


def tied_weights(subject: Subject) -> Measure:
    """Saving and loading keeps every tensor, and head and embedding tied or untied as the config says. Measured: the
    tensors that changed."""
    model, loaded = subject.model, subject.reload()
    before, after = model.state_dict(), loaded.state_dict()
    changed = before.keys() ^ after.keys()
    changed |= {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    if not is_tied(model) == is_tied(loaded) == tied:
        changed |= {f"the output head (tie_word_embeddings is {tied})"}
    return Measure(len(changed), 0, note=", ".join(sorted(changed)[:3]))


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def fresh_process(subject: Subject) -> Measure:
    """The saved folder loads in a new process that imports transformers alone, and gives the same logits."""
    ids = subject.ids(2, LENGTH)
    torch.save((ids, subject.logits(ids)), subject.saved.parent / "expected.pt")
    remote = bool(getattr(subject.model.config, "auto_map", None))
    program = f"""if True:
        import sys, torch
        from transformers import AutoModelForCausalLM
        ids, expected = torch.load("expected.pt")
        model = AutoModelForCausalLM.from_pretrained("saved_model", dtype=torch.float32, trust_remote_code={remote})
        with torch.no_grad():
            logits = model.eval()(ids, use_cache=False).logits.float()
        assert "buddygpt" not in sys.modules, "the package was imported"
        print("difference", ((logits - expected).abs().max() / expected.std()).item())
    """
    folder = subject.saved.parent
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    return Measure(float(result.stdout.split("difference")[1]), 1e-6)


def parameter_gradients(subject: Subject) -> Measure:
    """The cross-entropy alone, without balance losses, gives every parameter, the router's too, a gradient that is
    more than rounding. Measured: the greatest relative change of one when embeddings change in their sixth digit."""
    for count in (1, 4, 16):  # until every expert has had a token
        gradients = task_gradients(subject, count)
        if all(gradient is not None and gradient.any() for gradient in gradients.values()):
            break
    hook = subject.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output * (1 + 1e-6 * torch.randn_like(output))
    )
    try:
        others = task_gradients(subject, count)
    finally:
        hook.remove()
    changes = {
        name: number(((others[name] - g).norm() / g.norm()).item()) if g is not None and g.any() else torch.inf
        for name, g in gradients.items()
    }
    worst = max(changes, key=changes.get)
    return Measure(changes[worst], 0.1, note=worst)


def task_gradients(subject: Subject, batches: int) -> dict[str, torch.Tensor | None]:
    """Each parameter's gradient of the cross-entropy over so many batches."""
    for seed in range(batches):
        ids = subject.ids(2, LENGTH, seed)
        logits = subject.model(ids, use_cache=False).logits.float()
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return subject.take_gradients()


def attention_backends(subject: Subject) -> Measure:
    """eager, sdpa and flex_attention give the same logits, for plain rows and for packed documents."""
    model = subject.model
    flags = {"eager": True, "sdpa": model._supports_sdpa, "flex_attention": model._supports_flex_attn}
    names = [name for name, supported in flags.items() if supported]
    need(len(names) > 1, "only eager attention is supported")
    ids, kwargs = subject.ids(2, LENGTH), [{}]
    if subject.takes("position_ids"):
        kwargs.append({"position_ids": packed_positions(2)})
    used, logits = model.config._attn_implementation, {}
    torch._dynamo.reset()  # flex_attention compiled for other models' shapes: torch 2.13 fails on the CPU
    try:
        for name in names:
            model.set_attn_implementation(name)
            logits[name] = [subject.logits(ids, **each) for each in kwargs]
    finally:
        model.set_attn_implementation(used)
    pairs = [pair for name in names[1:] for pair in zip(logits[name], logits["eager"], strict=True)]
    return Measure(max(difference(*pair) for pair in pairs), SAME)


def experts_backends(subject: Subject) -> Measure:
    """eager, grouped_mm and batched_mm run the experts to the same logits and gradient."""
    model = subject.model
    need(any(hasattr(module, "is_concatenated") for module in model.modules()), "no routed experts")
    used, ids = model.config._experts_implementation, subject.ids(2, LENGTH)
    results = []
    try:
        for name in ("eager", "grouped_mm", "batched_mm"):
            model.set_experts_implementation(name)
            results.append((subject.logits(ids), subject.gradients((ids, ids))[1]))
    finally:
        model.set_experts_implementation(used)
    (logits, gradients), *others = results
    return Measure(
        max(max(difference(each, logits), gradient_difference(other, gradients)) for each, other in others), SAME
    )


def gradient_checkpointing(subject: Subject) -> Measure:
    """Computing activations again in the backward pass changes neither loss nor gradient."""
    need(subject.model.supports_gradient_checkpointing, "the model does not support it")
    ids = subject.ids(2, LENGTH)
    with training(subject.model):
        plain_loss, plain = subject.gradients((ids, ids))
    subject.model.activation_checkpointing_enable()
    try:
        with training(subject.model):
            loss, gradients = subject.gradients((ids, ids))
    finally:
        subject.model.activation_checkpointing_disable()
    return Measure(max(abs(loss - plain_loss) / plain_loss, gradient_difference(gradients, plain)), 1e-6)


def bfloat16(subject: Subject) -> Measure:
    """Loaded in bfloat16, logits stay close to float32's, also at the end of the context. Measured: the median
    token's error, over the error in float32 of weights that are off by four times what bfloat16 rounds them by."""
    ids, kwargs = subject.ids(2, LENGTH), {}
    if subject.takes("position_ids"):
        last = subject.config.get_text_config().max_position_embeddings
        kwargs["position_ids"] = torch.arange(last - LENGTH, last).expand(2, -1)
    expected = subject.logits(ids, **kwargs)

    def error(model: PreTrainedModel) -> float:
        logits = model(ids, use_cache=False, **kwargs).logits.float()
        return (logits - expected).norm(dim=-1).median().item()

    with torch.no_grad():
        rounded = copy.deepcopy(subject.model)
        for parameter in rounded.parameters():
            parameter.mul_(torch.empty_like(parameter).uniform_(1 - 2**-7, 1 + 2**-7))
        yardstick = error(rounded)
        del rounded
        return Measure(error(subject.reload(torch.bfloat16)) / yardstick, 2)


def determinism(subject: Subject) -> Measure:
    """Two training steps from the same seed agree in every bit of loss and gradient. Measured: tensors that differ."""
    ids, runs = subject.ids(2, LENGTH), []
    for _ in range(2):
        with training(subject.model):
            runs.append(subject.gradients((ids, ids)))
    (loss, first), (other_loss, second) = runs
    differ = sum(g is not second[name] and not torch.equal(g, second[name]) for name, g in first.items())
    return Measure(differ + (loss != other_loss), 0)


def initial_loss(subject: Subject) -> Measure:
    """A model as training would start from guesses uniformly: its loss is ln V. Measured: the distance over ln V."""
    ids = subject.ids(4, LENGTH)
    with torch.no_grad():
        loss = subject.fresh_model()(ids, labels=ids, use_cache=False).loss.item()
    uniform = torch.tensor(float(subject.config.get_text_config().vocab_size)).log().item()
    return Measure(abs(loss - uniform) / uniform, 0.1)


def router_choice(subject: Subject) -> Measure:
    """The router's experts and weights are those its scores ask for, by a plain computation for each token. Measured:
    the greatest difference of an expert's weight."""
    records = recorded_routing(subject.model, subject.ids(2, LENGTH))
    need(bool(records), "no router that returns logits, weights and indices")
    worst = 0.0
    for router, logits, weights, indices in records:
        rule = routing_rule(router, subject.model.config, indices.shape[1])
        need(rule is not None, f"the rule of {type(router).__name__} is not known")
        for token, expected in enumerate(expected_weights(logits, rule)):
            given = torch.zeros_like(expected).index_add(0, indices[token], weights[token].float())
            worst = max(worst, number((given - expected).abs().max().item()))
    return Measure(worst, 1e-5)


CHECKS: dict[str, Callable[[Subject], Measure]] = {
    check.__name__: check
    for check in (
        causality, cached_decoding, left_padding, packed_documents, position_ids, loss_accumulation, tied_weights,
        fresh_process, parameter_gradients, attention_backends, experts_backends, gradient_checkpointing, bfloat16,
        determinism, initial_loss, router_choice,
    )
}  # fmt: skip


def explain(name: str) -> str:
    """The check's docstring in one line."""
    return " ".join(inspect.getdoc(CHECKS[name]).split())
