"""Checks that saving and loading keeps the model."""

import os
import subprocess
import sys

import torch
from transformers import PreTrainedModel

from .measures import LENGTH, SAME, Measure, difference
from .subject import Subject


def tied_weights(subject: Subject) -> Measure:
    """Saving and loading keeps every tensor, and keeps head and embedding tied or untied as the config says.
    Measured: tensors that changed."""
    model, loaded = subject.model, subject.reload()
    before, after = model.state_dict(), loaded.state_dict()
    changed = before.keys() ^ after.keys()
    for name in before.keys() & after.keys():
        if not torch.equal(before[name], after[name]):
            changed.add(name)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    if is_tied(model) != tied or is_tied(loaded) != tied:
        changed.add(f"the output head (tie_word_embeddings is {tied})")
    return Measure(len(changed), 0, note=", ".join(sorted(changed)[:3]))


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def loaded_buffers(subject: Subject) -> Measure:
    """The loaded model gives the logits of the saved one, also if new memory is not zero. transformers loads into new
    memory and sets only what the file holds and what `_init_weights` initializes, so other buffers keep what was there
    before. Measured with that memory filled with NaN."""
    ids = subject.ids(2, LENGTH)
    loaded = subject.reload()
    unset = [name for name, buffer in loaded.named_buffers() if buffer.isnan().any()]
    with torch.no_grad():
        logits = loaded(ids, use_cache=False).logits.float()
    return Measure(difference(logits, subject.logits(ids)), SAME, note=", ".join(unset[:3]))


def fresh_process(subject: Subject) -> Measure:
    """The saved folder loads in a new process that imports only transformers, and gives the same logits."""
    ids = subject.ids(2, LENGTH)
    folder = subject.saved.parent
    torch.save((ids, subject.logits(ids)), folder / "expected.pt")
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
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    return Measure(float(result.stdout.split("difference")[1]), 1e-6)
