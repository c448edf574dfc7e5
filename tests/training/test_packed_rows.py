"""Packed rows that stay apart train like TRL's joined ones: the same loss on the same tokens, and the same counts."""

import pytest
import torch
from conftest import history, run, sft_arguments
from tiny_models import VARIANTS, make_model

from buddygpt.training import packed_rows
from buddygpt.training.packed_rows import PackedRowsCollator, needs_one_row


def test_rows_keep_their_documents_and_get_no_mask():
    examples = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9], "seq_lengths": [3, 2]},
        {"input_ids": [3, 4], "labels": [3, 4], "seq_lengths": [2]},
    ]
    batch = PackedRowsCollator(pad_token_id=0, return_position_ids=True)(examples)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    # No document predicts the first token of the next, and nothing predicts what fills a row.
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 4, -100, -100, -100]]


def test_documents_of_a_row_do_not_see_each_other():
    model = make_model(**VARIANTS["gqa-norm"])
    rows = [[5, 6, 7], [8, 9], [3, 4]]
    examples = [{"input_ids": rows[0] + rows[1], "seq_lengths": [3, 2]}, {"input_ids": rows[2], "seq_lengths": [2]}]
    batch = PackedRowsCollator(pad_token_id=0, return_position_ids=True)(examples)
    del batch["labels"]
    with torch.no_grad():
        found = model(**batch, use_cache=False).logits
        alone = [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]
    for got, expected in zip([found[0, :3], found[0, 3:], found[1, :2]], alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_attention_that_takes_bounds_keeps_one_row():
    model = make_model()
    assert not needs_one_row(model)
    model.config._attn_implementation = "flash_attention_2"
    assert needs_one_row(model)
    model = make_model()
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert needs_one_row(model)


@pytest.mark.slow
def test_training_is_the_same_apart_and_joined(workspace, base, tmp_path, monkeypatch):
    shapes, forward = [], torch.nn.Embedding.forward

    def see(self, ids):
        shapes.append(tuple(ids.shape))
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", see)
    options = ["--packing", "true", "--max_length", 96, "--logging_steps", 1]
    options += [word for key in ("max_steps", "save_steps", "eval_steps") for word in (f"--{key}", 4)]
    logs = {}
    for name in ("apart", "joined"):
        if name == "joined":
            monkeypatch.setattr(packed_rows, "needs_one_row", lambda model: True)
        run("sft/sft.py", *sft_arguments(workspace, base), *options, "--output_dir", tmp_path / name)
        logs[name] = history(tmp_path / name)
        assert (max(rows for rows, _ in shapes) > 1) == (name == "apart")
        assert (max(length for _, length in shapes) > 96) == (name == "joined")
        shapes.clear()
    for key in ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens", "eval_loss"):
        apart, joined = ([row[key] for row in log if key in row] for log in logs.values())
        assert apart and apart == pytest.approx(joined, rel=1e-4), key
