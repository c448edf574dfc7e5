"""Write what a teacher predicts for each token that carries loss in instructions, for sft/distill.py.

    python tools/store_teacher.py --teacher DIR --train_files sft_train.jsonl --max_length 2048 --output DIR

Of each prediction it keeps the `top_k` most likely tokens and `samples` others, drawn so that the loss on them is
unbiased (training/teacher_targets.py has the format). A target takes 6 x (top_k + samples) + 4 bytes. The rows are
read as sft/distill.py reads them, with the student's tokenizer, `max_length`, `exams` and `train_on_unfit_data`; the
recipe compares them with its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import buddygpt.model  # noqa: F401  registers the model with AutoModel
from buddygpt.cli.arguments import parse_arguments, require_count
from buddygpt.cli.checkpoints import checkpoint_sha256, load_tokenizer, require_causal_lm
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import write_atomically
from buddygpt.cli.weights import require_all_weights, require_finite_weights
from buddygpt.data.chat.load import load_rows
from buddygpt.training.distillation import require_same_vocabulary
from buddygpt.training.positions import require_positions
from buddygpt.training.starting_checkpoint import stop_at_end_of_answer
from buddygpt.training.teacher_targets import Targets, describe_rows, find_targets, sample_targets, write_targets


@dataclass
class StoreArguments:
    """The teacher, the rows, how much of each prediction to keep, and the folder to write."""

    teacher: str = field(metadata={"help": "Checkpoint of the teacher."})
    train_files: list[str] = field(metadata={"help": "Instructions to train on: jsonl or parquet files, or globs."})
    output: str = field(metadata={"help": "Folder to write; it must not exist."})
    tokenizer: str | None = field(default=None, metadata={"help": "The student's. Default: the teacher's."})
    max_length: int | None = field(default=1024, metadata={"help": "Tokens of a row that the student reads."})
    exams: list[str] = field(default_factory=list, metadata={"help": "As in sft/distill.py."})
    train_on_unfit_data: bool = field(default=False, metadata={"help": "As in sft/distill.py."})
    assistant_only_loss: bool = field(default=True, metadata={"help": "As in sft/distill.py."})
    top_k: int = field(default=16, metadata={"help": "Most likely tokens to keep of each prediction."})
    samples: int = field(default=16, metadata={"help": "Tokens to draw from the others."})
    batch_size: int = field(default=16, metadata={"help": "Rows that the teacher reads at once."})
    dtype: str = field(default="auto", metadata={"help": "Of the teacher's weights, such as bfloat16."})
    device: str | None = field(default=None, metadata={"help": "Default: the accelerator, if there is one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model code in the checkpoint."})
    seed: int = field(default=0, metadata={"help": "Of the draws."})

    def __post_init__(self) -> None:
        for key in ("top_k", "samples", "batch_size"):
            require_count(key, getattr(self, key), 10**6)


def main() -> None:
    (args,) = parse_arguments(StoreArguments, description=__doc__)
    output = Path(args.output)
    if output.exists():
        raise UserError(f"{output} exists: delete it, or name another folder")
    config = require_causal_lm(args.teacher, args.trust_remote_code)
    require_positions("max_length", args.max_length, getattr(config, "max_position_embeddings", None))
    tokenizer = load_tokenizer(args.tokenizer or args.teacher)
    require_same_vocabulary(load_tokenizer(args.teacher), tokenizer)
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise UserError(f"{args.teacher} has fewer embeddings than the {len(tokenizer):,} tokens of the tokenizer")
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path} has no chat template: add a chat_template.jinja to it")
    stop_at_end_of_answer(tokenizer)
    options = {"assistant_only": args.assistant_only_loss, "benchmarks": args.exams, "force": args.train_on_unfit_data}
    rows = load_rows(args.train_files, "sft", tokenizer, args.max_length, **options)
    description = {
        "teacher": args.teacher,
        "teacher_sha256": checkpoint_sha256(args.teacher),
        **describe_rows(args.train_files, rows, tokenizer, args.max_length),
        **{key: getattr(args, key) for key in ("top_k", "samples", "seed", "dtype")},
    }
    teacher = load_teacher(args)
    with write_atomically(output) as folder:
        total = write_targets(folder, predict(teacher, rows, tokenizer, args), description)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}: {total:,} targets of {len(rows):,} rows, {size / 1e6:,.1f} MB")


def load_teacher(args: StoreArguments) -> PreTrainedModel:
    if Path(args.teacher).is_dir():
        require_all_weights(args.teacher, args.trust_remote_code)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        teacher = AutoModelForCausalLM.from_pretrained(
            args.teacher, dtype=args.dtype, trust_remote_code=args.trust_remote_code
        ).to(args.device or accelerator)
    except (ValueError, RuntimeError, AttributeError, AssertionError) as error:
        raise UserError(f"cannot load {args.teacher}: {str(error).splitlines()[0]}") from error
    require_finite_weights(teacher, args.teacher)
    return teacher.eval()


@torch.no_grad()
def predict(
    teacher: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: StoreArguments
) -> Iterator[Targets]:
    """Yield the targets of all rows, in order."""
    generator = torch.Generator(teacher.device).manual_seed(args.seed)
    for start in tqdm(range(0, len(rows), args.batch_size), desc="The teacher reads the rows"):
        batch = rows[start : start + args.batch_size]
        ids = [torch.tensor(each[: args.max_length]) for each in batch["input_ids"]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        logits = teacher(input_ids=padded.to(teacher.device), attention_mask=mask.to(teacher.device)).logits
        for row, labels in zip(logits, batch["labels"], strict=True):
            # The token at a position is predicted by the logits before it. Padded embeddings are no tokens.
            before = torch.tensor(find_targets(labels, args.max_length), dtype=torch.long, device=row.device) - 1
            log_probs = row[before, : len(tokenizer)].float().log_softmax(-1)
            yield Targets(*(each.cpu() for each in sample_targets(log_probs, args.top_k, args.samples, generator)))


if __name__ == "__main__":
    run_script(main)
