"""Members of transformers' and TRL's trainers that this project relies on although they are not a stable interface.

transformers may rename or remove them in any release. tests/training/test_trainer_internals.py checks that each still
exists, and that the code uses no private member that is not listed here.
"""

import inspect
from dataclasses import dataclass

import transformers
import trl
from trl.experimental.cpo import CPOTrainer

# File, member, use, and why the public interface is not enough. `override` is in a subclass, `replace` on an instance.
TABLE = """
training/saving.py                Trainer._save_checkpoint              replace   checkpoints are complete or absent
training/saving.py                Trainer._get_output_dir               replace   saves to a temporary folder first
training/saving.py                Trainer._push_from_checkpoint         replace   uploads after the rename, not before
training/resume.py                Trainer._issue_warnings_after_load    replace   tied weights are not missing
training/resume.py                SFTTrainer._total_train_tokens        set       TRL counts from 0 again
training/packed_rows.py           SFTTrainer._total_train_tokens        set       TRL counts the tokens of one row
training/packed_rows.py           SFTTrainer._metrics                   set       the same in the log
training/evaluation.py            GRPOTrainer.num_generations_eval      read      answers to a row stay together
training/pickles.py               Trainer._load_from_checkpoint         replace   errors become one line
training/pickles.py               Trainer._load_optimizer_and_scheduler replace   errors become one line
training/pickles.py               Trainer._load_scaler                  replace   errors become one line
training/pickles.py               Trainer._load_rng_state               replace   errors become one line
training/run.py                   Trainer.get_batch_samples             replace   a finished run takes no further step
training/run.py                   Trainer.callback_handler              read      our callbacks must run first
training/evaluation.py            Trainer.get_eval_dataloader           replace   no row is read twice
training/evaluation.py            Trainer.evaluation_loop               replace   averages over tokens, not batches
training/evaluation.py            Trainer.prediction_step               replace   counts the tokens of each batch
training/evaluation.py            SFTTrainer._metrics                   read      corrects the means of other values
training/evaluation.py            CPOTrainer._stored_metrics            read      the same in trl.experimental
training/model_losses.py          Trainer.compute_loss                  replace   adds the losses that TRL leaves out
training/callbacks/throughput.py  Trainer.get_batch_samples             replace   measures the time of each fetch
training/callbacks/throughput.py  DPOTrainer.ref_model                  read      MFU does not count a reference model
training/callbacks/alarms.py      Trainer.training_step                 replace   logs only have means of many steps
training/callbacks/alarms.py      Trainer._get_grad_norm                replace   logs only have the last step's
training/callbacks/alarms.py      Trainer._tr_loss                      read      NaN would stay in this sum forever
pretrain/stream_trainer.py        Trainer._get_train_sampler            override  starts at the current step
pretrain/stream_trainer.py        Trainer._load_rng_state               override  postponed: the loader draws a number
pretrain/stream_trainer.py        Trainer.get_batch_samples             override  restores it after the first fetch
rlhf/dpo_trainer.py               DPOTrainer._prepare_dataset           override  the rows are tokenized already
rlhf/dpo_trainer.py               DPOTrainer._compute_loss              override  the loss `sft` is a mean over pairs
rlhf/kto.py                       KTOTrainer._prepare_dataset           override  the rows are tokenized already
rlhf/reward.py                    RewardTrainer._set_signature_columns_if_needed override keeps the column `source`
rlhf/reward.py                    RewardTrainer._signature_columns      set       keeps the column `source`
rlhf/reward.py                    RewardTrainer._metrics                read      adds the accuracy of each source
data/chat/prompt_batches.py       Trainer._get_train_sampler            override  later epochs resume in their order
data/chat/prompt_batches.py       GRPOTrainer._tokenize_prompts         override  each row has its own tools
data/chat/prompt_batches.py       RLOOTrainer._tokenize_prompts         override  each row has its own tools
data/chat/prompt_batches.py       GRPOTrainer._generate_and_score_completions override knows the rows of the prompts
data/chat/prompt_batches.py       DistillationTrainer._tokenize_prompts override each row has its own tools
data/chat/prompt_batches.py       DistillationTrainer._generate_and_score_completions override knows the rows
data/chat/prompt_batches.py       RLOOTrainer._generate_and_score_completions override knows the rows of the prompts
pretrain/replay.py                Trainer._load_from_checkpoint         call      loads weights without training
pretrain/replay.py                Trainer._prepare_inputs               call      moves a row to the device
pretrain/replay.py                Trainer.compute_loss_context_manager  call      uses the precision of the run
"""
TRL_TRAINERS = (
    *(trl.SFTTrainer, trl.DPOTrainer, trl.KTOTrainer, trl.RewardTrainer, trl.GRPOTrainer, trl.RLOOTrainer),
    *(trl.DistillationTrainer, CPOTrainer),
)
OWNERS = {"Trainer": transformers.Trainer} | {owner.__name__: owner for owner in TRL_TRAINERS}


@dataclass(frozen=True)
class Internal:
    """One row of `TABLE`."""

    file: str
    owner: str
    name: str
    use: str
    why: str


def read_table() -> list[Internal]:
    rows = []
    for line in TABLE.strip().splitlines():
        file, member, use, why = line.split(maxsplit=3)
        owner, name = member.split(".")
        rows.append(Internal(file, owner, name, use, why))
    return rows


def missing_internals() -> list[Internal]:
    """Return the rows whose member the installed transformers or TRL does not have."""
    missing = []
    for row in read_table():
        owner = OWNERS[row.owner]
        # Attributes that methods assign exist on instances only.
        is_assigned = f"self.{row.name} = " in inspect.getsource(owner)
        if not hasattr(owner, row.name) and not is_assigned:
            missing.append(row)
    return missing
