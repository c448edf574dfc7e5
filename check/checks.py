"""The checks. Each compares a model with itself or with plain arithmetic and returns a measured number."""

import copy
import inspect
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .measures import (
    DOCUMENTS,
    LENGTH,
    SAME,
    Measure,
    NotApplicable,
    difference,
    gradient_difference,
    nan_to_inf,
    require,
)
from .routing import expected_weights, recorded_routing, routing_rule
from .saving import fresh_process, loaded_buffers, tied_weights
from .subject import Subject


@dataclass(frozen=True)
class Row:
    """One line of the table. `status` is "pass", "FAIL" or "n/a"; `note` says why or where."""

    check: str
    status: str
    seconds: float
    measure: Measure | None = None
    note: str = ""


def run_check(name: str, subject: Subject) -> Row:
    """Run one of `CHECKS`. An exception counts as a failure."""
    start = time.perf_counter()
    torch.manual_seed(subject.seed)
    measure = None
    note = ""
    try:
        measure = CHECKS[name](subject)
        status = "pass" if measure.holds else "FAIL"
        note = measure.note if status == "FAIL" else measure.remark
    except NotApplicable as reason:
        status = "n/a"
        note = str(reason)
    except Exception as error:
        status = "FAIL"
        lines = str(error).splitlines() or [""]
        note = f"{type(error).__name__}: {lines[0]}"
    finally:
        subject.model.zero_grad(set_to_none=True)
    return Row(name, status, time.perf_counter() - start, measure, note)


def explain(name: str) -> str:
    """Return the docstring of a check in one line."""
    return " ".join(inspect.getdoc(CHECKS[name]).split())


@contextmanager
def training(model: PreTrainedModel):
    """Training mode with a fixed seed for dropout and with deterministic kernels."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    model.train()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        model.eval()


# The model reads the right tokens: causality, cache, padding, packing, positions.


def causality(subject: Subject) -> Measure:
    """Changing a token changes no earlier logit and no other row. Measured relative to the change of later logits."""
    ids = subject.ids(2, LENGTH)
    before = subject.logits(ids)
    leak, effect = 0.0, 0.0
    for position in (1, LENGTH // 2, LENGTH - 1):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % subject.config.get_text_config().vocab_size
        change = (subject.logits(changed) - before).abs().nan_to_num(nan=torch.inf)
        leak = max(leak, change[0, :position].max().item(), change[1].max().item())
        effect = max(effect, change[0, position:].max().item())
    return Measure(leak / effect if effect else torch.inf, SAME)


def cached_decoding(subject: Subject) -> Measure:
    """Decoding with a cache, token by token or in chunks, gives the logits of one pass without a cache."""
    require(subject.takes("past_key_values"), "forward has no past_key_values")
    ids = subject.ids(2, LENGTH)
    expected = subject.logits(ids)
    token_by_token = decode(subject, ids, [LENGTH - 12] + [1] * 12)
    in_chunks = decode(subject, ids, [11, 1, 3, LENGTH - 15])
    return Measure(max(difference(token_by_token, expected), difference(in_chunks, expected)), SAME)


def decode(subject: Subject, ids: torch.Tensor, chunks: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of `ids` (B, T) fed to a cache in chunks of these lengths.

    With a mask (B, T), the positions are those that `generate` would use.
    """
    past_key_values = None
    logits = []
    seen = 0
    with torch.no_grad():
        for chunk in ids.split(chunks, dim=1):
            length = chunk.shape[1]
            seen += length
            kwargs = {} if mask is None else padded_inputs(subject, mask[:, :seen], length)
            output = subject.model(chunk, past_key_values=past_key_values, use_cache=True, **kwargs)
            past_key_values = output.past_key_values
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


