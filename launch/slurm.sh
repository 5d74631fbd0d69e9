#!/usr/bin/env bash
# Trains on several nodes under SLURM: `sbatch launch/slurm.sh`. Edit the two places marked EDIT.
#
# Every task is one process of the run; train.py finds the others by itself in what SLURM sets.
# SLURM sends SIGTERM 120 seconds before the time is up: the run saves, ends with exit code 0, and
# this script queues itself again to go on, until metrics.json says that the run is finished. If a
# node fails, the other processes end within a minute and SLURM may requeue the job (--requeue).

# EDIT 1: the machines. One task a GPU is what JAX expects; --gpus-per-node is theirs together.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --job-name=zzhnet
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

# EDIT 2: the run. RUN_DIR and the data must be on storage that all nodes see.
RUN_DIR=runs/zzhnet_tiny_levir
COMMAND=(python train.py --config configs/zzhnet_tiny_levir.py --run-dir "$RUN_DIR"
  --data.root /data/LEVIR-CD --data.batch-size 64 --mesh.data -1)

source .venv/bin/activate
# JAX looks at these and may hang on clusters that reach the network through a proxy.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

srun --kill-on-bad-exit=1 "${COMMAND[@]}"

[ -f "$RUN_DIR/metrics.json" ] || sbatch "$0"
