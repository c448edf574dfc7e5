"""GRPO and RLOO train every kind of model, resume bit for bit, and take the loss on answers up to their end only."""

import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import history, run
from tiny_models import SIZES, same_weights, save_random_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)
from trl import GRPOTrainer

from buddygpt.cli.errors import UserError


def grpo(workspace: Path, model: Path, output: Path, *options: object) -> None:
    rows = workspace / "sample" / "sft_eval.jsonl"
    data = ["--train_files", rows, "--eval_files", rows, "--model_name_or_path", model]
    run("rlhf/grpo.py", "--config", "rlhf/configs/debug-grpo.yaml", *data, "--output_dir", output, *options)


@pytest.fixture(scope="module")
def few_rows(workspace) -> Path:
    """Five rows: an epoch of two steps of two questions."""
    path = workspace / "few.jsonl"
    path.write_text("".join((workspace / "sample" / "sft_eval.jsonl").open(encoding="utf-8").readlines()[:5]))
    return path


def check_run(folder: Path, algorithm: str = "grpo") -> None:
    logs = history(folder)
    steps = [row for row in logs if "loss" in row]
    for row in steps:
        for key in ("reward", "rewards/exact_match/mean", "rewards/length/mean", "kl", "entropy", "grad_norm"):
            assert math.isfinite(row[key]), key
        assert 0 <= row["frac_reward_zero_std"] <= 1 and row["tokens_per_second"] > 0 and "mfu" not in row
        mean = row["rewards/exact_match/mean"] + 0.2 * row["rewards/length/mean"]
        assert row["reward"] == pytest.approx(mean, abs=1e-5)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["num_tokens"] > steps[0]["num_tokens"] > 0
    assert [row["step"] for row in logs if "eval_reward" in row] == [3, 6]
    card = json.loads((folder / "run.json").read_text())
    assert card["recipe"] == algorithm and card["arguments"]["rewards"] == ["exact_match", "length"]
    assert card["tokens_seen"] == steps[-1]["num_tokens"] and "eval_reward" in card["metrics"]
    assert {"loss_curve.png", "samples.md"} <= {path.name for path in folder.iterdir()}
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mixture", "qwen3"])
def test_every_model_trains_and_resumes_bit_for_bit(kind, workspace, chat_model, few_rows, tmp_path):
    """In the third of four epochs, whose order differs from that of the first."""
    model = chat_model if kind == "dense" else save_random_model(kind, workspace)
    grpo(workspace, model, tmp_path / "whole", "--train_files", few_rows, "--save_steps", 5)
    check_run(tmp_path / "whole")
    assert not same_weights(tmp_path / "whole", model)
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    grpo(workspace, model, tmp_path / "resumed", "--train_files", few_rows, "--save_steps", 5)
    assert same_weights(tmp_path / "resumed", tmp_path / "whole")
    counts = [history(tmp_path / name)[-1].get("num_tokens") for name in ("whole", "resumed")]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_rloo_and_lora(workspace, chat_model, tmp_path):
    grpo(workspace, chat_model, tmp_path / "rloo", "--algorithm", "rloo", "--normalize_advantages", "true")
    check_run(tmp_path / "rloo", "rloo")
    grpo(workspace, chat_model, tmp_path / "lora", "--use_peft", "true", "--lora_r", 4, "--loss_type", "dr_grpo")
    check_run(tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(UserError, match="normalize_advantages"):  # no option of the other algorithm
        grpo(workspace, chat_model, tmp_path / "mixed", "--normalize_advantages", "true")


@pytest.mark.slow
def test_our_reward_model_judges_answers(workspace, chat_model, tmp_path, monkeypatch):
    """One that rlhf/reward.py has trained with LoRA: it gives whole chats the score that it gives them alone."""
    pairs = ["--train_files", workspace / "sample" / "preference_eval.jsonl", "--model_name_or_path", chat_model]
    lora = ["--use_peft", "true", "--lora_r", 4, "--max_steps", 1, "--eval_strategy", "no", "--eval_files", ""]
    judge = tmp_path / "judge"
    run("rlhf/reward.py", "--config", "rlhf/configs/debug-reward.yaml", *pairs, *lora, "--output_dir", judge)
    judged, calculate = [], GRPOTrainer._calculate_rewards

    def recorded(trainer, inputs, prompts, completions, ids):
        scores = calculate(trainer, inputs, prompts, completions, ids)
        judged.extend(zip(prompts, completions, scores[:, 0].tolist(), strict=True))
        return scores

    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", recorded)
    options = ["--rewards", judge, "--reward_weights", 1, *lora[-6:]]
    grpo(workspace, chat_model, tmp_path / "grpo", *options)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(judge), AutoTokenizer.from_pretrained(judge)
    assert len(judged) == 8 and len({score for _, _, score in judged}) > 1
    for prompt, completion, score in judged:
        chat = tokenizer.apply_chat_template(prompt + completion, return_tensors="pt", return_dict=True)
        assert model.eval()(**chat).logits.item() == pytest.approx(score, abs=1e-4)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}