def padded_inputs(subject: Subject, mask: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    """Return the mask and, if the model takes them, the positions of the last `length` tokens.

    Positions count from the first token that is not padding.
    """
    inputs = {"attention_mask": mask}
    if subject.takes("position_ids"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return inputs


def left_padding(subject: Subject) -> Measure:
    """A row with padding on its left gives the logits of the row alone, with and without a cache."""
    require(subject.takes("attention_mask"), "forward has no attention_mask")
    ids, padding = subject.ids(2, LENGTH), 7
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = subject.logits(ids[:1, padding:])
    padded = [subject.logits(ids, **padded_inputs(subject, mask, LENGTH))]
    if subject.takes("past_key_values"):
        padded.append(decode(subject, ids, [LENGTH - 4] + [1] * 4, mask))
    return Measure(max(difference(logits[:1, padding:], expected) for logits in padded), SAME)


def packed_documents(subject: Subject) -> Measure:
    """Documents packed into one row give the logits of each document alone. Only restarting position_ids separate
    them, without a mask or a cache."""
    require(subject.takes("position_ids"), "forward has no position_ids")
    ids = subject.ids(2, LENGTH)
    packed = subject.logits(ids, position_ids=packed_positions(2))
    separate = [subject.logits(document) for document in ids.split(DOCUMENTS, dim=1)]
    return Measure(difference(packed, torch.cat(separate, dim=1)), SAME)


def packed_positions(rows: int) -> torch.Tensor:
    """Return positions (rows, LENGTH) that restart at 0 for each document of `DOCUMENTS`."""
    return torch.cat([torch.arange(length) for length in DOCUMENTS]).expand(rows, -1)


def position_ids(subject: Subject) -> Measure:
    """The model uses position_ids: positions three apart give other logits than positions one apart."""
    require(subject.takes("position_ids"), "forward has no position_ids")
    ids = subject.ids(1, LENGTH)
    mask = torch.ones_like(ids)  # without a mask, positions three apart would mean LENGTH packed documents
    positions = torch.arange(LENGTH).unsqueeze(0)
    near = subject.logits(ids, attention_mask=mask, position_ids=positions)
    far = subject.logits(ids, attention_mask=mask, position_ids=3 * positions)
    return Measure(difference(far, near), 1e-3, at_least=True)


# Training computes the right loss and gradient.


def loss_accumulation(subject: Subject) -> Measure:
    """The loss is the cross entropy of the next token. Rows with different numbers of labels, passed one at a time
    with num_items_in_batch, add up to the loss and gradient of the batch."""
    ids = subject.ids(4, LENGTH // 2)
    labels = ids.clone()
    labels[0, :15] = -100
    labels[1, 3:9] = -100
    targets = labels[:, 1:]
    items = (targets != -100).sum()

    whole_loss, whole_gradients = subject.gradients((ids, labels), num_items_in_batch=items)
    rows = zip(ids.split(1), labels.split(1), strict=True)
    summed_loss, summed_gradients = subject.gradients(*rows, num_items_in_batch=items)
    expected = cross_entropy(subject.logits(ids)[:, :-1].flatten(0, 1), targets.flatten()).item()

    loss_difference = max(abs(summed_loss - whole_loss), abs(whole_loss - expected)) / expected
    return Measure(max(loss_difference, gradient_difference(summed_gradients, whole_gradients)), SAME)


def parameter_gradients(subject: Subject) -> Measure:
    """Every parameter, including the routers, gets a gradient from the cross entropy alone, and it is more than
    rounding noise. Measured: the largest relative change of a gradient if embeddings change in their sixth digit."""
    # More batches until every expert has had a token.
    for count in (1, 4, 16):
        gradients = task_gradients(subject, count)
        if all(gradient is not None and gradient.any() for gradient in gradients.values()):
            break

    hook = subject.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output * (1 + 1e-6 * torch.randn_like(output))
    )
    try:
        disturbed = task_gradients(subject, count)
    finally:
        hook.remove()

    changes = {}
    for name, gradient in gradients.items():
        if gradient is None or not gradient.any():
            changes[name] = torch.inf
        else:
            changes[name] = nan_to_inf(((disturbed[name] - gradient).norm() / gradient.norm()).item())
    worst = max(changes, key=changes.get)
    return Measure(changes[worst], 0.1, note=worst)


def task_gradients(subject: Subject, batches: int) -> dict[str, torch.Tensor | None]:
    """Return each parameter's gradient of the cross entropy, summed over this many batches."""
    for seed in range(batches):
        ids = subject.ids(2, LENGTH, seed)
        logits = subject.model(ids, use_cache=False).logits.float()
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return subject.take_gradients()


def gradient_checkpointing(subject: Subject) -> Measure:
    """Gradient checkpointing, which recomputes activations in the backward pass, changes neither loss nor gradient."""
    require(subject.model.supports_gradient_checkpointing, "the model does not support it")
    ids = subject.ids(2, LENGTH)
    with training(subject.model):
        expected_loss, expected_gradients = subject.gradients((ids, ids))
    subject.model.activation_checkpointing_enable()
    try:
        with training(subject.model):
            loss, gradients = subject.gradients((ids, ids))
    finally:
        subject.model.activation_checkpointing_disable()
    loss_difference = abs(loss - expected_loss) / expected_loss
    return Measure(max(loss_difference, gradient_difference(gradients, expected_gradients)), 1e-6)


def determinism(subject: Subject) -> Measure:
    """Two training steps from the same seed give bit-identical losses and gradients. Measured: tensors that differ."""
    ids = subject.ids(2, LENGTH)
    with training(subject.model):
        first_loss, first = subject.gradients((ids, ids))
    with training(subject.model):
        second_loss, second = subject.gradients((ids, ids))

    differing = 0
    if first_loss != second_loss:
        differing += 1
    for name in first:
        if first[name] is None or second[name] is None:
            is_same = first[name] is second[name]
        else:
            is_same = torch.equal(first[name], second[name])
        if not is_same:
            differing += 1
    return Measure(differing, 0)


def initial_loss(subject: Subject) -> Measure:
    """A newly initialized model predicts all tokens equally: its loss is the log of the vocabulary size. Measured: the
    relative difference."""
    ids = subject.ids(4, LENGTH)
    with torch.no_grad():
        loss = subject.fresh_model()(ids, labels=ids, use_cache=False).loss.item()
    uniform = torch.tensor(float(subject.config.get_text_config().vocab_size)).log().item()
    return Measure(abs(loss - uniform) / uniform, 0.1)


# Every way of running the model gives the same result.


def attention_backends(subject: Subject) -> Measure:
    """The attention implementations eager, sdpa and flex_attention give the same logits, also for packed documents."""
    model = subject.model
    supported = {"eager": True, "sdpa": model._supports_sdpa, "flex_attention": model._supports_flex_attn}
    names = [name for name, is_supported in supported.items() if is_supported]
    require(len(names) > 1, "only eager attention is supported")

    ids = subject.ids(2, LENGTH)
    inputs = [{}]
    if subject.takes("position_ids"):
        inputs.append({"position_ids": packed_positions(2)})

    from torch._dynamo.exc import BackendCompilerFailed  # imports the compiler

    used = model.config._attn_implementation
    logits = {}
    remark = ""
    torch._dynamo.reset()  # torch 2.13 fails on the CPU if flex_attention was compiled for another model's shapes
    try:
        for name in names:
            model.set_attn_implementation(name)
            try:
                logits[name] = [subject.logits(ids, **kwargs) for kwargs in inputs]
            except BackendCompilerFailed:  # a limit of torch on this machine, not a fault of the model
                remark = f"without {name}, which torch cannot compile here"
    finally:
        model.set_attn_implementation(used)
    require(len(logits) > 1, remark)

    largest = 0.0
    for name in logits.keys() - {"eager"}:
        for found, expected in zip(logits[name], logits["eager"], strict=True):
            largest = max(largest, difference(found, expected))
    return Measure(largest, SAME, remark=remark)


def experts_backends(subject: Subject) -> Measure:
    """The expert implementations eager, grouped_mm and batched_mm give the same logits and gradients."""
    model = subject.model
    require(any(hasattr(module, "is_concatenated") for module in model.modules()), "no routed experts")
    ids = subject.ids(2, LENGTH)

    def run(implementation: str) -> tuple[torch.Tensor, dict]:
        model.set_experts_implementation(implementation)
        logits = subject.logits(ids)
        _, gradients = subject.gradients((ids, ids))
        return logits, gradients

    used = model.config._experts_implementation
    largest = 0.0
    try:
        expected_logits, expected_gradients = run("eager")
        for name in ("grouped_mm", "batched_mm"):
            logits, gradients = run(name)
            largest = max(
                largest,
                difference(logits, expected_logits),
                gradient_difference(gradients, expected_gradients),
            )
    finally:
        model.set_experts_implementation(used)
    return Measure(largest, SAME)


def bfloat16(subject: Subject) -> Measure:
    """In bfloat16 the logits stay close to float32, also at the end of the context. Measured: the median token's
    error, relative to that of float32 weights disturbed by four times the rounding of bfloat16."""
    ids = subject.ids(2, LENGTH)
    kwargs = {}
    if subject.takes("position_ids"):
        last = subject.config.get_text_config().max_position_embeddings
        kwargs["position_ids"] = torch.arange(last - LENGTH, last).expand(2, -1)
    expected = subject.logits(ids, **kwargs)

    def error(model: PreTrainedModel) -> float:
        logits = model(ids, use_cache=False, **kwargs).logits.float()
        return (logits - expected).norm(dim=-1).median().item()

    loaded = subject.reload(torch.bfloat16)
    buffers = dict(subject.model.named_buffers())
    for name, buffer in loaded.named_buffers():  # what loading leaves unset is the fault that `loaded_buffers` reports
        if buffer.isnan().any():
            buffer.copy_(buffers[name])

    with torch.no_grad():
        disturbed = copy.deepcopy(subject.model)
        for parameter in disturbed.parameters():
            parameter.mul_(torch.empty_like(parameter).uniform_(1 - 2**-7, 1 + 2**-7))
        allowed = error(disturbed)
        del disturbed  # large models would not fit twice
        return Measure(error(loaded) / allowed, 2)


# The router chooses the experts that its scores ask for.


def router_choice(subject: Subject) -> Measure:
    """The router chooses and weights the experts as a plain computation from its scores does. Measured: the largest
    difference of an expert's weight."""
    records = recorded_routing(subject.model, subject.ids(2, LENGTH))
    require(bool(records), "no router that returns logits, weights and indices")
    largest = 0.0
    for router, logits, weights, indices in records:
        rule = routing_rule(router, subject.model.config, indices.shape[1])
        require(rule is not None, f"the rule of {type(router).__name__} is not known")
        for token, expected in enumerate(expected_weights(logits, rule)):
            found = torch.zeros_like(expected).index_add(0, indices[token], weights[token].float())
            largest = max(largest, nan_to_inf((found - expected).abs().max().item()))
    return Measure(largest, 1e-5)


ALL_CHECKS = (
    causality,
    cached_decoding,
    left_padding,
    packed_documents,
    position_ids,
    loss_accumulation,
    tied_weights,
    loaded_buffers,
    fresh_process,
    parameter_gradients,
    attention_backends,
    experts_backends,
    gradient_checkpointing,
    bfloat16,
    determinism,
    initial_loss,
    router_choice,
)
CHECKS: dict[str, Callable[[Subject], Measure]] = {check.__name__: check for check in ALL_CHECKS}
