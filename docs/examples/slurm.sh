#!/bin/bash
# Train on SLURM: one process per GPU, any number of nodes, resumed after preemption or a requeue.
#   sbatch docs/examples/slurm.sh experiment=rae_ddp data.data_dir=/path/to/imagenet_hf
# Submit it from the project root, which must be on a file system that all nodes share.
#SBATCH --job-name=rae
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
# SIGTERM three minutes before the time limit: the run saves checkpoints/last.ckpt and exits with code 143.
set -euo pipefail

# Each job has its own folder. A requeued job keeps its ID, so it resumes its own run and never another job's.
folder="logs/runs/slurm/$SLURM_JOB_ID"
resume=()
if [ -f "$folder/checkpoints/last.ckpt" ]; then resume=("ckpt_path=$folder/checkpoints/last.ckpt"); fi

# ${resume[@]+…}: bash before 4.4 treats an empty array as an unset variable.
srun --kill-on-bad-exit=1 .venv/bin/python src/train.py "$@" trainer.strategy=ddp trainer.num_nodes="$SLURM_NNODES" \
    paths.run_dir="$folder" ${resume[@]+"${resume[@]}"}
