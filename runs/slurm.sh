#!/usr/bin/env bash
# Run a recipe on a Slurm cluster. It resumes after preemption, a lost machine or the time limit:
#     sbatch --nodes 2 --gpus-per-node 8 runs/slurm.sh \
#         pretrain/pretrain.py --config pretrain/configs/buddygpt-0.1b.yaml
# Set ACCELERATE_CONFIG to use another config than ddp.yaml (zero2.yaml, ...). The checkout, its .venv and outputs/
# must be on a disk that all machines share. Work since the last checkpoint (save_steps) is repeated.
#SBATCH --job-name=buddygpt
#SBATCH --ntasks-per-node=1        # accelerate starts one process per GPU
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue                  # Slurm queues the job again after preemption or the loss of a machine
#SBATCH --signal=B:USR1@60         # one minute before the time limit; the trap below queues the job again
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
if [ -z "${SLURM_JOB_NODELIST:-}" ] || [ $# -eq 0 ]; then
    echo "error: usage: sbatch --nodes N --gpus-per-node G runs/slurm.sh SCRIPT ARGUMENTS..." >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this file in another folder
if [ -e .venv ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TOKENIZERS_PARALLELISM=false
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:?"give sbatch --gpus-per-node"}
launch=(accelerate launch --config_file "${ACCELERATE_CONFIG:-accelerate_configs/ddp.yaml}"
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes $((SLURM_JOB_NUM_NODES * gpus))
    --main_process_ip "$first" --main_process_port $((20000 + SLURM_JOB_ID % 10000)))

# srun starts one task per machine. Only the task knows its rank, so it inserts it after `accelerate launch`. If one
# fails, srun stops all others instead of leaving them waiting.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '"${@:1:2}" --machine_rank "$SLURM_NODEID" "${@:3}"' - "${launch[@]}" "$@" &
wait $! # bash runs a trap at once only while it waits for a background job
