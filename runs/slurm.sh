#!/usr/bin/env bash
# A recipe on a Slurm cluster, that goes on by itself when the job is preempted, loses a machine or runs out of time:
#     sbatch --nodes 2 --gpus-per-node 8 runs/slurm.sh pretrain/pretrain.py --config pretrain/configs/buddygpt-0.1b.yaml
# ACCELERATE_CONFIG names another config than ddp.yaml (zero2.yaml, ...). The checkout, its .venv and outputs/ are on a
# disk that all machines share. What was done since the last checkpoint (save_steps) is done again.
#SBATCH --job-name=buddygpt
#SBATCH --ntasks-per-node=1        # accelerate starts the processes, one a GPU
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue                  # preempted or a machine lost: queued again by Slurm
#SBATCH --signal=B:USR1@60         # out of time in a minute: queued again by the trap below
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
if [ -z "${SLURM_JOB_NODELIST:-}" ] || [ $# -eq 0 ]; then
    echo "error: usage: sbatch --nodes N --gpus-per-node G runs/slurm.sh SCRIPT ARGUMENTS..." >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this file from elsewhere
[ ! -e .venv ] || PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TOKENIZERS_PARALLELISM=false
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:?"give sbatch --gpus-per-node"}
launch=(accelerate launch --config_file "${ACCELERATE_CONFIG:-accelerate_configs/ddp.yaml}"
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes $((SLURM_JOB_NUM_NODES * gpus))
    --main_process_ip "$first" --main_process_port $((20000 + SLURM_JOB_ID % 10000)))
# One task a machine; only there is its rank known. A machine that is lost takes the others down, not half the job.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '"${@:1:2}" --machine_rank "$SLURM_NODEID" "${@:3}"' - "${launch[@]}" "$@" &
wait $! # in the background, so that the trap is run at once
