#!/usr/bin/env bash
# Trains on the hosts of a Cloud TPU slice, started from your own computer: `launch/tpu_vm.sh`.
# Needs gcloud and a slice that exists. Edit the two places marked EDIT.
#
# The same command runs on every host; train.py finds the others by itself. The run outlives this
# script: what the hosts print is in train.log on each. Run the script again to go on after a
# maintenance event (the run has saved then) or with another number of hosts.
set -euo pipefail

# EDIT 1: the machines.
NAME=zzhnet-v5e-16
ZONE=us-central1-a
PROJECT=my-project

# EDIT 2: the run, and where its code comes from. RUN_DIR and the data must be on storage that all
# hosts see, such as a mounted bucket or Filestore.
REPOSITORY=https://github.com/OWNER/zzhnet_jax
COMMAND="python train.py --config configs/zzhnet_tiny_levir.py --run-dir /storage/runs/levir
  --data.root /storage/LEVIR-CD --data.batch-size 128 --mesh.data -1"

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --project "$PROJECT" --worker=all \
    --command "$1"
}

everywhere "set -e; [ -d zzhnet_jax ] || git clone $REPOSITORY zzhnet_jax; cd zzhnet_jax; git pull
  [ -d .venv ] || python3.11 -m venv .venv; .venv/bin/pip install --quiet -e '.[tpu]'"
everywhere "cd zzhnet_jax; source .venv/bin/activate
  nohup $(echo "$COMMAND" | tr '\n' ' ') >> train.log 2>&1 < /dev/null & sleep 1; echo started"
