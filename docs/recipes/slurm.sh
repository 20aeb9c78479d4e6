#!/usr/bin/env bash
# LLaMA-7b on four nodes of eight GPUs:  sbatch docs/recipes/slurm.sh
# Submitted again after a failure, or requeued, it goes on from the last checkpoint.
#SBATCH --job-name=memopt-7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

OUTPUT=${OUTPUT:-$HOME/runs/7b}      # on a file system that all nodes share
DATA=${DATA:-$HOME/text/**/*.jsonl}

resume=()
if [ -f "$OUTPUT/config.json" ]; then resume=(--resume); fi

# A process a GPU; they find each other by what Slurm tells them. SIGTERM comes five minutes before
# the time is over: the run saves and stops.
srun --kill-on-bad-exit=1 memopt pretrain --model 7b --optimizer apollo_mini --mesh fsdp=32 \
    --param-dtype bfloat16 --compute-dtype bfloat16 --remat full --batch-size 128 --seq-len 2048 \
    --steps 100000 --checkpoint-every 500 --data "$DATA" --output "$OUTPUT" "${resume[@]}"