@pytest.mark.slow
def test_a_reward_model_a_users_function_and_tools(workspace, chat_model, tmp_path, monkeypatch):
    """The judge is a stock sequence classifier. Every row reaches the template and the function with its columns."""
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    judge = Qwen3ForSequenceClassification(
        Qwen3Config(**SIZES | {"vocab_size": len(tokenizer)}, num_key_value_heads=2, head_dim=12, num_labels=1)
    )
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    rows = [{"prompt": f"{n} + 1 = ?", "answer": n + 1, "level": n} for n in range(4)]
    rows[1]["tools"] = rows[2]["tools"] = [TOOL]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "level_rewards.py").write_text(
        "def level(completions, answer, level, **columns):\n"
        "    assert [int(each) for each in answer] == [each + 1 for each in level]\n"
        "    return [float(len(each[0]['content'])) for each in completions]\n"
    )
    prompts, tokenize = [], GRPOTrainer._generate_single_turn

    def recorded(trainer, prompt_ids, *args):
        prompts.extend(trainer.processing_class.decode(ids) for ids in prompt_ids)
        return tokenize(trainer, prompt_ids, *args)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", recorded)
    monkeypatch.syspath_prepend(tmp_path)
    rewards = ["valid_tool_call", "level_rewards:level", tmp_path / "judge"]
    rows = tmp_path / "rows.jsonl"
    options = ["--train_files", rows, "--eval_files", rows, "--max_steps", 2, "--eval_strategy", "no", "--beta", 0]
    options += ["--rewards", *rewards, "--reward_weights", 1, 1, 0.5, "--max_completion_length", 4]
    grpo(workspace, enlarged(chat_model, tmp_path / "large"), tmp_path / "grpo", *options)
    names = {key for row in history(tmp_path / "grpo") for key in row if key.startswith("rewards/")}
    assert {f"rewards/{name}/mean" for name in ("valid_tool_call", "level", "judge")} <= names
    for prompt in prompts:
        assert ("weather" in prompt) == ("1 + 1" in prompt or "2 + 1" in prompt), prompt


def enlarged(model: Path, folder: Path) -> Path:
    """Copy a model, and let it read 512 tokens: a description of tools is long."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.mark.slow
def test_answers_carry_loss_up_to_their_end_mark(workspace, chat_model, tmp_path, monkeypatch):
    """A decoded batch: the mark that ends an answer carries loss, and nothing after it does."""
    batches, compute_loss = [], GRPOTrainer._compute_loss

    def recorded(trainer, model, inputs):
        batches.append({key: inputs[key] for key in ("prompt_ids", "completion_ids", "completion_mask")})
        return compute_loss(trainer, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", recorded)
    start = shutil.copytree(chat_model, tmp_path / "start", ignore=shutil.ignore_patterns("checkpoint-*"))
    make_marks_likely(start)
    grpo(workspace, start, tmp_path / "grpo", "--max_steps", 2, "--eval_strategy", "no")
    tokenizer = AutoTokenizer.from_pretrained(start)
    ends = AutoModelForCausalLM.from_pretrained(start).generation_config.eos_token_id  # <|endoftext|> ends one, too
    assert tokenizer.eos_token_id in ends
    ended = 0
    for batch in batches:
        for prompt, ids, mask in zip(*batch.values(), strict=True):
            assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
            kept = ids[mask.bool()].tolist()
            assert mask.tolist() == [1] * len(kept) + [0] * (len(mask) - len(kept))
            marks = [number for number, token in enumerate(kept) if token in ends]
            assert marks in ([], [len(kept) - 1]) and (marks or len(kept) == 16)
            ended += kept[-1] == tokenizer.eos_token_id
    assert 0 < ended < len(batches) * 8


def make_marks_likely(folder: Path) -> None:
    """Give <|im_end|> the embedding of a frequent token, so that some answers end within 16 tokens."""
    model, tokenizer = (each.from_pretrained(folder) for each in (AutoModelForCausalLM, AutoTokenizer))
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你是谁？"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    frequent = model(**question).logits[0, -1].argmax()
    weights = model.get_output_embeddings().weight.data
    weights[tokenizer.eos_token_id] = weights[frequent]
    model.save_pretrained(folder)


REFUSED = {
    "pairs": (["--train_files", "SAMPLE/preference_eval.jsonl"], "rows? of kind preference: .* rlhf/dpo.py"),
    "no answers": (["--train_files", "STRANGE/bare.jsonl"], "the reward exact_match or length needs|bare.jsonl"),
    "no call": (["--rewards", "tool_call", "exact_match"], "no row has an `answer` that is a tool call"),
    "no tools": (["--rewards", "valid_tool_call", "exact_match"], "no row has `tools`"),
    "few rows": (["--per_device_train_batch_size", 2048], "248 rows, fewer than the 512 questions of a step"),
    "long answers": (["--max_completion_length", 129], "max_completion_length is 129, but the model has only 128"),
    "no room": (["--max_completion_length", 126], "the prompt has .* and only 2 leave room"),
    "odd group": (["--num_generations", 3], "must be divisible by num_generations"),
    "odd evaluation": (
        ["--per_device_eval_batch_size", 7, "--num_generations_eval", 2, "--eval_strategy", "no"],
        "processes is 7, no multiple of the 2 answers",
    ),
    "weights": (["--reward_weights", 1], "reward_weights has 1 values for the 2 rewards"),
    "vllm": (["--use_vllm", "true"], "vLLM does not know BuddyGPT"),
    "loss": (["--loss_type", "dpo"], "`loss_type` is dpo, must be one of grpo, dapo"),
    "temperature": (["--temperature", 0], "`temperature` is 0"),
    "algorithm": (["--algorithm", "ppo"], "algorithm"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_learned_from_is_told_in_one_line(mistake, workspace, base, tmp_path):
    extra, message = REFUSED[mistake]
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1 + 1 = ?"}\n')
    places = {"SAMPLE": workspace / "sample", "STRANGE": tmp_path}
    for name, place in places.items():
        extra = [str(word).replace(name, str(place)) for word in extra]
    with pytest.raises(UserError, match=message):
        grpo(workspace, base, tmp_path / "mistaken", *extra)
    assert not (tmp_path / "mistaken").exists()
