#!/bin/sh
# One rank of a training run under Slurm: `srun tools/slurm.sh --config configs/h2_256.yaml`, one task a GPU; see docs/multi_node.md.
# Signals of the cluster reach the rank itself, which saves and ends; no launcher stands between.
set -eu

export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
# The first node of the job, the same for every task; a port that a second job on that node does not take.
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "${PYTHON:-python}" "$(dirname "$0")/../train.py" "$@"
