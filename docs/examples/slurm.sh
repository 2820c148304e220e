#!/usr/bin/env bash
# A command of a bundle on all GPUs of several machines, or on all cores where they have none:
#   sbatch slurm.sh BUNDLE run training --config_file "['configs/train.yaml','configs/multi_gpu.yaml']" --dataset_dir DATA
#   sbatch --nodes=4 slurm.sh BUNDLE run --config_file configs/inference.yaml --dataset_dir NEW --output_dir OUT
# One torchrun on each machine starts its processes. All paths absolute, and where every machine sees them.
#SBATCH --job-name=regpipe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

bundle=${1:?the folder of a bundle}
shift
nodes=${SLURM_JOB_NUM_NODES:?run it by sbatch}
hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?run it by sbatch}")
cores=${SLURM_CPUS_PER_TASK:-1}
processes=${SLURM_GPUS_ON_NODE:-$cores}
threads=$((cores / processes))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
export ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=$OMP_NUM_THREADS

cd "$bundle"
srun --kill-on-bad-exit=1 torchrun --nnodes="$nodes" --nproc_per_node="$processes" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))" \
    -m monai.bundle "$@"
