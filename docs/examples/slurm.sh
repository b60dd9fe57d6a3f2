#!/bin/bash
# Trains on SLURM: one process for each GPU, as many nodes as asked for, continued after preemption or requeueing.
#   sbatch docs/examples/slurm.sh experiment=rae_ddp data.data_dir=/path/to/imagenet_hf
# Submit it from the project root, which must lie on a file system that all nodes share.
#SBATCH --job-name=rae
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
# SIGTERM three minutes before the time limit: the run saves checkpoints/last.ckpt and ends with exit code 143.
set -euo pipefail

resume=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then resume=(ckpt_path=last); fi

srun --kill-on-bad-exit=1 .venv/bin/python src/train.py "$@" trainer.strategy=ddp trainer.num_nodes="$SLURM_NNODES" "${resume[@]}"
